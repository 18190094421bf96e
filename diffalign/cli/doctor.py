"""What this machine can run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from .common import AsJson, app, out


@app.command()
def doctor(
    cache: Annotated[Path | None, typer.Option(help="Cache folder; the usual one if not given.")] = None,
    output: Annotated[Path, typer.Option("--out", help="Where runs will be written.")] = Path("runs"),
    thorough: Annotated[bool, typer.Option("--thorough", help="Read all of the cache, not only its headers.")] = False,
    limit: Annotated[float, typer.Option(help="Seconds that each thing tried may take.", min=1)] = 180,
    as_json: AsJson = False,
) -> None:
    """Look at packages, GPU, disk, cache and hub, and say how to mend what is wrong. Exit status 1 on an error."""
    from ..doctor import examine

    report = examine(cache, output, thorough, limit)
    print(json.dumps(report.json(), indent=1)) if as_json else report.render(out())
    raise typer.Exit(report.exit_status)
