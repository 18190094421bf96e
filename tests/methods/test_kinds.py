"""Diffusion-KTO, RankDPO and CaPO: hand-worked values (offline sheet, sections 9, 10, 18), identities, wrong data."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from small import picture, settings, write_pairs
from torch import Tensor
from world import batch_of, make_trainer, warm

from diffalign import load_recipe, train
from diffalign.errors import UserError
from diffalign.methods import make_method
from diffalign.methods.preference.kto import kto_loss, reference_point


def t64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _run(model: Path, data: Path, out: Path, name: str, **changes: Any) -> Any:
    changes = {"method.beta": None, "train.steps": 2, "data.resolution": 64} | changes
    _, *rest = settings(model, data, out, **changes)
    return train(load_recipe(f"tiny/{name}", rest), progress=False)


# ---- Diffusion-KTO ------------------------------------------------------------------------------------------------

LABELS = t64(1, -1)


@pytest.mark.parametrize(
    ("gains", "point", "losses"),
    [((0.001, -0.002), 0.0, (0.2689414, 0.1192029)), ((0.003, -0.001), 0.001, (0.1192029, 0.1192029))],
    ids=["V11", "V12"],
)
def test_kto_golden_values(gains: tuple[float, ...], point: float, losses: tuple[float, ...]) -> None:
    found = reference_point(t64(*gains).sum(), torch.tensor(2.0))
    assert found.item() == pytest.approx(point, abs=1e-12)
    values, logit = kto_loss(t64(*gains), LABELS, found, 1000)
    assert values.tolist() == pytest.approx(losses, abs=1e-6)
    torch.testing.assert_close(logit, LABELS * 1000 * (t64(*gains) - point))


def test_kto_identities() -> None:
    gains, zero = t64(0.002, -0.001), t64(0.0)[0]
    values, _ = kto_loss(gains, LABELS, zero, 500)
    turned, _ = kto_loss(gains, -LABELS, zero, 500)
    torch.testing.assert_close(values + turned, t64(1, 1))  # h -> 1 - h
    alone = t64(0.004)
    point = reference_point(alone.sum(), torch.tensor(1.0))
    assert kto_loss(alone, t64(1), point, 1000)[0].item() == pytest.approx(0.5)  # one picture that gained
    gain = t64(0.002, 0.001).requires_grad_()
    assert not reference_point(gain.sum(), torch.tensor(2.0)).requires_grad


def test_kto_utilities() -> None:
    """The released code's five, at z = beta (g - Q) = 2 and y = +1, -1, written out."""
    softplus = {z: math.log1p(math.exp(z)) for z in (2.0, -2.0)}
    expected = {
        "loss_averse": (1 + softplus[-2.0], 1 + softplus[2.0]),
        "risk_seeking_1": (1 - softplus[2.0], 1 + softplus[2.0]),
        "risk_seeking_2": (2 - math.exp(0.02), 2 + math.exp(0.02)),
        "risk_seeking_3": (1 - softplus[2.0], 1 - softplus[-2.0]),
    }
    for utility, losses in expected.items():
        values, _ = kto_loss(t64(0.003, 0.003), LABELS, t64(0.001)[0], 1000, utility)  # type: ignore[arg-type]
        assert values.tolist() == pytest.approx(losses), utility
        gain = t64(0.003, 0.003).requires_grad_()
        kto_loss(gain, LABELS, t64(0.001)[0], 1000, utility)[0].sum().backward()  # type: ignore[arg-type]
        assert gain.grad is not None and gain.grad[0] < 0 < gain.grad[1], "liked pictures are to gain, others to lose"


def test_kto_starts_at_one_half_and_asks_the_base_once() -> None:
    trainer = make_trainer(make_method("kto", {"liked": 2.0}))
    calls: list[str] = []
    inner = trainer.ctx.model
    trainer.ctx.model = lambda role, *args, **more: (calls.append(role), inner(role, *args, **more))[1]  # type: ignore
    batches = trainer.placed([batch_of(trainer, [0, 1, 2])])
    trainer.ctx.stats = trainer.statistics(batches)
    loss = trainer.method.loss(trainer.ctx, batches[0], trainer.method.phases[0])
    assert batches[0].columns["label"].tolist() == [-1, 1, 1]
    torch.testing.assert_close(loss.values, torch.tensor([0.5, 1.0, 1.0]), rtol=0, atol=1e-4)
    assert loss.metrics["accuracy"].tolist() == [0.5] * 3 and sorted(calls) == ["base", "student", "student"]
    times, _ = trainer.ctx.draw(batches[0])
    assert len(set(times.tolist())) == 3, "each picture has its own t"


def test_kto_weighs_the_classes() -> None:
    """One liked picture in four with half of the weight, in the loss and in Q; the same without the fit."""
    method = make_method("kto", {"positive_ratio": 0.5})
    trainer = warm(make_trainer(method))
    batch = batch_of(trainer, [0, 1, 2, 3])
    assert torch.equal(method.weight(batch), torch.ones(4))  # type: ignore[attr-defined]
    method.fit({"label": t64(1, -1, -1, -1)})
    batch.columns["label"] = torch.tensor([1.0, -1, -1, -1])
    torch.testing.assert_close(method.weight(batch), torch.tensor([2.0, 2 / 3, 2 / 3, 2 / 3]))  # type: ignore
    stats = method.statistics(trainer.ctx, batch)
    student, base = method.errors(trainer.ctx, batch)  # type: ignore[attr-defined]
    gain = base - student
    torch.testing.assert_close(stats["gain"] / stats["weight"], gain[:1].mean() / 2 + gain[1:].mean() / 2)


def test_kto_refuses_one_class_and_trains_on_two(tiny_model_folder: Path, tmp_path: Path) -> None:
    data = tmp_path / "rated"
    data.mkdir()
    for i in range(4):
        picture(i).save(data / f"{i}.png")
    lines = [{"prompt": f"a thing {i}", "image": f"{i}.png", "label": True} for i in range(4)]
    (data / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(UserError, match=r"none of 3 is not liked \(label 0\); add some"):
        _run(tiny_model_folder, data, tmp_path / "one", "kto", **{"validate.pairs": 1})
    pairs = write_pairs(tmp_path / "pairs", 6)
    run = _run(tiny_model_folder, pairs, tmp_path / "two", "kto", **{"train.micro_batch": 1})
    assert run.step == 2 and {"chosen_gain", "rejected_gain", "reference_point"} <= set(run.log[-1])
