"""Help and listings of the command line: no heavy import, an answer within half a second."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = ("torch", "diffusers", "transformers", "datasets", "accelerate", "peft", "scipy", "matplotlib", "pandas")
LISTINGS = ("methods", "recipes", "scorers", "prompts")
LIGHT = [["--help"], ["train", "--help"], *([name] for name in LISTINGS), *([name, "--json"] for name in LISTINGS)]
COMMAND = Path(sys.executable).with_name("diffalign")

# Runs the command as its script does, then says on the last line what was imported.
TRACED = f"""
import sys
from diffalign.cli import main
status = 0
try:
    main()
except SystemExit as stop:
    status = stop.code or 0
print()
print(status, *[name for name in {HEAVY!r} if name in sys.modules])
"""


@pytest.mark.parametrize("arguments", LIGHT, ids=" ".join)
def test_no_heavy_import(arguments: list[str], tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", TRACED, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    *answer, last = done.stdout.splitlines()
    assert last.split() == ["0"], done.stdout + done.stderr
    assert any(line.strip() for line in answer) and not done.stderr
    if "--json" in arguments:
        assert json.loads("\n".join(answer))


@pytest.mark.parametrize("arguments", [["--help"], ["methods"]], ids=" ".join)
def test_answers_within_half_a_second(arguments: list[str], tmp_path: Path) -> None:
    """Processor time, the best of several: the clock also counts whatever else the machine does."""
    best = float("inf")
    for _ in range(6):
        before = os.times()
        subprocess.run([COMMAND, *arguments], cwd=tmp_path, capture_output=True, check=True, timeout=60)
        after = os.times()
        spent = after.children_user + after.children_system - before.children_user - before.children_system
        best = min(best, spent)
        if best < 0.5:
            break
    assert best < 0.5
