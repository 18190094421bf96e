"""Checkpoints that are whole or absent: written beside, flushed to disk, then renamed; old ones pruned the same way."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .errors import RunError, UserError

PREFIX = "step-"


def checkpoint_dirs(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found = [p for p in folder.glob(f"{PREFIX}*") if (p / "state.json").is_file() and p.name[len(PREFIX) :].isdigit()]
    return sorted(found, key=lambda p: int(p.name[len(PREFIX) :]))


def write_atomic(path: Path, text: str) -> None:
    """A text file that is either the old or the new one, never half of it."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def save_checkpoint(folder: Path, step: int, tensors: dict[str, Any], facts: dict[str, Any]) -> Path:
    """``folder/step-000050`` with ``state.pt`` and ``state.json``.

    Raises RunError when the disk is full or not writable; what stood there before stays."""
    final = folder / f"{PREFIX}{step:06d}"
    temporary = folder / f".tmp-{final.name}-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        with (temporary / "state.pt").open("wb") as file:
            torch.save(tensors, file)
            file.flush()
            os.fsync(file.fileno())
        write_atomic(temporary / "state.json", json.dumps(facts, indent=1) + "\n")
        old = _hide(final) if final.exists() else None
        os.replace(temporary, final)
        _sync_folder(folder)
        if old is not None:
            shutil.rmtree(old, ignore_errors=True)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        zip_writer = "PytorchStreamWriter" in str(error) or "unexpected pos" in str(error)  # its words for a full disk
        full = error.errno in (errno.ENOSPC, errno.EDQUOT) if isinstance(error, OSError) else zip_writer
        shutil.rmtree(temporary, ignore_errors=True)
        kept = checkpoint_dirs(folder)
        last = f"the last good one is {kept[-1]}" if kept else "there is none yet"
        why = "the disk is full" if full else str(error)
        raise RunError(f"checkpoint of step {step} could not be written to {folder}: {why}; {last}") from error
    return final


def load_checkpoint(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(tensors on the CPU, facts) of a checkpoint folder. Raises UserError when it is none or torn."""
    try:
        facts = json.loads((path / "state.json").read_text())
        if not isinstance(facts, dict):
            raise ValueError("state.json holds no mapping")
        with zipfile.ZipFile(path / "state.pt") as archive:  # torch writes check sums but reads past them
            if damaged := archive.testzip():
                raise ValueError(f"{damaged} is damaged")
        tensors = torch.load(path / "state.pt", map_location="cpu", weights_only=True)
    except (
        OSError,
        ValueError,
        RuntimeError,
        LookupError,
        EOFError,
        pickle.UnpicklingError,
        zipfile.BadZipFile,
    ) as error:
        kind = type(error).__name__
        raise UserError(f"'{path}' is no readable checkpoint ({kind}); pass another to --resume") from error
    return tensors, facts


def prune(folder: Path, keep: int, spare: Sequence[int] = ()) -> None:
    """Remove all but the newest ``keep`` checkpoints, the steps in ``spare``, and leavings of broken writes."""
    for path in checkpoint_dirs(folder)[:-keep]:
        if int(path.name[len(PREFIX) :]) not in spare:
            shutil.rmtree(_hide(path), ignore_errors=True)
    for leaving in folder.glob(".tmp-*"):
        shutil.rmtree(leaving, ignore_errors=True)


def _hide(path: Path) -> Path:
    """Out of sight before it is deleted, so that a kill in the middle leaves no half checkpoint under its name."""
    hidden = path.with_name(f".tmp-old-{path.name}")
    shutil.rmtree(hidden, ignore_errors=True)
    os.replace(path, hidden)
    return hidden


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
