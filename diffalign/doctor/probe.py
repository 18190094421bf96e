"""Tries things out in a process of its own, so that what is broken is found and not fallen over."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from typing import Any

LIMIT = 180.0  # seconds; a cold import from a slow disk takes a minute


@dataclass(frozen=True)
class Probe:
    """``facts`` is what the code printed as JSON in its last line; ``fault`` why it did not, in a line."""

    facts: dict[str, Any] = field(default_factory=dict)
    fault: str = ""
    said: str = ""

    @property
    def ok(self) -> bool:
        """Whether the code ran to its end."""
        return not self.fault


def try_out(code: str, *args: str, limit: float = LIMIT) -> Probe:
    """Runs Python code with ``sys.argv[1:] = args`` under this interpreter, with a time limit."""
    environment = {**os.environ, "TRANSFORMERS_VERBOSITY": "error", "DIFFUSERS_VERBOSITY": "error"}
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-c", code, *args],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=limit,
            env=environment,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired:
        return Probe(fault=f"did not answer within {limit:g} s")
    except OSError as error:
        return Probe(fault=f"cannot be started ({error.strerror})")
    if done.returncode < 0:
        return Probe(fault=f"crashed ({signal.Signals(-done.returncode).name})", said=done.stderr)
    if done.returncode:
        return Probe(fault=last_line(done.stderr) or f"exit status {done.returncode}", said=done.stderr)
    try:
        facts = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        return Probe(fault="printed nothing that can be read", said=done.stderr)
    return Probe(facts, said=done.stderr)


def last_line(text: str) -> str:
    """The exception of a traceback, cut to a line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " ".join(lines[-1].split())[:200] if lines else ""
