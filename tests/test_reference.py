"""Cached reference errors: the same training as without them, and no base call while it lasts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small import log_of, lora_of, settings, write_pairs

from diffalign.errors import UserError
from diffalign.plan import make_plan
from diffalign.recipe import load_recipe
from diffalign.roles import Roles
from diffalign.run import Run, Session, train

PLAIN = {"validate__pairs": 0, "validate__images": 1, "train__steps": 8, "train__log_every": 1, "train__save_every": 8}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Images that went through each role's network."""
    counts: dict[str, int] = {}
    plain = Roles.__call__

    def counted(self: Roles, role: str, x: torch.Tensor, *args: Any) -> torch.Tensor:
        counts[role] = counts.get(role, 0) + len(x)
        return plain(self, role, x, *args)

    monkeypatch.setattr(Roles, "__call__", counted)
    return counts


def make(model: Path, data: Path, out: Path, **changes: Any) -> tuple[Run, Session]:
    name, *overrides = settings(model, data, out, **(PLAIN | changes))
    seen: list[Session] = []
    return train(load_recipe(name, overrides), progress=False, watch=seen.append), seen[0]


@pytest.mark.parametrize("options", [{}, {"data__posterior": "sample", "data__flip": "true"}], ids=["plain", "drawn"])
def test_the_same_training_and_fewer_base_calls(
    options: dict[str, str], tiny_model_folder: Path, tmp_path: Path, calls: dict[str, int]
) -> None:
    """12 pairs, 8 steps of 6: four epochs. With K=4 every visit has draws of its own, as without a cache."""
    data = write_pairs(tmp_path / "pairs")
    same = {"train__batch": 6, "data__encode_batch": 6, "data__caption_dropout": 0.3, **options}
    plain, _ = make(tiny_model_folder, data, tmp_path / "plain", **same)
    assert calls["base"] == 8 * 6 * 2
    calls.clear()
    cached, session = make(tiny_model_folder, data, tmp_path / "cached", **same, data__reference_errors=4)
    assert calls["base"] == 4 * 12 * 2, "the base is asked once a pair and visit, ahead of time"
    for key in ("loss", "chosen_gain", "logit_abs"):
        ours, theirs = ([row[key] for row in log_of(run.dir)] for run in (cached, plain))
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6), key
    for ours, theirs in zip(lora_of(cached.dir).values(), lora_of(plain.dir).values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)
    calls.clear()
    # another beta, the same base: nothing is asked again
    make(tiny_model_folder, data, tmp_path / "sweep", **same, data__reference_errors=4, method__beta=50)
    assert calls.get("base", 0) == 0
    assert session.trainer.source.reference.shape == (12, 4, 2)


def test_draws_come_back_after_k_visits(tiny_model_folder: Path, tmp_path: Path, calls: dict[str, int]) -> None:
    data = write_pairs(tmp_path / "pairs")
    _, session = make(tiny_model_folder, data, tmp_path / "run", train__batch=6, data__reference_errors=2)
    assert calls["base"] == 2 * 12 * 2 < 8 * 6 * 2
    source = session.trainer.source
    assert {v for start in range(0, 48, 12) for v in source.rows(start, 12)[1]} == {0, 1}
    ctx, method = session.trainer.ctx, session.trainer.method
    for visit in (0, 1):
        batch = source.load([3, 7], [visit, visit])
        fresh = method.base_errors(ctx, method.noise(ctx, batch))
        kept = torch.cat([batch.columns["base_chosen"], batch.columns["base_rejected"]])
        torch.testing.assert_close(kept, fresh, rtol=1e-5, atol=0)
    assert not torch.equal(source.load([3], [0]).columns["base_chosen"], source.load([3], [1]).columns["base_chosen"])


def test_the_plan_says_what_it_costs(tiny_model_folder: Path, tmp_path: Path) -> None:
    data = write_pairs(tmp_path / "pairs")
    name, *rest = settings(tiny_model_folder, data, tmp_path / "run", train__steps=20, train__batch=3)
    notes = make_plan(load_recipe(name, [*rest, "data.reference_errors=9"])).notes
    found = [note for note in notes if note.startswith("reference errors of 5 visits: 120 forward images")]
    assert found and "6 fewer a step" in found[0]


def test_only_where_there_is_a_reference(tiny_model_folder: Path, tmp_path: Path) -> None:
    data = write_pairs(tmp_path / "pairs")
    for method in ("mapo", "sft"):
        _, *rest = settings(tiny_model_folder, data, tmp_path / method, method__beta=None, **PLAIN)
        recipe = load_recipe(f"tiny/{method}", [*rest, "data.reference_errors=2"])
        with pytest.raises(UserError, match=f"data.reference_errors=2: method '{method}' compares no pair"):
            train(recipe, progress=False)
        assert not (tmp_path / method).exists()
