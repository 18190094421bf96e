"""Seen to learn: Diffusion-DPO on the tiny world beside shuffled labels, by held-out pairs and by the oracle."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import torch

import diffalign
from diffalign.eval.oracle import Oracle
from diffalign.eval.prompts import Prompt, read_prompts
from diffalign.eval.stats import bootstrap
from diffalign.pipelines.sample import SampleSpec, sample
from diffalign.run import Run

SEEDS = (0, 1, 2)


def train(out: Path, seed: int, **values: object) -> Run:
    quiet = {"validate.images": 1, "output.trackers": []}
    return diffalign.train("tiny/dpo", progress=False, **{"seed": seed, "output.dir": str(out), **quiet, **values})


def test_dpo_learns_what_shuffled_labels_do_not_teach(tmp_path: Path) -> None:
    # 250 pairs x 8 draws: held-out accuracy is sure to about 0.02
    short = {"steps": 100, "validate.every": 100, "validate.pairs": 250, "validate.draws": 8, "save_every": 100}
    accuracy = {}
    for shuffled in (False, True):
        run = train(tmp_path / str(shuffled), 0, shuffle_labels=shuffled, **short)
        accuracy[shuffled] = run.curve("accuracy", "validate")[-1][1]
        assert run.curve("loss", "validate")[0][1] == pytest.approx(np.log(2), abs=1e-5)
    # seen: 0.55 to 0.58 against 0.47 to 0.50; a wrong sign or swapped members end below one half
    assert accuracy[False] > 0.53 and accuracy[False] > accuracy[True] + 0.03, accuracy


def draw(
    folder: Path, prompts: list[Prompt], run: Run | None, seed: int, per_prompt: int = 1, model: str = "tiny-sd"
) -> list[Path]:
    spec = SampleSpec(
        model, str(run.dir) if run else None, steps=20, guidance=3.0, seed=seed, per_prompt=per_prompt, batch=31
    )
    sample(spec, prompts, folder, progress=False)
    return sorted((folder / "images").glob("*.png"))


def pictures(files: list[Path]) -> np.ndarray:
    from PIL import Image

    return np.stack([np.asarray(Image.open(file)) for file in files])


def judged(folder: Path, run: Run | None, model: str = "tiny-sd") -> tuple[np.ndarray, float, float]:
    """(right (N,) on held-out prompts, single-object shape accuracy, single-object diversity)."""
    oracle = Oracle.from_pretrained(str(resources.files("diffalign.assets") / "tiny-oracle"))
    held, single = read_prompts("tiny-heldout"), read_prompts("tiny-single")
    right = oracle.judge(pictures(draw(folder / "held", held, run, 500, model=model)), [p.prompt for p in held])["all"]
    alone = pictures(draw(folder / "single", single, run, 900, per_prompt=6, model=model))
    shapes = oracle.judge(alone, [p.prompt for p in single for _ in range(6)])["shapes"]
    rows = alone.reshape(len(single), 6, -1).astype(np.float32) / 255
    apart = [np.abs(rows[:, i] - rows[:, j]).mean(1) for i in range(6) for j in range(i)]
    return right.astype(np.float64), float(shapes.mean()), float(np.mean(apart))


@pytest.mark.slow
def test_dpo_raises_the_oracle_on_unseen_combinations(tmp_path: Path) -> None:
    torch.set_num_threads(2)
    base, shape, diversity = judged(tmp_path / "base", None)
    print(f"\nbase: right {base.mean():.3f} of {len(base)}, single shapes {shape:.3f}, diversity {diversity:.3f}")
    gains: dict[bool, list[np.ndarray]] = {False: [], True: []}
    for seed in SEEDS:
        for shuffled in (False, True):
            name = f"{'shuffled' if shuffled else 'dpo'}-{seed}"
            run = train(tmp_path / name / "run", seed, shuffle_labels=shuffled)
            right, shape_now, diversity_now = judged(tmp_path / name, run)
            gains[shuffled].append(right - base)
            interval = bootstrap(right - base)
            print(
                f"{name}: right {right.mean():.3f}, gain {(right - base).mean():+.3f} "
                f"[{interval.low:+.3f}, {interval.high:+.3f}], "
                f"single shapes {shape_now:.3f}, diversity {diversity_now:.3f}",
                flush=True,
            )
            if not shuffled:
                assert (right - base).mean() > 0
                assert shape - shape_now <= 0.03 and diversity - diversity_now <= 0.03
    over_base = np.mean(gains[False], 0)
    over_control = over_base - np.mean(gains[True], 0)
    for what, gain in (("base", over_base), ("shuffled labels", over_control)):
        interval = bootstrap(gain)
        print(f"pooled over {what}: {gain.mean():+.3f} [{interval.low:+.3f}, {interval.high:+.3f}]")
        assert interval.low > 0, what
    for seed, (true, control) in enumerate(zip(gains[False], gains[True], strict=True)):
        assert (true - control).mean() > 0, f"seed {seed}"


@pytest.mark.slow
def test_dpo_aligns_the_tiny_sdxl(tmp_path: Path) -> None:
    torch.set_num_threads(2)
    base, shape, _ = judged(tmp_path / "base", None, "tiny-sdxl")
    quiet = {"validate.images": 1, "output.trackers": [], "output.dir": str(tmp_path / "run")}
    run = diffalign.train("tiny/sdxl-dpo", progress=False, **quiet)
    right, shape_now, _ = judged(tmp_path / "dpo", run, "tiny-sdxl")
    interval = bootstrap(right - base)
    print(
        f"\ntiny-sdxl: right {base.mean():.3f} -> {right.mean():.3f}, gain {(right - base).mean():+.3f} "
        f"[{interval.low:+.3f}, {interval.high:+.3f}], single shapes {shape:.3f} -> {shape_now:.3f}"
    )
    assert interval.low > 0 and shape - shape_now <= 0.03
