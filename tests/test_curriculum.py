"""Curriculum-DPO's order: nested chunks of the pairs, wide score gaps first, as a function of the position alone."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from small import final_state, same_tree, settings, write_pairs
from world import Rows, gap, make_trainer, warm, weights

from diffalign import load_recipe
from diffalign.data.batch import Cond
from diffalign.data.curriculum import Curriculum
from diffalign.data.source import Source
from diffalign.errors import UserError
from diffalign.methods import make_method
from diffalign.plan import make_plan
from diffalign.run import train

HARD_LAST = np.array([7, 2, 9, 4, 0, 11, 3, 8, 1, 10, 6, 5])  # rows by falling gap


def source_of(curriculum: Curriculum | None) -> Source:
    uncond = Cond(torch.zeros(1, 5, 16))
    return Source(Rows(12), range(12), 0, uncond, curriculum=curriculum)  # type: ignore[arg-type]


def test_chunks_are_nested_and_follow_one_another() -> None:
    source = source_of(Curriculum(HARD_LAST, chunks=3, positions=10))
    rows, visits = source.rows(0, 60)
    assert set(rows[:4]) == set(rows[4:8]) == set(HARD_LAST[:4]) and set(rows[8:10]) < set(HARD_LAST[:4])
    assert set(rows[10:18]) == set(HARD_LAST[:8]) and set(rows[18:20]) < set(HARD_LAST[:8])
    assert set(rows[20:32]) == set(rows[32:44]) == set(range(12)), "the last chunk is all pairs"
    assert len(set(zip(rows, visits, strict=True))) == 60, "no pair meets the same draws twice"
    assert rows[20:32] != rows[32:44] and rows[:4] != rows[4:8]
    parts = [source.rows(start, 7) for start in range(0, 56, 7)]
    assert [row for part, _ in parts for row in part] == rows[:56], "whatever a step draws"
    assert [v for _, part in parts for v in part] == visits[:56]
    shares = [source.share(1, 8, rank, 2) for rank in (0, 1)]
    assert shares[0][0] + shares[1][0] == rows[8:16]


def test_one_chunk_is_no_curriculum() -> None:
    plain, one = source_of(None), source_of(Curriculum(HARD_LAST, chunks=1, positions=4))
    assert plain.rows(0, 40) == one.rows(0, 40)


def test_the_order_depends_on_neither_micro_batches_nor_a_restart() -> None:
    steady = {"max_grad_norm": None, "eps": 1e-2}
    method = make_method("dpo", {"beta": 100.0})

    def trainer(**options: int) -> object:
        made = make_trainer(method, **steady, **options)
        made.source = source_of(Curriculum(HARD_LAST, chunks=3, positions=6))
        return made

    whole, parts, first = trainer(), trainer(micro_batch=1), trainer()
    warm(whole, 5), warm(parts, 5), warm(first, 2)
    assert gap(weights(whole), weights(parts)) < 1e-5
    again = trainer()
    again.load(first.state())
    assert all(map(torch.equal, weights(whole), weights(warm(again, 3))))


def test_a_run_by_curriculum(tiny_model_folder: Path, tmp_path: Path) -> None:
    data = write_pairs(tmp_path / "pairs", 10)
    rows = [json.loads(line) for line in (data / "metadata.jsonl").open()]
    wide = {"data.curriculum.chunks": 2, "data.curriculum.steps": 2, "train.steps": 4, "data.resolution": 64}
    with pytest.raises(UserError, match=r"10 have no scores: .*`diffalign pairs score`, or set data.scorer"):
        train(load_recipe(*split(settings(tiny_model_folder, data, tmp_path / "none", **wide))), progress=False)
    for n, row in enumerate(rows):
        row |= {"chosen_score": float(n), "rejected_score": 0.0}
    (data / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    easy: list[float] = []

    def watch(session: object) -> None:
        source = session.trainer.source  # type: ignore[attr-defined]
        easy.extend(source.cache[i].columns["chosen_score"] for i in source.rows(0, 4)[0])

    straight = load_recipe(*split(settings(tiny_model_folder, data, tmp_path / "straight", **wide)))
    assert train(straight, progress=False, watch=watch).step == 4
    assert min(easy) > sum(range(10)) / 10, "two steps of two from the wider half"
    short = load_recipe(*split(settings(tiny_model_folder, data, tmp_path / "cut", **wide | {"train.steps": 2})))
    train(short, progress=False)
    train(load_recipe(short, ["train.steps=4"]), progress=False)
    assert same_tree(final_state(tmp_path / "cut")["roles"], final_state(tmp_path / "straight")["roles"])
    for overrides, message in (
        (["data.curriculum.chunks=9"], "chunks 9 is more than the 8 pairs"),
        (["data.curriculum.top=1"], "chunks 2 is more than the 1 pairs"),
        (["data.reference_errors=1"], "the visits of a curriculum are not known ahead"),
    ):
        with pytest.raises(UserError, match=message):
            train(load_recipe(straight, [*overrides, f"output.dir={tmp_path / 'refused'}"]), progress=False)
    rated = load_recipe("tiny/kto", [f"data.path={data}", "data.curriculum.steps=5"])
    with pytest.raises(UserError, match="this method takes no pairs"):
        make_plan(rated)


def split(given: list[str]) -> tuple[str, list[str]]:
    return given[0], given[1:]
