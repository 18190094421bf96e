"""The judge of the tiny world (DESIGN 9): how a model draws the held-out prompts, and what it must not lose.

Noise is fixed by seed and prompt, so that every model is paired with every other, the base among them.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import RunError
from ..eval.looks import look
from ..eval.prompts import Prompt, read_prompts
from ..eval.rows import read_rows
from ..eval.score import score_images
from ..eval.scorers import load_scorers
from ..facts import recorded
from ..pipelines.sample import SampleSpec, sample

HELD, SINGLE = "tiny-heldout", "tiny-single"
HELD_SEED, SINGLE_SEED, PER_SINGLE = 500, 900, 6
STEPS, GUIDANCE, BATCH = 20, 3.0, 31
PRIMARY, IN_LOOP, HELD_OUT = "oracle", "tiny-pickscore", ("tiny-hps", "tiny-clip")  # tiny-pickscore labelled the pairs
SCORERS = (PRIMARY, IN_LOOP, *HELD_OUT)
ASSETS = ("tiny-oracle", "tiny-pickscore", "tiny-hps", "tiny-clip", "prompts")  # what a judgement depends on


@dataclass(frozen=True)
class Judged:
    """``scores``: by scorer, one number for each held-out prompt of ``ids``; the oracle's are 1 or 0. ``shapes`` (share
    right) and ``diversity`` (mean absolute difference of RGB within a prompt, in [0, 1]) are of single objects."""

    ids: list[str]
    scores: dict[str, list[float]]
    shapes: float
    diversity: float
    steps: int
    guidance: float

    @property
    def right(self) -> np.ndarray:
        """1 where all is right, else 0: (N,) float64."""
        return np.array(self.scores[PRIMARY], np.float64)

    def json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def judge(model: str, folder: Path, prompts: int | None = None, scorers: tuple[str, ...] = SCORERS) -> Judged:
    """One sampling pass of ``model`` (a folder, a built-in name or a run's folder) on the CPU, scored.

    A few-step student is drawn as it records it, anything else by 20 steps of DDIM at guidance 3. The pictures stay in
    ``folder``/held and ``folder``/single. ``prompts``: only the first so many of each list.

    Raises UserError as `sample` and `score_images` do."""
    held, single = read_prompts(HELD)[:prompts], read_prompts(SINGLE)[:prompts]
    record = recorded(model)
    steps, guidance = (record.steps, record.guidance) if record else (STEPS, GUIDANCE)
    loaded = load_scorers(",".join(scorers), "cpu")

    def drawn(name: str, rows: list[Prompt], seed: int, each: int) -> Path:
        spec = SampleSpec(model, seed=seed, per_prompt=each, batch=BATCH, device="cpu", dtype="fp32")
        spec = spec if record else replace(spec, steps=STEPS, guidance=GUIDANCE)
        sample(spec, rows, folder / name, progress=False)
        return folder / name

    place = drawn("held", held, HELD_SEED, 1)
    score_images(place, None, loaded, place / "scores.jsonl", progress=False)
    values: dict[str, dict[str, float]] = {name: {} for name in scorers}
    for row in read_rows(place / "scores.jsonl"):
        if row.value is None:
            raise RunError(f"{row.scorer} has no score for {row.id}: {row.image} cannot be read; remove '{place}'")
        values[row.scorer][row.id] = float(row.value)
    ids = [p.id for p in held]

    place = drawn("single", single, SINGLE_SEED, PER_SINGLE)
    oracle = [scorer for scorer in loaded if scorer.name == PRIMARY]
    score_images(place, None, oracle, place / "scores.jsonl", progress=False)
    rows = read_rows(place / "scores.jsonl")
    shapes = float(np.mean([row.parts["shapes"] for row in rows]))
    pictures = {p.id: [place / row.image for row in rows if row.id == p.id] for p in single}
    diversity = float(np.mean([look(opened(files))["diversity"] for files in pictures.values()]))
    scores = {name: [found[i] for i in ids] for name, found in values.items()}
    return Judged(ids, scores, shapes, diversity, steps, guidance)


def opened(files: list[Path]) -> list[Any]:
    """Pictures as RGB images."""
    from PIL import Image

    return [Image.open(file).convert("RGB") for file in files]
