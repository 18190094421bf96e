"""The page's server: on this machine alone, for its own page alone, with nothing but the listed pictures to give.

Refused: a Host that is not this machine (DNS rebinding), a POST that another site's page sent, a picture that is in no
listed pair. The pages themselves are files beside this one; nothing is fetched from elsewhere.
"""

from __future__ import annotations

import io
import os
import socket
import sys
import webbrowser
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..data.images import load_image
from ..data.writers import suffix_of
from ..errors import RunError, UserError
from .session import Refused, Session, State

HOST = "127.0.0.1"
NAMES = [HOST, "localhost"]
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
PICTURES = {"jpg": "image/jpeg", "png": "image/png", "webp": "image/webp"}  # others are shown as PNG
SAFE = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


class OwnPageOnly:
    """Refuses what another site's page sends, and forbids it to read what this one is given."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        own = f"http://{headers.get('host', '')}"
        foreign = headers.get("origin", own) != own or headers.get("sec-fetch-site", "none") in (
            "cross-site",
            "same-site",
        )
        if scope["method"] == "POST" and (foreign or headers.get("content-type") != "application/json"):
            await PlainTextResponse("only the labelling page itself may send votes", 403)(scope, receive, send)
            return

        async def safely(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(SAFE)
            await send(message)

        await self.app(scope, receive, safely)


def make_app(session: Session) -> Starlette:
    """The page over a session."""

    def file(name: str) -> Route:
        data, kind = (Path(__file__).parent / name).read_bytes(), TYPES[Path(name).suffix]

        def give(request: Request) -> Response:
            return Response(data, media_type=kind, headers={"Cache-Control": "no-cache"})

        return Route("/" if name == "page.html" else f"/{name}", give)

    def state(request: Request) -> Response:
        return _answer(session.state)

    async def change(request: Request) -> Response:
        try:
            sent = await request.json()
            pair, vote = sent["pair"], sent["vote"]
        except (ValueError, KeyError, TypeError):
            return JSONResponse({"error": "a vote is {pair, vote}"}, 400)
        if not isinstance(pair, str) or not isinstance(vote, str):
            return JSONResponse({"error": "pair and vote are texts"}, 400)
        what = (lambda: session.undo(pair)) if vote == "undo" else (lambda: session.vote(pair, vote))
        return await run_in_threadpool(_answer, what)

    def picture(request: Request) -> Response:
        try:
            data = session.picture(request.path_params["digest"])
        except Refused as error:
            return PlainTextResponse(str(error), 404)
        kind = suffix_of(data)
        if kind not in PICTURES:
            buffer = io.BytesIO()
            load_image(data).save(buffer, "PNG")
            data, kind = buffer.getvalue(), "png"
        keep = {"Cache-Control": "private, max-age=86400, immutable"}  # the name is the content's
        return Response(data, media_type=PICTURES[kind], headers=keep)

    return Starlette(
        routes=[
            *map(file, ("page.html", "page.css", "page.js")),
            Route("/state", state),
            Route("/vote", change, methods=["POST"]),
            Route("/picture/{digest}", picture),
        ],
        middleware=[
            Middleware(TrustedHostMiddleware, allowed_hosts=NAMES, www_redirect=False),
            Middleware(OwnPageOnly),
        ],
    )


def _answer(what: Callable[[], State]) -> JSONResponse:
    """The state after it, or why nothing was changed."""
    try:
        return JSONResponse(asdict(what()))
    except Refused as error:
        return JSONResponse({"error": str(error)}, 409)
    except (UserError, RunError) as error:
        return JSONResponse({"error": str(error)}, 500)


def bind(port: int) -> socket.socket:
    """A socket on 127.0.0.1; port 0 is any free one. Raises UserError when the port is taken or not allowed."""
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((HOST, port))
    except (OSError, OverflowError) as error:
        listener.close()
        raise UserError(
            f"--port {port} cannot be used ({error}); give another one, or 0 for any that is free"
        ) from error
    listener.listen()
    return listener


def server_of(session: Session) -> uvicorn.Server:
    """What serves the page; run it over a socket of `bind`."""
    config = uvicorn.Config(
        make_app(session),
        log_level="warning",
        access_log=False,
        loop="asyncio",
        http="h11",
        ws="none",
        lifespan="off",
        timeout_graceful_shutdown=2,
    )
    return uvicorn.Server(config)


def serve(session: Session, port: int, browser: bool, say: Callable[[str], None]) -> None:
    """Serve until Ctrl-C. Raises UserError as `bind`."""
    with bind(port) as listener:
        address = f"http://{HOST}:{listener.getsockname()[1]}"
        say(f"{address}  (Ctrl-C ends; every vote is on the disk at once)")
        if browser and (sys.platform == "darwin" or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
            webbrowser.open(address)
        try:
            server_of(session).run(sockets=[listener])
        except KeyboardInterrupt:
            say("ended")
