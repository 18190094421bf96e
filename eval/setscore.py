"""Metrics of whole sets for a folder of pictures: measured once, kept beside the scores, read by the report."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError
from .sets import list_sets, load_set

if TYPE_CHECKING:
    from rich.console import Console

    from .sets._base import SetMetric, SetResult

FILE = "sets.json"


@dataclass
class SetScores:
    """What was measured, in the order that was asked for, and where it is kept."""

    out: Path
    results: list[SetResult]

    def render(self, console: Console) -> None:
        """A short table for a person."""
        from rich.table import Table

        table = Table("metric", "value", "pictures", "what it is")
        for r in self.results:
            pictures = f"{r.count} and {r.reference_count}" if r.reference_count else str(r.count)
            about = list_sets()[r.name]
            table.add_row(r.name, f"{r.value:.4f}", pictures, f"{about.about} ({about.better} is better)")
        console.print(table)
        for r in self.results:
            if r.errors:
                console.print(f"{r.name}: {len(r.errors)} pictures left out (first: {': '.join(r.errors[0])})")
        console.print(f"metrics: {self.out}", highlight=False)


def load_sets(
    metrics: str | Sequence[str], reference: str | Path | None = None, device: str = "auto", dtype: str = "auto"
) -> list[SetMetric]:
    """The metrics of ``"diversity_clip,fid"`` (or ``name=WEIGHTS``), with their weights.

    Raises UserError: unknown metrics, missing weights, extras, or a reference that a metric needs."""
    names = metrics.split(",") if isinstance(metrics, str) else list(metrics)
    names = [name.strip() for name in names if name.strip()]
    if not names:
        raise UserError(f"no set metric given; choose from {', '.join(list_sets())}")
    loaded = [load_set(name, None, device, dtype) for name in names]
    for metric in loaded:
        if metric.about.needs == "reference" and reference is None:
            raise UserError(
                f"set metric '{metric.name}' needs other pictures to compare with: `diffalign sets --reference FOLDER`"
            )
    return loaded


def measure_sets(
    images: str | Path,
    metrics: str | Sequence[str],
    reference: str | Path | None = None,
    out: str | Path | None = None,
    device: str = "auto",
    dtype: str = "auto",
) -> SetScores:
    """Measure ``"diversity_clip,fid"`` (or ``name=WEIGHTS``) of the pictures that `diffalign score` would score.

    ``reference``: for metrics that compare with other pictures. ``out``: default ``sets.json`` in the folder of the
    pictures; other metrics that it holds stay.

    Raises:
        UserError: unknown metrics, missing weights, extras or references, or pictures that cannot be read.
    """
    return measure(images, load_sets(metrics, reference, device, dtype), reference, out)


def measure(
    images: str | Path,
    metrics: Sequence[SetMetric],
    reference: str | Path | None = None,
    out: str | Path | None = None,
) -> SetScores:
    """`measure_sets` by metrics that are loaded already."""
    place = Path(images)
    target = Path(out) if out else (place if place.is_dir() else place.parent) / FILE
    known = read_sets(target)
    results = [metric(images, reference if metric.about.needs == "reference" else None) for metric in metrics]
    known |= {r.name: asdict(r) for r in results}
    partial = target.with_name(target.name + ".tmp")
    try:
        partial.write_text(json.dumps(known, indent=1, default=str) + "\n", encoding="utf-8")
        os.replace(partial, target)
    except OSError as error:
        raise UserError(f"cannot write '{target}' ({error.strerror}); choose another place with --out") from error
    return SetScores(target, results)


def read_sets(path: Path) -> dict[str, dict[str, object]]:
    """What was measured before, by name; empty where there is no such file. Raises UserError when it is none."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not all("value" in entry for entry in found.values()):
            raise ValueError("no values")
    except (ValueError, AttributeError, TypeError) as error:
        raise UserError(f"'{path}' holds no set metrics ({error}); delete it and measure again") from error
    return dict(found)


def by_prompt(folder: Path) -> dict[str, tuple[object, dict[str, float]]]:
    """Metrics with a value for each prompt: name -> (fingerprint, value by prompt id)."""
    found: dict[str, tuple[object, dict[str, float]]] = {}
    for name, entry in read_sets(folder / FILE).items():
        groups = entry.get("by_group")
        if isinstance(groups, dict) and groups:
            values = {str(k): float(v) for k, v in groups.items() if math.isfinite(v)}
            found[name] = (entry.get("fingerprint"), values)
    return found
