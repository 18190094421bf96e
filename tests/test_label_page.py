"""The labelling page's server over real HTTP, and the command around it: what it gives, refuses, and how it ends."""

from __future__ import annotations

import http.client
import io
import json
import re
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from command import diffalign, start
from PIL import Image
from small import picture, write_pairs
from test_label import COUNT, lines_of, pairs_of

pytest.importorskip("starlette", reason="needs the extra [label]")

from label_server import served

from diffalign.labelling.session import Session

JSON = {"Content-Type": "application/json"}


class Client:
    """Requests to one port, with whatever headers."""

    def __init__(self, port: int, folder: Path) -> None:
        self.port, self.folder = port, folder

    def ask(self, path: str, body: Any = None, **headers: str) -> tuple[int, dict[str, str], bytes]:
        """(status, headers, body); POST where there is a body."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        sent = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.putrequest("GET" if sent is None else "POST", path, skip_host="Host" in named)
        for name, value in (named if sent is None else {**JSON, "Content-Length": str(len(sent)), **named}).items():
            connection.putheader(name, value)
        connection.endheaders(sent)
        answer = connection.getresponse()
        found = answer.status, dict(answer.getheaders()), answer.read()
        connection.close()
        return found

    def state(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.ask("/state")[2])
        return found


@pytest.fixture
def client(tmp_path: Path) -> Iterator[Client]:
    session = Session(tmp_path / "out", pairs_of(write_pairs(tmp_path / "pairs", COUNT)), "ann")
    with served(session) as port:
        yield Client(port, tmp_path / "out")


def test_a_vote_over_http_is_on_the_disk_before_the_answer(client: Client) -> None:
    state = client.state()
    assert (state["labeller"], state["done"], state["total"], len(state["ahead"])) == ("ann", 0, COUNT, 3)
    status, headers, data = client.ask(f"/picture/{state['pair']['left']}")
    assert (status, headers["content-type"]) == (200, "image/png") and Image.open(io.BytesIO(data)).size == (64, 64)
    assert "immutable" in headers["cache-control"]
    for place, vote in enumerate(("left", "tie")):
        shown = client.state()["pair"]
        status, _, data = client.ask("/vote", {"pair": shown["id"], "vote": vote})
        assert status == 200 and json.loads(data)["done"] == place + 1
        assert lines_of(client.folder / "votes.jsonl")[-1]["vote"] == vote
    status, _, data = client.ask("/vote", {"pair": shown["id"], "vote": "right"})
    assert status == 409 and "labelled already" in json.loads(data)["error"]
    assert client.ask("/vote", {"pair": shown["id"], "vote": "undo"})[0] == 200
    assert client.state()["pair"]["id"] == shown["id"]
    assert [line["vote"] for line in lines_of(client.folder / "votes.jsonl")] == ["left", "tie", "undo"]


def test_the_page_needs_nothing_from_elsewhere(client: Client) -> None:
    seen = ""
    for path, kind in (("/", "text/html"), ("/page.css", "text/css"), ("/page.js", "text/javascript")):
        status, headers, data = client.ask(path)
        assert status == 200 and headers["content-type"].startswith(kind)
        assert "default-src 'none'" in headers["content-security-policy"]
        assert headers["cross-origin-resource-policy"] == "same-origin"
        seen += data.decode()
    assert not re.search(r"https?:|//[a-z]+\.|@import|url\(", seen)
    assert "tiny" not in seen and "model" not in seen.lower()


def test_other_hosts_and_other_sites_are_refused(client: Client) -> None:
    pair = client.state()["pair"]["id"]
    vote = {"pair": pair, "vote": "left"}
    for host in ("evil.example", "evil.example:80", "127.0.0.1.evil.example", "", "10.0.0.1"):
        assert client.ask("/state", Host=host)[0] == 400, host
        assert client.ask("/vote", vote, Host=host)[0] == 400, host
    refused: list[dict[str, str]] = [
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": f"http://127.0.0.1:{client.port + 1}"},
        {"Sec_Fetch_Site": "cross-site"},
        {"Sec_Fetch_Site": "same-site"},
        {"Content_Type": "text/plain"},
    ]
    for headers in refused:
        assert client.ask("/vote", vote, **headers)[0] == 403, headers
    assert (client.folder / "votes.jsonl").read_bytes() == b""
    assert client.ask("/vote", vote, Origin=f"http://127.0.0.1:{client.port}", Sec_Fetch_Site="same-origin")[0] == 200
    shown = client.state()["pair"]["id"]
    tunnel = {"Host": "localhost:9000", "Origin": "http://localhost:9000"}  # ssh -L 9000:127.0.0.1:PORT
    assert client.ask("/vote", {"pair": shown, "vote": "left"}, **tunnel)[0] == 200


def test_nothing_but_listed_pictures_is_given(client: Client) -> None:
    for path in ("votes.jsonl", "../votes.jsonl", "..%2fvotes.jsonl", "%2e%2e/%2e%2e/etc/passwd", "0" * 32, "", "a/b"):
        assert client.ask(f"/picture/{path}")[0] == 404, path
    for path in ("/votes.jsonl", "/session.py", "/images/", "/../session.py", "//etc/passwd"):
        assert client.ask(path)[0] == 404, path
    assert client.ask("/vote")[0] == 405
    for body in (b"", b"{", b"[]", b'"x"', b'{"pair": 1, "vote": "left"}', b'{"pair": "x"}'):
        assert client.ask("/vote", body)[0] == 400, body
    assert client.ask("/vote", {"pair": "x", "vote": "left"})[0] == 409


def test_pictures_that_browsers_do_not_know(tmp_path: Path) -> None:
    source = write_pairs(tmp_path / "pairs", 1)
    picture(5).save(source / "0-a.png", "TIFF")
    picture(6).save(source / "0-b.png", "WEBP", lossless=True)
    with served(Session(tmp_path / "out", pairs_of(source), "ann")) as port:
        client = Client(port, tmp_path / "out")
        pair = client.state()["pair"]
        found = {}
        for side in ("left", "right"):
            _, headers, data = client.ask(f"/picture/{pair[side]}")
            found[headers["content-type"]] = Image.open(io.BytesIO(data)).convert("RGB")
    assert found.keys() == {"image/png", "image/webp"}
    assert found["image/png"].tobytes() == picture(5).tobytes()


def test_a_file_damaged_meanwhile_is_told_and_mended(client: Client) -> None:
    shown = client.state()["pair"]["id"]
    file = client.folder / "votes.jsonl"
    file.write_text('{"torn')
    for status, _, data in (client.ask("/state"), client.ask("/vote", {"pair": shown, "vote": "left"})):
        assert status == 500 and "line 1 is torn or no JSON" in json.loads(data)["error"]
    assert file.read_text() == '{"torn'
    file.write_text("")
    assert client.ask("/vote", {"pair": shown, "vote": "left"})[0] == 200


def test_the_command_serves_here_alone_and_ends_with_ctrl_c(tmp_path: Path) -> None:
    source, out = write_pairs(tmp_path / "pairs", 3), tmp_path / "out"
    command = ["pairs", "label", source, out, "--labeller", "ann", "--no-open", "data.cache=false"]
    child = start(*command)
    end = time.monotonic() + 300
    while not (found := re.search(r"http://127\.0\.0\.1:(\d+)", child.err())):
        assert child.running() and time.monotonic() < end, child.err()
        time.sleep(0.05)
    port = int(found[1])
    client = Client(port, out)
    while not client.state()["pair"]:
        time.sleep(0.05)
    client.ask("/vote", {"pair": client.state()["pair"]["id"], "vote": "left"})
    taken = diffalign(*command, "--port", port, timeout=300)
    assert taken.status == 2 and f"--port {port} cannot be used" in taken.err
    addresses = {info[4][0] for info in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)}
    for address in addresses - {"127.0.0.1"}:
        with socket.socket() as probe:
            assert probe.connect_ex((str(address), port)), f"open at {address}, too"
    child.send(signal.SIGINT)
    done = child.wait(300)
    assert done.status == 0 and "Traceback" not in done.err, done.err
    assert "1 pairs, 0 of them ties" in done.out
    assert len(lines_of(out / "votes.jsonl")) == len(lines_of(out / "metadata.jsonl")) == 1
