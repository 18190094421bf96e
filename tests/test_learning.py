"""Seen to learn: Diffusion-DPO beside shuffled labels, on pairs of one plain difference, and, slowly, on the tiny
world, by held-out pairs and by the oracle."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import diffalign
from diffalign.bench.judge import judge
from diffalign.bench.methods import Plan, measure_methods
from diffalign.eval.stats import bootstrap
from diffalign.run import Run


def train(out: Path, seed: int, recipe: str = "tiny/dpo", **values: object) -> Run:
    quiet = {"validate.images": 1, "output.trackers": []}
    return diffalign.train(recipe, progress=False, **{"seed": seed, "output.dir": str(out), **quiet, **values})


def write_warm_and_cold(folder: Path, count: int = 64) -> Path:
    """Pairs under one prompt whose winner has warm colours and whose loser cold ones."""
    folder.mkdir()
    lines = []
    for i in range(count):
        names = {"chosen": f"{i}-warm.png", "rejected": f"{i}-cold.png"}
        for k, (name, tint) in enumerate(zip(names.values(), ((1.0, 0.6, 0.3), (0.3, 0.6, 1.0)), strict=True)):
            cells = np.random.default_rng([i, k]).uniform(0.5, 1, (4, 4, 3)) * tint
            picture = Image.fromarray((cells * 255).astype(np.uint8))
            picture.resize((64, 64), Image.Resampling.NEAREST).save(folder / name)
        lines.append(json.dumps({"prompt": "a picture", **names}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def test_dpo_learns_which_pictures_win(tmp_path: Path) -> None:
    """From the recipe to held-out pairs: the shipped model learns to prefer warm pictures, and nothing from a coin."""
    data = write_warm_and_cold(tmp_path / "pairs")
    short = {"steps": 10, "batch": 8, "lr": 4e-3, "warmup": 0, "data.path": str(data), "save_every": 100}
    short |= {"validate.every": 100, "validate.pairs": 32, "validate.draws": 1, "validate.steps": 1}
    accuracy = {}
    for shuffled in (False, True):
        run = train(tmp_path / str(shuffled), 0, shuffle_labels=shuffled, **short)
        accuracy[shuffled] = run.curve("accuracy", "validate")[-1][1]
        assert run.curve("loss", "validate")[0][1] == pytest.approx(np.log(2), abs=1e-5)
    assert accuracy[False] > 0.8 and abs(accuracy[True] - 0.5) < 0.2, accuracy


@pytest.mark.slow
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


@pytest.mark.slow
def test_dpo_raises_the_oracle_on_unseen_combinations(tmp_path: Path) -> None:
    report = measure_methods(Plan(tmp_path, only=("shuffled", "dpo"), say=print))
    print(report.markdown())
    rows = {row.name: row for row in report.rows}
    assert rows["dpo"].verdict == "learning", rows["dpo"].why
    shuffled = rows["shuffled"].gain
    assert shuffled is not None and shuffled.low <= 0


@pytest.mark.slow
def test_dpo_aligns_the_tiny_sdxl(tmp_path: Path) -> None:
    torch.set_num_threads(2)
    run = train(tmp_path / "run", 0, recipe="tiny/sdxl-dpo")
    base = judge("tiny-sdxl", tmp_path / "base", scorers=("oracle",))
    tuned = judge(str(run.dir), tmp_path / "dpo", scorers=("oracle",))
    gain = tuned.right - base.right
    interval = bootstrap(gain)
    print(
        f"\ntiny-sdxl: right {base.right.mean():.3f} -> {tuned.right.mean():.3f}, gain {gain.mean():+.3f} "
        f"[{interval.low:+.3f}, {interval.high:+.3f}], single shapes {base.shapes:.3f} -> {tuned.shapes:.3f}"
    )
    assert interval.low > 0 and base.shapes - tuned.shapes <= 0.03
