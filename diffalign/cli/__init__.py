"""The command line. Commands import what they need when they run; nothing heavy is imported for help and listings.

One module a group of commands; importing it registers them on the app, in the order of ``--help``.
"""

from __future__ import annotations

import os
import sys
import warnings
from typing import Annotated, Any, NoReturn

import typer

from .. import __version__
from ..errors import Note, RunError, UserError

# help shows the commands in this order
# isort: off
from . import train, judge, export, pairs, makes, label, lists, doctor, demo, bench  # noqa: F401

# isort: on
from .common import app, is_main


def show_version(wanted: bool) -> None:
    """``--version``."""
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", callback=show_version, is_eager=True, help="Show it.")] = False,
) -> None:
    """Align and distil text-to-image diffusion models, and judge the result."""


def stop(message: str, status: int) -> NoReturn:
    """One line on stderr and the exit status."""
    if is_main():
        print(f"diffalign: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(status)


def show_notes() -> None:
    """The project's own warnings in one line, without the place in the code."""
    plain = warnings.formatwarning

    def shown(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> str:
        return f"note: {message}\n" if issubclass(category, Note) else plain(message, category, *where, **more)

    warnings.formatwarning = shown


def main() -> None:
    """Entry point: 0 done, 2 wrong input, 1 failure while running, 130 interrupted."""
    show_notes()
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    usage = typer.BadParameter.__bases__[0]  # click's UsageError, wherever this typer keeps it
    try:
        status = app(standalone_mode=False)
    except UserError as error:
        stop(str(error), 2)
    except RunError as error:
        stop(str(error), error.exit_status)
    except usage as error:  # type: ignore[misc]
        if type(error).__name__ == "NoArgsIsHelpError":
            print(error.ctx.get_help())
            sys.exit(0)
        where = f" (see {error.ctx.command_path} --help)" if error.ctx else ""
        stop(error.format_message() + where, 2)
    except (KeyboardInterrupt, typer.Abort):
        stop("interrupted", 130)
    sys.exit(status if isinstance(status, int) else 0)
