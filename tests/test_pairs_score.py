"""``pairs score``: score columns by any scorer or mix, labels from them, in every format; stopped and gone on with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command import diffalign
from eval_tiny import write_tiny_clip
from PIL import Image
from small import write_pairs
from test_data_formats import pick_a_pic, write_pick_a_pic
from test_data_readers import recipe

from diffalign.data.convert import ConvertOptions
from diffalign.data.mix import mix_scores, parse_weights, win_rates
from diffalign.data.readers import read_pairs
from diffalign.data.rescore import Rescored, Rescoring, score_pairs
from diffalign.eval.scorers import load_scorer

NAMES = ("clip", "pickscore")


@pytest.fixture(scope="module")
def scorers(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two real scorers with random weights."""
    places = {name: write_tiny_clip(tmp_path_factory.mktemp(name), seed) for seed, name in enumerate(NAMES)}
    return ",".join(f"{name}={place}" for name, place in places.items())


def run(source: Path, target: Path, scorers: str, form: str = "folder", weights: str = "", **how: Any) -> Rescored:
    data = {"ties": how.pop("ties", "keep"), "duplicates": "keep", **how.pop("data", {})}
    names = [part.split("=")[0] for part in scorers.split(",")]
    rescoring = Rescoring(parse_weights(weights, names), **how)
    found = score_pairs(
        recipe(source, **data), target, scorers, rescoring, ConvertOptions(form), batch=4, device="cpu", bar=False
    )
    assert found is not None
    return found


def exact(scorers: str, pictures: list[Image.Image], prompts: list[str]) -> dict[str, np.ndarray]:
    return {
        part.split("=")[0]: load_scorer(part, device="cpu")(pictures, prompts).double().numpy()
        for part in scorers.split(",")
    }


def lines(folder: Path, name: str = "metadata.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def test_each_pictures_own_scores_and_their_mix(scorers: str, tmp_path: Path) -> None:
    source = write_pairs(tmp_path / "pairs", 6)
    found = run(source, tmp_path / "out", scorers, weights="clip=3")
    given = lines(source)
    prompts = [row["prompt"] for row in given]
    values = [exact(scorers, [Image.open(source / r[side]) for r in given], prompts) for side in ("chosen", "rejected")]
    rows = lines(tmp_path / "out")
    for side, scores in zip(("chosen", "rejected"), values, strict=True):
        for name in NAMES:
            assert [r[f"{side}_{name}"] for r in rows] == pytest.approx(scores[name], abs=1e-4)
    table = {name: np.stack([v[name] for v in values], 1) for name in NAMES}
    z = {name: (t - t.mean()) / t.std() for name, t in table.items()}
    mixed = (3 * z["clip"] + z["pickscore"]) / 4
    assert [r["chosen_score"] for r in rows] == pytest.approx(mixed[:, 0], abs=1e-4)
    assert [r["rejected_score"] for r in rows] == pytest.approx(mixed[:, 1], abs=1e-4)
    assert found.means["clip"] == pytest.approx(table["clip"].mean(), abs=1e-4)
    assert {r.scorer for r in map(_Row, lines(tmp_path / "out", "scores.jsonl"))} == set(NAMES)
    assert not (tmp_path / ".out.scores").exists() and len(read_pairs(recipe(tmp_path / "out")).rows) == 6
    again = run(source, tmp_path / "out", scorers, weights="clip=3")  # done already
    assert again.converted.report.usable == 6


class _Row:
    def __init__(self, row: dict[str, Any]) -> None:
        self.scorer = row["scorer"]


def test_new_labels_follow_the_scores(scorers: str, tmp_path: Path) -> None:
    """Of Pick-a-Pic rows of any label, none among them."""
    labels = [1.0, 0.0, 0.5, 1.0, 0.0]
    rows = [pick_a_pic(i, label) for i, label in enumerate(labels)]
    rows.append(pick_a_pic(5) | {"has_label": False, "label_0": None, "label_1": None})
    source = write_pick_a_pic(tmp_path / "picks", rows, 3)
    one = scorers.split(",")[0]
    plain = run(source, tmp_path / "plain", one)
    assert plain.converted.report.counts == {"no label": 1} and plain.relabelled is None
    kept = {r["id"]: r for r in lines(tmp_path / "plain")}
    found = run(source, tmp_path / "new", one, relabel=True)
    new = {r["id"]: r for r in lines(tmp_path / "new")}
    assert len(new) == 6 and all(r["chosen_score"] > r["rejected_score"] and not r["tie"] for r in new.values())
    turned = 0
    for name, row in kept.items():
        assert {row["chosen_score"], row["rejected_score"]} == {new[name]["chosen_score"], new[name]["rejected_score"]}
        # the columns beside it go with their picture
        assert (new[name]["chosen_clip"], new[name]["rejected_clip"]) == (
            new[name]["chosen_score"],
            new[name]["rejected_score"],
        )
        assert (row["chosen_clip"], row["rejected_clip"]) == (row["chosen_score"], row["rejected_score"])
        turned += row["tie"] or row["chosen_score"] < row["rejected_score"]
    assert (found.relabelled, found.ties) == (turned, 0) and turned > 1
    gaps = sorted(r["chosen_score"] - r["rejected_score"] for r in new.values())
    between = (gaps[2] + gaps[3]) / 2
    some = run(source, tmp_path / "ties", one, relabel=True, tie_gap=between)
    assert some.ties == 3 and sum(r["tie"] for r in lines(tmp_path / "ties")) == 3
    few = run(source, tmp_path / "few", one, form="pickapic", relabel=True, tie_gap=between, ties="skip")
    assert few.converted.report.counts == {"tie": 3}
    back = read_pairs(recipe(tmp_path / "few")).rows
    assert sorted(r.chosen_score - r.rejected_score for r in back) == pytest.approx(gaps[3:])  # type: ignore[operator]


def test_what_is_scored_is_not_scored_again(scorers: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffalign.eval.scorers import Clip

    source = write_pairs(tmp_path / "pairs", 8)
    run(source, tmp_path / "straight", scorers)
    plain, calls = Clip.score_prepared, []

    def failing(self: Any, prepared: Any, prompts: Any) -> Any:
        calls.append(len(prepared))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return plain(self, prepared, prompts)

    monkeypatch.setattr(Clip, "score_prepared", failing)
    with pytest.raises(BaseException, match="the same command goes on"):
        run(source, tmp_path / "out", scorers)
    partial = tmp_path / ".out.scores" / "scores.jsonl"
    partial.write_text(partial.read_text() + '{"id": "5", "pro')  # torn by a kill
    run(source, tmp_path / "out", scorers)
    assert calls == [4, 4, 4, 4, 4], "two of four batches were there"
    for name in ("metadata.jsonl", "scores.jsonl"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()


def test_shares_of_duels_won() -> None:
    scores = np.array([[4.0, 3.0, 2.0, 1.0], [1.0, 3.0, 2.0, 2.0]])
    phi = win_rates(scores, [1.0, 1.0])  # wins 3 2 1 0 and 0 3 1.5 1.5, of 2 x 3
    assert phi == pytest.approx([3 / 6, 5 / 6, 2.5 / 6, 1.5 / 6])
    assert win_rates(scores, [2.0, 1.0]) == pytest.approx([6 / 9, 7 / 9, 3.5 / 9, 1.5 / 9])
    assert win_rates(scores[:1], [5.0]) == pytest.approx([1, 2 / 3, 1 / 3, 0])  # the sheet's phi of four in order
    assert mix_scores({"a": scores}, {"a": 7.0}) is scores
    flat = mix_scores({"a": scores, "b": np.full((2, 4), 3.0)}, {"a": 1.0, "b": 1.0})
    assert np.isfinite(flat).all(), "a scorer that says the same of all adds nothing"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--scorers", "pikscore"], "unknown scorer 'pikscore'; did you mean 'pickscore'"),
        (["--scorers", "tiny-hps", "--weights", "tiny-hsp=2"], "names no scorer of this run: 'tiny-hsp'"),
        (["--scorers", "tiny-hps", "--weights", "tiny-hps=-1"], "a weight is a positive number"),
        (["--scorers", "tiny-hps", "max_pairs=3"], "take some of them first with `diffalign pairs convert --max`"),
        (["--scorers", "tiny-hps", "streaming=true"], "leave streaming out"),
        (["--scorers", "tiny-hps", "--tie-gap", "-1"], "--tie-gap -1 is below 0"),
        (["--scorers", "oracle", "--relabel"], "tiny world only"),
    ],
)
def test_bad_input_in_one_line(tmp_path: Path, options: list[str], says: str) -> None:
    source = write_pairs(tmp_path / "pairs", 2)
    changes = [o for o in options if "=" in o and not o.startswith("tiny")]
    rest = [o for o in options if o not in changes]
    done = diffalign("pairs", "score", source, tmp_path / "out", *changes, *rest)
    assert done.status == 2 and says in done.line
    assert not (tmp_path / "out").exists()
