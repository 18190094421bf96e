"""Several models at once: ratings against maximum likelihood, one family of tests, tables, looks, the commands."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from command import diffalign
from eval_tiny import write_samples, write_tiny_clip
from PIL import Image
from rich.console import Console
from test_eval_compare import write
from test_eval_report import check_self_contained

from diffalign.errors import UserError
from diffalign.eval import stats
from diffalign.eval.looks import look, measure
from diffalign.eval.rows import read_score_file, write_rows
from diffalign.eval.score import score_images
from diffalign.eval.study import study

PROMPTS = [f"prompt {i}" for i in range(6)]


def test_bradley_terry_is_maximum_likelihood() -> None:
    from scipy.optimize import minimize

    wins = np.array([[0, 30.0, 41.5], [20, 0, 28], [8.5, 22, 0]])

    def loss(x: np.ndarray) -> float:
        strength = np.append(x, -x.sum())  # mean 0
        return -float((wins * -np.log1p(np.exp(strength[None] - strength[:, None]))).sum())

    theirs = minimize(loss, np.zeros(2), method="BFGS", options={"gtol": 1e-9}).x
    ours = stats.bradley_terry(wins)
    assert ours == pytest.approx(np.append(theirs, -theirs.sum()) * 400 / np.log(10), abs=1e-3)
    two = stats.bradley_terry(np.array([[0, 3.0], [1, 0]]))  # odds 3 to 1
    assert two[0] - two[1] == pytest.approx(400 * np.log10(3))
    assert stats.bradley_terry(np.stack([wins, wins.T])) == pytest.approx(np.stack([ours, -ours]), abs=20)
    assert np.isfinite(stats.bradley_terry(np.array([[0, 9.0], [0, 0]]), prior=0.5)).all()


def test_ratings_have_intervals_that_cover() -> None:
    rng = np.random.default_rng(0)
    strength = np.array([0.6, 0.0, -0.6])
    truth = (strength - strength.mean()) * 400 / np.log(10)
    hits = 0
    for _ in range(60):
        chance = 1 / (1 + np.exp(strength[None] - strength[:, None]))
        upper = np.triu(rng.random((150, 3, 3)) < chance, 1)
        wins = upper + np.tril(1 - np.swapaxes(upper, 1, 2), -1)
        found = stats.ratings(wins, draws=400)
        hits += sum(i.low <= t <= i.high for (_, i), t in zip(found, truth, strict=True))
    assert 0.88 <= hits / 180 <= 0.995


def test_a_study_of_three(tmp_path: Path) -> None:
    places = [write(tmp_path / name, gain) for name, gain in (("base", 0.0), ("good", 1.0), ("bad", -1.0))]
    found = study(places, in_loop=["clip"])
    assert [s.label for s in found.sides] == ["base", "good", "bad"] and [b.scorer for b in found.boards] == [
        "clip",
        "oracle",
    ]
    clip, oracle = found.boards
    assert (
        clip.in_loop
        and not oracle.in_loop
        and set(clip.cells) == {(i, j) for i in range(3) for j in range(3) if i != j}
    )
    for (i, j), cell in clip.cells.items():
        back = clip.cells[j, i]
        assert cell.paired.win_rate + back.paired.win_rate == pytest.approx(1) and cell.holm_p == back.holm_p
        assert cell.paired.gain == -back.paired.gain and cell.paired.won == back.paired.lost
    assert [c.a.label for c in found.comparisons] == ["good", "bad"] and all(
        c.b.label == "base" for c in found.comparisons
    )
    assert clip.ratings[1][0] > clip.ratings[0][0] > clip.ratings[2][0]
    family = [c.paired.sign_p for b in found.boards for (i, j), c in b.cells.items() if i > j]
    corrected = [c.holm_p for b in found.boards for (i, j), c in b.cells.items() if i > j]
    assert sorted(corrected) == pytest.approx(sorted(stats.holm(family))) and len(family) == 6
    for c in found.comparisons:  # the same numbers as in the matrix
        place = [s.label for s in found.sides].index(c.a.label)
        assert (
            clip.cells[place, 0].paired == c.scorers[0].overall and clip.cells[place, 0].holm_p == c.scorers[0].holm_p
        )
    text = found.markdown()
    assert "| good | " in text and "row against column" in text and "clip (in-loop)" in text
    assert json.loads(found.json())["boards"][0]["pairs"][0]["a"] == "good"
    console = Console(file=io.StringIO(), width=200)
    found.render(console)
    assert "row against column" in console.file.getvalue()  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="two or more"):
        study(places[:1])
    seeds = write(tmp_path / "odd", 0.0, sampling={"settings": {"steps": 4, "guidance": 7.5}})
    with pytest.raises(UserError, match="--allow sampling"):
        study([*places, seeds])
    assert any("steps" in note for note in study([*places, seeds], allow=["sampling"]).notes)


def test_what_is_measured_of_a_picture() -> None:
    grey, red = (Image.new("RGB", (80, 80), colour) for colour in ((128, 128, 128), (255, 0, 0)))
    found = look([grey, red])
    assert found["brightness"] == pytest.approx((128 / 255 + 1) / 2, abs=0.01)
    assert found["saturation"] == pytest.approx(0.5) and found["contrast"] == pytest.approx(0, abs=1e-6)
    assert found["diversity"] == pytest.approx((127 + 128 + 128) / 3 / 255, abs=0.01)
    half = Image.new("L", (64, 64))
    half.paste(255, (0, 0, 32, 64))
    assert look([half.convert("RGB")])["contrast"] == pytest.approx(0.5) and "diversity" not in look([grey])


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Base, another, and one whose pictures are all nearly the same bright red."""
    folder = tmp_path_factory.mktemp("scored")
    clip = write_tiny_clip(folder / "clip")
    for salt, name in enumerate(("base", "other", "hacked")):
        write_samples(folder / name, PROMPTS, per_prompt=2, salt=salt)
        if name == "hacked":
            for n, file in enumerate(sorted((folder / name / "images").iterdir())):
                Image.new("RGB", (40, 40), (255, n, n)).save(file)
        score_images(folder / name, None, f"clip={clip}", folder / name / "scores.jsonl", device="cpu", progress=False)
    return [folder / name for name in ("base", "other", "hacked")]


def test_looks_point_at_a_hacked_model(scored: list[Path]) -> None:
    found = measure(study(scored))
    assert found is not None and found.prompts == 6
    base, other, hacked = found.shifts
    assert base["saturation"].change is None and not any(s.alarming for s in other.values())
    assert hacked["saturation"].alarming and hacked["diversity"].alarming and (hacked["diversity"].change or 0) < 0


def test_pages_of_studies(scored: list[Path], tmp_path: Path) -> None:
    base, other, hacked = map(str, scored)
    done = diffalign("report", base, other, hacked, "--out", tmp_path / "r.html", "--title", "Three")
    assert done.status == 0 and done.out.strip() == str(tmp_path / "r.html"), done.err
    page = (tmp_path / "r.html").read_text()
    check_self_contained(page)
    assert (
        "Three" in page and "row against column" in page and "rating by clip" in page and "hacked against base" in page
    )
    assert page.count("<tr><th>") >= 3 and 'class="tag worse">look' in page
    assert (tmp_path / "r.md").read_text().startswith("# Three")
    done = diffalign("report", base, "--out", tmp_path / "one.html")
    assert done.status == 0 and "Mean scores" in (tmp_path / "one.html").read_text()
    done = diffalign("report", tmp_path / "none")
    assert done.status == 2 and "does not exist" in done.line


def test_compare_command(scored: list[Path], tmp_path: Path) -> None:
    base, other, hacked = scored
    three = diffalign("compare", base, other, hacked, "--json")
    assert three.status == 0 and json.loads(three.out)["models"] == ["base", "other", "hacked"], three.err
    two = diffalign("compare", other, base, "--markdown")  # A over B
    assert two.status == 0 and "win rate against base" in two.out and "| other |" in two.out
    file = read_score_file(other)
    cut = tmp_path / "cut"
    cut.mkdir()
    write_rows(cut / "scores.jsonl", file.rows)
    (cut / "scores.meta.json").write_text((other / "scores.meta.json").read_text())
    text = (cut / "scores.jsonl").read_text()
    (cut / "scores.jsonl").write_text(text[: len(text) // 2])
    half = diffalign("compare", cut, base)
    assert half.status == 2 and "half written" in half.line


def test_tiny_scorers_rank_models_as_the_oracle_does(tmp_path: Path) -> None:
    """Models that draw a share of the prompts wrong: every shipped scorer orders them as the oracle, by means and by
    ratings."""
    from diffalign.assets.scenes import caption, heldout_prompts, pair_scenes, render

    scenes = pair_scenes(heldout=True)[:40]
    wrong = scenes[7:] + scenes[:7]
    prompts = [caption(scene) for scene in scenes]
    assert set(prompts) <= set(heldout_prompts())
    shares = (0.0, 0.3, 0.6, 0.9)
    places = []
    for share in shares:
        place = write_samples(tmp_path / f"wrong-{share}", prompts, size=8)
        drawn = [w if i % 10 < 10 * share else s for i, (s, w) in enumerate(zip(scenes, wrong, strict=True))]
        for i, pixels in enumerate(render(drawn, np.random.default_rng(1))):
            array = pixels if pixels.shape[-1] == 3 else pixels.transpose(1, 2, 0)
            Image.fromarray(array).save(place / "images" / f"{i:06d}-0.png")
        names = "oracle,tiny-clip,tiny-pickscore,tiny-hps"
        score_images(place, None, names, place / "scores.jsonl", device="cpu", progress=False)
        places.append(place)
    found = study(places)
    for board in found.boards:
        assert np.argsort([-m.value for m in board.means]).tolist() == [0, 1, 2, 3], board.scorer
        assert np.argsort([-value for value, _ in board.ratings]).tolist() == [0, 1, 2, 3], board.scorer
