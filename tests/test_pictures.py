"""Sheets of samples: what their statistics say, and pictures found again in them for the report."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small import log_of, picture, settings, write_pairs

from diffalign.eval.page import Sheet
from diffalign.eval.training_report import best_step, read_training, sample_rows
from diffalign.pictures import picture_statistics, write_sheet
from diffalign.recipe import load_recipe
from diffalign.run import train


def flat(*colour: int) -> Image.Image:
    return Image.new("RGB", (100, 80), colour)


def test_statistics_of_known_pictures() -> None:
    found = picture_statistics([flat(255, 0, 0), flat(255, 255, 255), flat(0, 0, 0), flat(0, 0, 0)], 2)
    # red and white differ in two of three channels; black and black not at all
    assert found["diversity"] == pytest.approx((2 / 3 + 0) / 2)
    assert found["brightness"] == pytest.approx(0.5) and found["saturation"] == pytest.approx(0.25)
    assert "diversity" not in picture_statistics([flat(255, 0, 0)])
    three = picture_statistics([flat(0, 0, 0), flat(255, 255, 255), flat(0, 0, 0)], 3)
    assert three["diversity"] == pytest.approx(2 / 3)
    # pixel noise is averaged away, what a picture shows is not
    noise = [Image.fromarray(np.random.default_rng(i).integers(0, 256, (512, 512, 3), dtype=np.uint8)) for i in (0, 1)]
    assert (
        picture_statistics(noise, 2)["diversity"] < 0.06 < picture_statistics([picture(1), picture(2)], 2)["diversity"]
    )


def test_a_sheet_knows_its_pictures(tmp_path: Path) -> None:
    images = [picture(i) for i in range(5)]
    write_sheet(images, ["a", "a", "b & c", "b & c", "d"], tmp_path / "step-000000.png")
    write_sheet(images[::-1], ["a", "a", "b & c", "b & c", "d"], tmp_path / "step-000010.png")
    sheets = [Sheet(path.stem, path) for path in sorted(tmp_path.glob("*.png"))]
    rows = sample_rows(sheets)
    assert [row.prompt for row in rows] == ["a", "b & c", "d"] and [len(c) for c in rows[2].cells] == [1, 1]
    assert rows[0].cells[0][0] == rows[2].cells[1][0] != rows[0].cells[0][1]
    flat(1, 2, 3).save(tmp_path / "plain.png")
    assert sample_rows([*sheets, Sheet("plain", tmp_path / "plain.png")]) == [] == sample_rows([])


def test_samples_of_a_prompt_differ_and_come_back(tiny_model_folder: Path, tmp_path: Path) -> None:
    data = write_pairs(tmp_path / "pairs")
    looks = {"train__steps": 4, "validate__every": 1, "validate__images": 2, "validate__per_prompt": 3}
    name, *rest = settings(tiny_model_folder, data, tmp_path / "run", **looks)
    run = train(load_recipe(name, rest), progress=False)
    assert all(row["diversity"] > 0.01 for row in log_of(run.dir, "validate"))
    training = read_training(run.dir)
    best = best_step(training.log)
    losses = {row["step"]: row["loss"] for row in log_of(run.dir, "validate") if row["step"]}
    assert best == min(losses, key=lambda step: losses[step])
    captions = [sheet.caption for sheet in training.sheets]
    assert captions[0] == "step 0, base" and captions[-1].startswith("step 4") and len(captions) == 4
    assert f"step {best}, lowest held-out loss since" in captions
    rows = sample_rows(training.sheets)
    assert len(rows) == 2 and all(len(set(cell)) == 3 for row in rows for cell in row.cells)
    page = run.report.read_text()
    assert page.count("<img") == 2 * 4 * 3 and "step by step" in page
