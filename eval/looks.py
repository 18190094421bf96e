"""How pictures look, as numbers that a scorer can be fooled by: brightness, saturation, contrast, and diversity.

A preference method that only learns to please its scorer often does it by brighter, more saturated or ever more similar
pictures (reward hacking). Shifts are paired over prompts, like scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from .page import evenly
from .preprocess import decode
from .setscore import by_prompt
from .stats import Interval, Mean, bootstrap
from .study import Study

SIDE = 64  # pictures are averaged down to this: what they show, not how finely
PROMPTS, SEEDS = 100, 4  # at most, evenly through the set
MEASURES = ("brightness", "saturation", "contrast", "diversity")
ALARM = 0.1  # a shift by this share of the base's value, beyond its interval, is pointed at


@dataclass(frozen=True)
class Shift:
    """A measure of one model: its mean, and the change from the base (None for the base itself)."""

    mean: Mean
    change: float | None = None
    interval: Interval | None = None

    @property
    def alarming(self) -> bool:
        """Whether the change is certain, and large beside the base's value."""
        if self.change is None or self.interval is None:
            return False
        base = self.mean.value - self.change
        return self.interval.excludes(0.0) and abs(self.change) > ALARM * max(abs(base), 1e-9)


@dataclass(frozen=True)
class Looks:
    """Measures by model and name; over ``prompts`` prompts. Set metrics that were measured by prompt join them."""

    shifts: list[dict[str, Shift]]
    prompts: int


def measure(study: Study, threads: int = 4) -> Looks | None:
    """Looks of every model of a study, over prompts whose pictures can all be read; None when there are too few.

    brightness, saturation: means of V and S of HSV. contrast: standard deviation of luma. diversity: mean absolute
    difference of RGB between pictures of one prompt, over all their pairs; it needs two seeds or more."""
    names = [_files(study, i) for i in range(len(study.sides))]
    common = [p for p in names[0] if all(p in side for side in names)]
    chosen = [common[i] for i in evenly(common, PROMPTS)]
    jobs = [
        [[side[p][k] for k in sorted(set.intersection(*(set(s[p]) for s in names)))[:SEEDS]] for p in chosen]
        for side in names
    ]
    with ThreadPoolExecutor(threads) as pool:
        found = [list(pool.map(_prompt, side)) for side in jobs]
    whole = [n for n in range(len(chosen)) if all(side[n] is not None for side in found)]
    if len(whole) < 2:
        return None
    tables = [{m: np.array([(side[n] or {}).get(m, np.nan) for n in whole]) for m in MEASURES} for side in found]
    for name, sides in _set_metrics(study).items():
        for table, of_side in zip(tables, sides, strict=True):
            table[name] = of_side
    shifts = []
    for i, table in enumerate(tables):
        row = {}
        for name, values in table.items():
            if np.isnan(values).any():
                continue
            gains = values - tables[0][name]
            row[name] = Shift(Mean.of(values), float(gains.mean()), bootstrap(gains)) if i else Shift(Mean.of(values))
        shifts.append(row)
    return Looks(shifts, len(whole))


def look(images: Sequence[Image.Image]) -> dict[str, float]:
    """Measures of the pictures of one prompt, averaged; ``diversity`` where there are two or more."""
    small = [image.resize((SIDE, SIDE), Image.Resampling.BOX) for image in images]
    hsv = np.stack([np.asarray(image.convert("HSV"), np.float32) for image in small]) / 255
    luma = np.stack([np.asarray(image.convert("L"), np.float32) for image in small]) / 255
    found = {
        "brightness": float(hsv[..., 2].mean()),
        "saturation": float(hsv[..., 1].mean()),
        "contrast": float(luma.std((1, 2)).mean()),
    }
    if len(small) > 1:
        rgb = [np.asarray(image, np.float32) / 255 for image in small]
        pairs = [float(np.abs(rgb[i] - rgb[j]).mean()) for i in range(len(rgb)) for j in range(i)]
        found["diversity"] = float(np.mean(pairs))
    return found


def _prompt(paths: Sequence[Path]) -> dict[str, float] | None:
    try:
        return look([decode(path).image for path in paths]) if paths else None
    except (OSError, ValueError, SyntaxError):
        return None  # a picture that cannot be read has a row that says so


def _set_metrics(study: Study) -> dict[str, list[np.ndarray]]:
    """Set metrics that every model has by prompt, made alike, over the prompts they share: (n,) for each model."""
    sides = [by_prompt(side.images) for side in study.sides]
    found: dict[str, list[np.ndarray]] = {}
    for name in sides[0]:
        if all(name in side and side[name][0] == sides[0][name][0] for side in sides):
            ids = [i for i in sides[0][name][1] if all(i in side[name][1] for side in sides)]
            if len(ids) > 1:
                found[name] = [np.array([side[name][1][i] for i in ids]) for side in sides]
    return found


def _files(study: Study, place: int) -> dict[str, dict[int, Path]]:
    found: dict[str, dict[int, Path]] = {}
    for row in study.files[place].rows:
        if row.error is None:
            found.setdefault(row.id, {})[row.k] = study.sides[place].images / row.image
    return found
