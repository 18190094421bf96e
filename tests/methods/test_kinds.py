"""Diffusion-KTO, RankDPO and CaPO: hand-worked values (offline sheet, sections 9, 10, 18), identities, wrong data."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from command import diffalign
from small import picture, settings, write_pairs
from torch import Tensor
from world import batch_of, make_trainer, warm

from diffalign import load_recipe, train
from diffalign.data.rowfile import read_rows
from diffalign.errors import UserError
from diffalign.methods import make_method
from diffalign.methods.pair import PairErrors
from diffalign.methods.preference.capo import calibrated, capo_loss, frontiers, stacked
from diffalign.methods.preference.dpo import dpo_loss
from diffalign.methods.preference.kto import kto_loss, reference_point
from diffalign.methods.preference.rankdpo import pair_weights, places, rankdpo_loss, shares_of_wins
from diffalign.plan import make_plan
from diffalign.recipe import DataRecipe


def t64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _run(model: Path, data: Path, out: Path, name: str, **changes: Any) -> Any:
    changes = {"method.beta": None, "train.steps": 2, "data.resolution": 64} | changes
    _, *rest = settings(model, data, out, **changes)
    return train(load_recipe(f"tiny/{name}", rest), progress=False)


def _refused(model: Path, data: Path, out: Path, name: str, said: str) -> None:
    """By the plan and by the run, in one line, before anything is encoded."""
    _, *rest = settings(model, data, out / "run", **{"method.beta": None, "data.resolution": 64, "validate.pairs": 1})
    for flag in ([], ["--plan"]):
        done = diffalign("train", f"tiny/{name}", *rest, "--quiet", *flag)
        assert done.status == 2 and re.search(said, done.line), done.line
    assert not list((out / "cache").rglob("*.safetensors"))


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
    _refused(tiny_model_folder, data, tmp_path / "one", "kto", r"'.*rated': .*none of 3 .* not liked: add .* label 0")
    pairs = write_pairs(tmp_path / "pairs", 6)
    run = _run(tiny_model_folder, pairs, tmp_path / "two", "kto", **{"train.micro_batch": 1})
    assert run.step == 2 and {"chosen_gain", "rejected_gain", "reference_point"} <= set(run.log[-1])


# ---- RankDPO ------------------------------------------------------------------------------------------------------

PHI = t64(1, 2 / 3, 1 / 3, 0)[None]


def test_rankdpo_golden_weights() -> None:
    found = pair_weights(PHI)[0]
    expected = {(0, 1): 0.2197, (0, 2): 0.5339, (0, 3): 0.8214, (1, 2): 0.0619, (1, 3): 0.1697, (2, 3): 0.0260}  # V14
    for i in range(4):
        for j in range(4):
            assert found[i, j].item() == pytest.approx(expected.get((i, j), 0.0), abs=5e-5)
    assert pair_weights(t64(1, 0)[None])[0, 0, 1].item() == pytest.approx(0.5325, abs=5e-5)  # V15
    assert not pair_weights(t64(0.5, 0.5, 0.5)[None]).any()
    assert places(t64(0.2, 0.9, 0.2, math.nan)[None])[0, :3].tolist() == [2.5, 1, 2.5]


def list_errors(seed: int = 0, lists: int = 3) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    return torch.rand(lists, 4, dtype=torch.float64), torch.rand(lists, 4, dtype=torch.float64)


def test_rankdpo_identities() -> None:
    student, base = list_errors()
    phi = torch.tensor([[1, 0.5, 0.5, 0], [0.2, 0.9, 0.1, 0.4], [0.7, 0.7, 0.7, 0.7]], dtype=torch.float64)
    values, _ = rankdpo_loss(student, base, phi, 3.0)
    order = [2, 0, 3, 1]
    turned, _ = rankdpo_loss(student[:, order], base[:, order], phi[:, order], 3.0)
    torch.testing.assert_close(values, turned)
    assert values[2] == 0, "equal scores"
    start, _ = rankdpo_loss(base, base, phi, 3.0)
    torch.testing.assert_close(start, math.log(2) * pair_weights(phi).sum((1, 2)) / 6)
    m, r = student[:, :2], base[:, :2]
    dpo, logits = dpo_loss(m[:, 0], m[:, 1], r[:, 0], r[:, 1], 3.0)
    step = 1 / math.log(2) - 1 / math.log(3)
    for scores, weight in (((1.0, 0.0), step), ((0.75, 0.25), step * (2**0.75 - 2**0.25))):
        two = t64(*scores).expand(3, 2)
        found, found_logits = rankdpo_loss(m, r, two, 3.0)
        torch.testing.assert_close(found, weight * dpo, rtol=1e-6, atol=0)
        torch.testing.assert_close(found_logits[:, 0, 1], logits)
        torch.testing.assert_close(rankdpo_loss(m, r, two, 3.0, "weights")[0], dpo)


def test_a_padded_list_is_the_list_without_padding() -> None:
    student, base = list_errors()
    student.requires_grad_()
    phi = torch.tensor([[1, 0.5, 0.2]], dtype=torch.float64).repeat(3, 1)
    padded = torch.cat([phi, torch.full((3, 1), math.nan, dtype=torch.float64)], 1)
    for normalize in ("pairs", "weights"):
        values, _ = rankdpo_loss(student, base, padded, 3.0, normalize)  # type: ignore[arg-type]
        short, _ = rankdpo_loss(student[:, :3], base[:, :3], phi, 3.0, normalize)  # type: ignore[arg-type]
        torch.testing.assert_close(values, short)
    values.sum().backward()
    assert student.grad is not None and bool(torch.isfinite(student.grad).all()) and not student.grad[:, 3].any()


def test_rankdpo_fits_lists_that_carry_other_scores_too() -> None:
    method = make_method("rankdpo", {})
    method.fit({"score_1": t64(0, 0.5), "other_0": t64(7, 7), "score_0": t64(1, 1), "other_1": t64(7, 7)})
    assert method.needs.draws == ("noise", "noise_1")


def test_rankdpo_of_two_under_shared_noise_is_dpo() -> None:
    """On the networks: the same pictures, t and noise as a pair and as a list of two."""
    options = {"beta": 100.0, "shared_noise": True, "normalize": "weights"}
    trainer = warm(make_trainer(make_method("rankdpo", options)))
    batch = batch_of(trainer)
    pair = dict(zip(("chosen", "rejected"), batch.latents.values(), strict=False))
    as_list = replace(batch, latents={f"image_{k}": x for k, x in enumerate(pair.values())})
    as_pair = replace(batch, latents=pair)
    dpo = make_method("dpo", {"beta": 100.0})
    with torch.no_grad():
        found = trainer.method.loss(trainer.ctx, as_list, trainer.method.phases[0])
        other = dpo.loss(trainer.ctx, as_pair, dpo.phases[0])
    torch.testing.assert_close(found.values, other.values, rtol=1e-5, atol=1e-6)
    for name in ("logit", "margin", "accuracy", "chosen_gain", "rejected_gain"):
        torch.testing.assert_close(found.metrics[name], other.metrics[name], rtol=1e-4, atol=1e-6)


def test_pictures_of_a_list_share_t_and_not_the_noise() -> None:
    trainer = make_trainer(make_method("rankdpo", {}))
    batch = batch_of(trainer)
    seen: list[tuple[Tensor, Tensor]] = []
    trainer.ctx.error = lambda role, x, t, cond, target: seen.append((t, target)) or torch.ones(len(x))  # type: ignore
    trainer.method.errors(trainer.ctx, batch)  # type: ignore[attr-defined]
    (t, target), _ = seen
    assert torch.equal(t, t[:4].repeat(4)) and len(set(t.tolist())) == 4
    assert len({float(noise.sum()) for noise in target}) == 16


def test_shares_of_wins() -> None:
    found = shares_of_wins(torch.tensor([[21.0, 19.0, 20.0, 20.0], [3.0, 5.0, 4.0, math.nan]]))
    torch.testing.assert_close(found, torch.tensor([[1, 0, 0.5, 0.5], [0, 1, 0.5, math.nan]]), equal_nan=True)


def test_rankdpo_trains_on_lists_and_pairs(tiny_model_folder: Path, tmp_path: Path) -> None:
    data = tmp_path / "lists"
    data.mkdir()
    for i in range(10):
        picture(i).save(data / f"{i}.png")
    lists = [([i, i + 1, i + 2], [0.9, 0.2, 0.5]) for i in range(6)] + [([7, 8], [0.1, 0.4])]
    rows = [{"prompt": f"a {n}", "images": [f"{k}.png" for k in p], "scores": s} for n, (p, s) in enumerate(lists)]
    (data / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert _run(tiny_model_folder, data, tmp_path / "lists-run", "rankdpo").step == 2
    pairs = write_pairs(tmp_path / "pairs", 6)
    lines = [
        json.loads(line) | {"chosen_score": 21.5, "rejected_score": 20} for line in (pairs / "metadata.jsonl").open()
    ]
    (pairs / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    said = r"'.*pairs': .* the data's lie between 20 and 21.5; set method.scores=wins"
    _refused(tiny_model_folder, pairs, tmp_path / "raw", "rankdpo", said)
    run = _run(tiny_model_folder, pairs, tmp_path / "run", "rankdpo", **{"method.scores": "wins"})
    assert run.step == 2


# ---- CaPO ---------------------------------------------------------------------------------------------------------


def test_calibrated_rewards_are_win_rates() -> None:
    rewards = t64(2.0, 0.0, 1.0, math.nan)
    sig = [1 / (1 + math.exp(-x)) for x in (1.0, 2.0)]
    found = calibrated(rewards)
    expected = [(sig[1] + sig[0]) / 2, (2 - sig[1] - sig[0]) / 2, 0.5]
    assert found[:3].tolist() == pytest.approx(expected) and found[3].isnan()
    pair = calibrated(t64(1.3, 0.2))
    assert (pair[0] - pair[1]).item() == pytest.approx(math.tanh(1.1 / 2))
    torch.testing.assert_close(calibrated(rewards + 7)[:3], found[:3])


def test_pareto_frontiers() -> None:
    """Two rewards: pictures 0 and 1 on top, 2 between, 3 and 4 at the bottom; 5 is in both and so in neither."""
    worth = t64(0.9, 0.6, 0.5, 0.1, 0.4, 0.95, math.nan), t64(0.6, 0.9, 0.5, 0.4, 0.1, 0.05, math.nan)
    upper, lower = frontiers(torch.stack(worth)[None])
    assert upper[0].tolist() == [True, True, False, False, False, False, False]
    assert lower[0].tolist() == [False, False, False, True, True, False, False]
    upper, lower = frontiers(t64(0.2, 0.7, 0.7, 0.1)[None, None])
    assert upper[0].tolist() == [False, True, True, False] and lower[0].tolist() == [False, False, False, True]
    for worth in (t64(0.1, 0.9), t64(0.9, 0.1)), (t64(0.5, 0.5), t64(0.5, 0.5)):
        assert not any(mask.any() for mask in frontiers(torch.stack(worth)[None])), "none is better than the other"


def test_capo_is_ipo_at_a_target_of_one_half() -> None:
    errors = [t64(*values) for values in ((0.1, 0.12), (0.12, 0.11), (0.101, 0.115), (0.119, 0.12))]
    ipo, logits = dpo_loss(*errors, 40.0, "ipo")
    torch.testing.assert_close(capo_loss(logits, t64(0.5, 0.5)), 40.0**2 * ipo)
    assert capo_loss(t64(0.3), t64(0.3)).item() == 0


def test_capo_draws_pairs_from_the_frontiers() -> None:
    trainer = make_trainer(make_method("capo", {"beta": 100.0}))
    method, seen = trainer.method, set()
    for visit in range(12):
        batch = trainer.source.load([0, 1, 2, 3], [visit] * 4)
        worth = calibrated(torch.stack([stacked(batch.columns, name) for name in ("beauty", "truth")], 1))
        upper, lower = frontiers(worth)
        pairs = method.choose(trainer.ctx, batch)  # type: ignore[attr-defined]
        for row in range(4):
            every = [batch.latents[f"image_{k}"][row] for k in range(4)]
            best, worst = (
                next(k for k in range(4) if torch.equal(every[k], pairs.latents[side][row]))
                for side in ("chosen", "rejected")
            )
            if pairs.weight[row]:
                assert upper[row, best] and lower[row, worst]
                expected = (worth[row, :, best] - worth[row, :, worst]).mean()
                torch.testing.assert_close(pairs.columns["target"][row], expected)
                seen.add((row, best, worst))
        assert torch.equal(pairs.weight > 0, upper.any(1))
        again = method.choose(trainer.ctx, trainer.source.load([2], [visit]))  # type: ignore[attr-defined]
        assert torch.equal(again.latents["chosen"][0], pairs.latents["chosen"][2])
    assert len(seen) > 4, "a list gives other pairs at other visits"


def test_capo_starts_at_the_square_of_its_targets_and_weighs_times() -> None:
    trainer = make_trainer(make_method("capo", {"beta": 100.0, "bias": 0.5}))
    batch = batch_of(trainer)
    with torch.no_grad():
        loss = trainer.method.loss(trainer.ctx, batch, trainer.method.phases[0])
    target = trainer.method.choose(trainer.ctx, batch).columns["target"]  # type: ignore[attr-defined]
    torch.testing.assert_close(loss.values, target.square(), rtol=1e-3, atol=1e-4)
    t = torch.tensor([0, 500, 999])
    bars = trainer.ctx.denoiser.alphas_cumprod[t].double()
    expected = torch.sigmoid(0.5 - torch.log(bars / (1 - bars)))
    found = trainer.method.scale(trainer.ctx, t)  # type: ignore[attr-defined]
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-6)


def test_capo_reads_rewards_of_lists(tiny_model_folder: Path, tmp_path: Path) -> None:
    data = tmp_path / "lists"
    data.mkdir()
    for i in range(8):
        picture(i).save(data / f"{i}.png")
    more = {"hps": [0.3, 0.2, 0.25], "pick": [19.0, 21.0, 20.0]}
    rows: list[dict[str, Any]] = [
        {"prompt": f"a {n}", "images": [f"{n + k}.png" for k in range(3)], "scores": [0.4, 0.9, 0.1], **more}
        for n in range(5)
    ]
    rows[4] |= {"pick": [1.0]}
    (data / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found, report = read_rows(DataRecipe(path=str(data), rewards=["hps", "pick"]), "ranked")
    assert report.counts == {"malformed row": 1} and found[0].columns["pick_0"] == 21.0
    assert found[0].rewards == (("hps", (0.2, 0.3, 0.25)), ("pick", (21.0, 19.0, 20.0))), "in the order of the scores"
    run = _run(tiny_model_folder, data, tmp_path / "run", "capo", **{"data.rewards": "[hps,pick]"})
    assert run.step == 2
    with pytest.raises(UserError, match=r"no column 'hpsv2'; it has .*; did you mean 'hps'"):
        _run(tiny_model_folder, data, tmp_path / "other", "capo", **{"data.rewards": "[hpsv2]"})
    with pytest.raises(UserError, match=r"data.rewards names columns of ranked lists"):
        _run(tiny_model_folder, write_pairs(tmp_path / "p", 4), tmp_path / "none", "capo", **{"data.rewards": "[hps]"})


# ---- all three ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["kto", "rankdpo"])
def test_the_better_are_drawn_near_and_the_worse_pushed_off(name: str) -> None:
    """Which way each picture's own error is to go: down for liked or best ones, up for the others."""
    trainer = make_trainer(make_method(name, {"beta": 100.0}))
    batch, leaf = batch_of(trainer, [0, 1]), torch.empty(0)

    def error(role: str, x_t: Tensor, *rest: Tensor) -> Tensor:
        nonlocal leaf
        found = torch.full((len(x_t),), 0.1, requires_grad=role == "student")
        leaf = found if role == "student" else leaf
        return found

    trainer.ctx.error = error  # type: ignore[method-assign]
    trainer.ctx.stats = trainer.statistics([batch])
    trainer.method.loss(trainer.ctx, batch, trainer.method.phases[0]).values.sum().backward()
    assert leaf.grad is not None
    if name == "kto":
        assert batch.columns["label"].tolist() == [-1, 1] and leaf.grad[0] < 0 < leaf.grad[1]
    else:
        assert bool((leaf.grad[:2] > 0).all()) and bool((leaf.grad[6:] < 0).all()), "the first picture, the last"


def test_capo_pulls_towards_its_target() -> None:
    four = [t64(0.1).requires_grad_() for _ in range(4)]
    method = make_method("capo", {"beta": 100.0})
    values, _ = method.objective(PairErrors(*four, columns={"target": t64(0.5)}))  # type: ignore[attr-defined]
    values.sum().backward()
    assert four[0].grad is not None and four[1].grad is not None and four[0].grad > 0 > four[1].grad


@pytest.mark.slow
@pytest.mark.parametrize("name", ["kto", "rankdpo", "capo"])
def test_sdxl_trains_and_is_planned(name: str, tiny_sdxl_folder: Path, tmp_path: Path) -> None:
    """Two steps of the SDXL (KTO: SD1.5) recipe's method on SDXL's architecture, and the real recipe's plan."""
    data = write_pairs(tmp_path / "pairs", 8)
    found = {"method.scores": "wins"} if name == "rankdpo" else {}
    _run(tiny_sdxl_folder, data, tmp_path / "run", name, **{"data.rewards": "[]", **found})
    real = "sd15/kto" if name == "kto" else f"sdxl/{name}"
    plan = make_plan(load_recipe(real, [f"data.path={data}", "data.rewards=[]", "validate.pairs=2"]), card=80 * 10**9)
    looks = {"kto": 3, "rankdpo": 4, "capo": 4}[name]  # pictures through the U-Net a row: KTO looks at each beforehand
    assert plan.calls_per_step == looks * plan.batch and plan.memory["whole"]
