"""``data.scorer``: scores of a run's own pictures, computed once, under the name of the weights that made them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from eval_tiny import write_tiny_clip
from PIL import Image
from small import settings, write_pairs

from diffalign.errors import UserError
from diffalign.eval.scorers import load_scorer
from diffalign.plan import make_plan
from diffalign.recipe import Recipe, load_recipe
from diffalign.setup import Parts, build, fill_cache

SMPO = {"method__name": "smpo", "method__score_range": "fit", "method__inversion_steps": 2}


def recipe_of(model: Path, data: Path, out: Path, **changes: Any) -> Recipe:
    name, *overrides = settings(model, data, out, **{**SMPO, "data__scorer": "tiny-pickscore", **changes})
    return load_recipe(name, overrides)


def scores_of(parts: Parts) -> dict[str, list[float]]:
    batch = parts.cache.batch(range(len(parts.cache)), [0] * len(parts.cache))
    return {name: batch.columns[name].tolist() for name in ("chosen_score", "rejected_score")}


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Pictures that went through a scorer, a number a call."""
    from diffalign.eval.scorers import PickScore

    counts: list[int] = []
    plain = PickScore.score_prepared
    monkeypatch.setattr(PickScore, "score_prepared", lambda self, p, t: (counts.append(len(p)), plain(self, p, t))[1])
    return counts


def test_scores_are_the_scorers_and_are_kept(tiny_model_folder: Path, tmp_path: Path, scored: list[int]) -> None:
    data, said = write_pairs(tmp_path / "pairs"), []
    fill_cache(recipe_of(tiny_model_folder, data, tmp_path / "run"), None, progress=False)
    assert sum(scored) == 24
    parts = build(recipe_of(tiny_model_folder, data, tmp_path / "run"), said.append)
    assert sum(scored) == 24, "kept by the cache"
    rows = [json.loads(line) for line in (data / "metadata.jsonl").read_text().splitlines()]
    scorer, found = load_scorer("tiny-pickscore", device="cpu"), scores_of(parts)
    for side in ("chosen", "rejected"):
        pictures = [Image.open(data / row[side]) for row in rows]
        exact = scorer(pictures, [row["prompt"] for row in rows])
        assert found[f"{side}_score"] == pytest.approx(exact.tolist(), abs=1e-4)
    low, high = parts.method.bounds
    training = [i for i in range(12) if i not in parts.heldout.indices]
    both = [found[name][i] for name in found for i in training]
    assert (low, high) == pytest.approx((min(both), max(both))), "score_range=fit sees the computed columns"
    assert any("scores by tiny-pickscore" in line for line in said)
    # other weights under the same name are other scores
    own = write_tiny_clip(tmp_path / "clip")
    other = build(recipe_of(tiny_model_folder, data, tmp_path / "run", data__scorer=f"pickscore={own}"), said.append)
    assert scores_of(other) != found
    trainer = parts.trainer
    before = [p.clone() for p in trainer.roles.parameters("student")]
    trainer.train_step()
    assert any(not torch.equal(a, b) for a, b in zip(before, trainer.roles.parameters("student"), strict=True))


def test_scores_stand_before_the_datas_own_and_min_gap_reads_them(
    tiny_model_folder: Path, tmp_path: Path, scored: list[int]
) -> None:
    data, said = write_pairs(tmp_path / "pairs"), []
    table = data / "metadata.jsonl"
    rows = [json.loads(line) for line in table.read_text().splitlines()]
    table.write_text("".join(json.dumps({**r, "chosen_score": 5, "rejected_score": 5}) + "\n" for r in rows))
    options = {"validate__pairs": 0, "method__name": "dpo", "method__score_range": None}
    options["method__inversion_steps"] = None
    free = build(recipe_of(tiny_model_folder, data, tmp_path / "a", **options), said.append)
    gaps = [a - b for a, b in zip(*scores_of(free).values(), strict=True)]
    assert any("in the place of the data's own" in line for line in said) and sum(g > 0 for g in gaps) not in (0, 12)
    wide = build(recipe_of(tiny_model_folder, data, tmp_path / "a", data__min_gap=0.0, **options), said.append)
    assert wide.trainer.source.indices.tolist() == [i for i, gap in enumerate(gaps) if gap >= 0]
    with pytest.raises(UserError, match="no row's score gap reaches"):
        build(recipe_of(tiny_model_folder, data, tmp_path / "a", data__min_gap=1e6, **options), said.append)
    shuffled = build(
        recipe_of(tiny_model_folder, data, tmp_path / "a", data__shuffle_labels="true", **options), said.append
    )
    winners = {row.chosen.content_hash() for row in free.rows}
    assert 0 < sum(row.chosen.content_hash() in winners for row in shuffled.rows) < 12
    # the scores stay with the label: the order of the pictures does not show in them
    true, given = (np.sort(np.array([*scores_of(p).values()])) for p in (free, shuffled))
    np.testing.assert_allclose(given, true, atol=1e-4)
    plain = {**options, "method__name": None, "method__beta": None, "data__scorer": "tiny-pickscore"}
    _, *overrides = settings(tiny_model_folder, data, tmp_path / "a", **plain)
    one = build(load_recipe("tiny/sft", overrides), said.append)
    assert one.cache.values("score").tolist() == pytest.approx(scores_of(free)["chosen_score"])


def test_scores_do_not_depend_on_the_batch(tiny_model_folder: Path, tmp_path: Path) -> None:
    """A scorer that weighs what all prompts share takes all of the data's, not those of a batch."""
    data, own = write_pairs(tmp_path / "pairs", 6), write_tiny_clip(tmp_path / "clip")
    changes = {"data__scorer": f"segments_reweighted={own}", "data__cache": "false", "validate__pairs": 0}
    found = [
        build(recipe_of(tiny_model_folder, data, tmp_path / "run", data__encode_batch=n, **changes), lambda text: None)
        for n in (2, 6)
    ]
    for name, values in scores_of(found[0]).items():
        assert values == pytest.approx(scores_of(found[1])[name], abs=1e-3), name


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"data__scorer": "pikscore"}, "unknown scorer 'pikscore'; did you mean 'pickscore'"),
        ({"data__scorer": "tiny-hps,tiny-pickscore"}, "data.scorer takes one scorer"),
        ({"data__streaming": "true"}, "data.scorer needs the pictures a second time"),
        ({"data__scorer": "null"}, "`diffalign pairs score`, or set data.scorer"),
        ({"method__score_range": "[0.1,0.3]"}, r"score_range is \[0.1, 0.3\].*set method.score_range=fit"),
    ],
)
def test_one_line_for_what_cannot_be(
    tiny_model_folder: Path, tmp_path: Path, changes: dict[str, str], says: str
) -> None:
    data = write_pairs(tmp_path / "pairs")
    with pytest.raises(UserError, match=says) as found:
        build(recipe_of(tiny_model_folder, data, tmp_path / "run", **changes), lambda text: None)
    assert "\n" not in str(found.value)


def test_a_plan_scores_nothing_and_says_so(tiny_model_folder: Path, tmp_path: Path, scored: list[int]) -> None:
    plan = make_plan(recipe_of(tiny_model_folder, write_pairs(tmp_path / "pairs"), tmp_path / "run"))
    assert not scored
    assert any("scores by tiny-pickscore come first" in note for note in plan.notes)
