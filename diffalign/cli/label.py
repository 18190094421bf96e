"""The command that lets people choose: ``diffalign pairs label``."""

from __future__ import annotations

import getpass
import importlib.util
import json
from pathlib import Path
from typing import Annotated

import typer

from ..errors import UserError
from .common import AsJson, Overrides, Quiet, out
from .pairs import pairs


@pairs.command("label")
def pairs_label(
    source: Annotated[
        str, typer.Argument(help="Pairs, ranked lists or captioned pictures; a folder of samples.", metavar="SRC")
    ],
    target: Annotated[
        Path | None, typer.Argument(help="Folder of the votes and pairs; goes on there.", metavar="DST")
    ] = None,
    overrides: Overrides = None,
    labeller: Annotated[str, typer.Option(help="Who labels; your login name if not given.")] = "",
    per_prompt: Annotated[int | None, typer.Option(min=1, help="Most pairs of a prompt's pictures; all.")] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Of the page; 0: any that is free.")] = 0,
    browser: Annotated[bool, typer.Option("--open/--no-open", help="Open the page in the browser.")] = True,
    report: Annotated[bool, typer.Option("--report", help="Only say what DST holds and how people agree.")] = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Choose between two pictures of a prompt on a local page; DST is pairs to train on, complete after every vote.

    Only this machine can open the page, at 127.0.0.1. Several people may label the same pairs, one after another or at
    the same time, each under a name of their own."""
    from ..labelling.session import Session, Summary
    from ..labelling.votes import VOTES, VoteFile

    if report:
        folder = target or Path(source)
        if not (folder / VOTES).is_file():
            raise UserError(f"'{folder}' holds no {VOTES}; give the DST of an earlier `diffalign pairs label`")
    elif target is None:
        raise UserError("DST is missing: the folder where votes and pairs are to be kept")
    else:
        folder = target
        missing = [name for name in ("starlette", "uvicorn") if importlib.util.find_spec(name) is None]
        if missing:
            raise UserError(f"the labelling page needs {' and '.join(missing)}: pip install 'diffalign[label]'")
        from ..console import Console
        from ..labelling.candidates import read_candidates
        from ..labelling.server import serve
        from ..recipe import data_recipe

        console = Console(not quiet)
        changes = ["ties=keep", *(text.removeprefix("data.") for text in overrides or [])]
        found, reports = read_candidates(data_recipe(source, changes), per_prompt, console.counting("reading"))
        session = Session(folder, found, labeller or login_name())
        for read in reports:
            console.say(f"{read.source}: {read.summary()}")
        state = session.state()
        console.say(f"{state.total:,} pairs to label, {state.done:,} of them labelled by {state.labeller}")
        serve(session, port, browser, Console().say)
    summary = Summary.of(VoteFile(folder))
    print(json.dumps(summary.json(), indent=1)) if as_json else summary.render(out())


def login_name() -> str:
    """Of the person at the terminal. Raises UserError where the system does not say."""
    try:
        return getpass.getuser()
    except (OSError, KeyError) as error:
        raise UserError("the system does not say who you are; give --labeller NAME") from error
