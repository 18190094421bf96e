"""Curves: sums kept on the device, read once a logging interval; a plain log.jsonl and, by name, trackers."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .checkpoint import write_atomic
from .errors import UserError
from .recipe import OutputRecipe


class Meter:
    """Weighted sums by name on the device; ``read`` is the one synchronisation of a logging interval."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}

    def add(self, name: str, value: Tensor, weight: Tensor) -> None:
        """Add a weighted sum and its weight (scalars)."""
        pair = torch.stack([value.detach().float(), weight.detach().float()])
        self.sums[name] = self.sums[name] + pair if name in self.sums else pair

    def read(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Means since the last reading, over all processes; those without weight or not finite are left out."""
        if not self.sums:
            return {}
        names = sorted(self.sums)
        table = reduce(torch.stack([self.sums[n] for n in names])).tolist()
        self.sums = {}
        means = {name: total / weight for name, (total, weight) in zip(names, table, strict=True) if weight > 0}
        return {name: mean for name, mean in means.items() if math.isfinite(mean)}  # JSON knows no others


class RunLog:
    """``log.jsonl`` in the run's folder and the trackers asked for; written by rank 0 alone."""

    def __init__(self, folder: Path, output: OutputRecipe, name: str, resumed_step: int | None) -> None:
        self.path = folder / "log.jsonl"
        self.rows: list[dict[str, Any]] = []
        if resumed_step is not None:
            self.rows = [row for row in read_log(self.path) if row["step"] <= resumed_step]
        write_atomic(self.path, "".join(json.dumps(row) + "\n" for row in self.rows))
        self._file = self.path.open("a")
        self._trackers = [_tracker(kind, folder, name, resumed_step) for kind in _wanted(output)]

    def write(self, step: int, values: Mapping[str, float], kind: str = "train") -> dict[str, Any]:
        """One row: step, kind, seconds since the epoch, and the values."""
        row = {"step": step, "kind": kind, "time": round(time.time(), 3), **values}
        self.rows.append(row)
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        for tracker in self._trackers:
            tracker.write(step, {f"{kind}/{name}": value for name, value in values.items()})
        return row

    def event(self, step: int, guard: str, text: str, policy: str) -> None:
        """A guard that fired, as a row of kind ``guard``."""
        row = {"step": step, "kind": "guard", "time": round(time.time(), 3), "guard": guard, "text": text}
        self.rows.append(row | {"policy": policy})
        self._file.write(json.dumps(self.rows[-1]) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Everything on disk, before a checkpoint says that it is."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """End of the run."""
        with suppress(OSError):  # a full disk was reported by the write; closing would report it again
            self._file.close()
        for tracker in self._trackers:
            tracker.close()


def read_log(path: Path) -> list[dict[str, Any]]:
    """Rows of a log.jsonl; a last line torn by a kill is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def _wanted(output: OutputRecipe) -> list[str]:
    if output.trackers == "auto":
        return ["tensorboard"] if importlib.util.find_spec("tensorboard") else []
    return list(output.trackers)


def check_trackers(output: OutputRecipe) -> None:
    """Raises UserError when the package of a tracker is missing."""
    for kind in _wanted(output):
        if importlib.util.find_spec(kind) is None:
            raise UserError(
                f"output.trackers names '{kind}', which is not installed; pip install {kind} or take it out"
            )


@dataclass
class Tracker:
    """Where curves go besides log.jsonl."""

    write: Callable[[int, Mapping[str, float]], None]
    close: Callable[[], object]


def _tracker(kind: str, folder: Path, name: str, resumed_step: int | None) -> Tracker:
    """A tracker by name."""
    if kind == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        # points after the checkpoint that a resumed run starts from are drawn again
        purge = None if resumed_step is None else resumed_step + 1
        writer = SummaryWriter(str(folder / "tensorboard"), purge_step=purge)

        def to_tensorboard(step: int, values: Mapping[str, float]) -> None:
            for key, value in values.items():
                writer.add_scalar(key, value, step)

        return Tracker(to_tensorboard, writer.close)
    module = importlib.import_module(kind)  # wandb and trackio share these three calls
    module.init(project="diffalign", name=name)
    return Tracker(lambda step, values: module.log(dict(values), step=step), module.finish)
