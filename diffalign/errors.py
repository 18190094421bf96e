"""The errors a person sees, each with its exit status (DESIGN 6)."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

LONGEST = 1200  # characters of a line; what a person typed can be of any length


class UserError(Exception):
    """The input is wrong: exit status 2. The message is one line that says what, where, and how to mend it."""

    exit_status = 2

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


class RunError(Exception):
    """A failure while running: exit status 1. The message says what was saved and how to go on."""

    exit_status = 1


class Interrupted(RunError):
    """Stopped by a signal after a checkpoint: exit status 130."""

    exit_status = 130


class Note(UserWarning):
    """Something a person should know that stops nothing; the command line shows it in one line."""


def one_line(text: str) -> str:
    """The text without line breaks and control characters, its middle cut out where it is very long."""
    plain = "".join(c if c.isprintable() else " " for c in text)
    return plain if len(plain) <= LONGEST else f"{plain[: LONGEST // 2]} ... {plain[-LONGEST // 2 :]}"


def nearest(name: str, options: Iterable[str]) -> str:
    """A hint ``; did you mean 'x'?`` for the closest of ``options``, or the options themselves when none is close."""
    known = sorted(options)
    swapped = [option for option in known if sorted(option) == sorted(name)]  # letters in another order come first
    close = swapped or difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if close:
        return f"; did you mean '{close[0]}'?"
    shown = ", ".join(known[:12]) + (", ..." if len(known) > 12 else "")
    return f"; known: {shown}" if known else ""
