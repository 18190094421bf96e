"""Dynamic-TreeRPO: the online sheet's section 10 and catalogue 44, what a tree costs, and what is refused."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from test_online import bright, method
from tiny import SD_SCHEDULE
from world import make_trainer, rows_of, stirred, warm

from diffalign.denoiser import Denoiser
from diffalign.errors import UserError
from diffalign.methods.online.tree_rpo import means_below, tree_passes
from diffalign.rollouts import Rollouts
from diffalign.trainer import Trainer

SD = Denoiser.from_config(SD_SCHEDULE)


def grown(train: dict[str, Any] | None = None, **options: Any) -> Trainer:
    made = method("tree_rpo", **{"members": 1, "steps": 6, "depth": 2, "branch": 2, "share": 1.0, **options})
    trainer = stirred(make_trainer(made, **train or {}))
    trainer.ctx.rewards = {"tiny-pickscore": bright}
    return trainer


def collected(trainer: Trainer, rows: Any = (0, 1, 2)) -> Rollouts:
    with torch.no_grad():
        return trainer.method.collect(trainer.ctx, rows_of(trainer, rows))  # type: ignore[return-value]


def test_one_child_is_a_plain_rollout() -> None:
    """The steps of GRPO, their densities and advantages, where the window is all of the sampling."""
    options = {"members": 3, "steps": 4, "share": 1.0}
    tree, plain = grown(branch=1, depth=4, **options), stirred(make_trainer(method("ddpo", **options)))
    plain.ctx.rewards = {"tiny-pickscore": bright}
    one, other = collected(tree), collected(plain)
    assert one.ids == other.ids and one.row == other.row
    for name in ("x_t", "x_s"):
        torch.testing.assert_close(one.latents[name], other.latents[name], rtol=1e-4, atol=1e-4)
    for name in ("t", "s", "old", "reward", "prompt_mean", "prompt_std"):
        torch.testing.assert_close(one.columns[name], other.columns[name], rtol=1e-3, atol=1e-3)


def test_siblings_share_all_that_came_before_and_leaves_are_counted() -> None:
    trainer, seen = grown(start=2, depth=2, branch=3), Counter[int]()
    trainer.roles.unet.register_forward_pre_hook(lambda module, args: seen.update({"passes": len(args[0])}))
    found = collected(trainer, [0, 1])
    assert seen["passes"] == 2 * tree_passes(6, 2, 2, 3) == 2 * (2 + 1 + 3 + 2 * 9)
    at = {name: i for i, name in enumerate(found.ids)}
    assert len(at) == 2 * (3 + 9) and found.metrics["reward"].shape == (2,)
    for row in (0, 1):
        first = [at[f"row-{row}.0.{a}@2"] for a in range(3)]
        for a in first:
            assert torch.equal(found.latents["x_t"][a], found.latents["x_t"][first[0]]), "bit for bit"
        assert not torch.equal(found.latents["x_s"][first[0]], found.latents["x_s"][first[1]])
        for a in range(3):
            for b in range(3):
                child = at[f"row-{row}.0.{a}.{b}@3"]
                assert torch.equal(found.latents["x_t"][child], found.latents["x_s"][first[a]])
    assert set(found.columns["t"].tolist()) == set(torch.tensor(trainer.method.policy(SD).times)[[2, 3]].tolist())


def test_a_nodes_advantage_is_the_mean_of_its_leaves() -> None:
    """Of all leaves of the prompt; or, beside its siblings, what this one step changed."""
    assert means_below([0, 0, 1, 1, 1], torch.tensor([1.0, 3.0, 0.0, 3.0, 6.0])).tolist() == [2, 3]
    leaves = torch.tensor([0.0, 1.0, 4.0, 7.0])
    trainers = {credit: grown(start=1, credit=credit) for credit in ("leaves", "siblings")}
    for credit, trainer in trainers.items():
        trainer.method.score = lambda ctx, latents, texts: leaves.repeat(len(latents) // 4)[:, None]  # type: ignore
        found = collected(trainer, [0])
        advantage = dict(zip(found.ids, trainer.method.advantage(found.columns, found.stats).tolist(), strict=True))  # type: ignore
        mean, std = leaves.mean(), leaves.std(unbiased=False)
        expected = {f"row-0.0.{a}.{b}@2": leaves[2 * a + b] for a in (0, 1) for b in (0, 1)}
        expected |= {f"row-0.0.{a}@1": leaves[2 * a : 2 * a + 2].mean() for a in (0, 1)}
        for name, value in expected.items():
            parent = mean if name.endswith("@1") else leaves[2 * int(name.split(".")[2]) :][:2].mean()
            off = value - (mean if credit == "leaves" else parent)
            assert advantage[name] == pytest.approx(float(off / std), abs=1e-4), (credit, name)
        at = {name: i for i, name in enumerate(found.ids)}
        own = [advantage[f"row-0.0.1.{b}@2"] for b in (0, 1)]
        if credit == "leaves":
            assert advantage["row-0.0.1@1"] == pytest.approx(sum(own) / 2, abs=1e-5)
        else:
            assert sum(own) == pytest.approx(0, abs=1e-5)
        assert len(at) == 6


def test_depth_one_with_two_children_is_spos_pair() -> None:
    """One state, two ways on, opposite advantages by who ended better; without the gate the gradient of DPO's pair."""
    trainer = grown(start=3, depth=1, clip=0.9)
    found = collected(trainer)
    ones = {name: i for i, name in enumerate(found.ids)}
    for row in range(3):
        a, b = ones[f"row-{row}.0.0@3"], ones[f"row-{row}.0.1@3"]
        assert torch.equal(found.latents["x_t"][a], found.latents["x_t"][b])
        advantage = trainer.method.advantage(found.columns, found.stats)  # type: ignore[attr-defined]
        assert advantage[a] == pytest.approx(-float(advantage[b]), abs=1e-4) and abs(float(advantage[a])) > 0.9
        assert (float(advantage[a]) > 0) == (float(found.columns["reward"][a] - found.columns["reward"][b]) > 0)


def test_windows_slide_and_noise_follows_depth() -> None:
    trainer = grown(steps=8, depth=3, eta=1.0, eta_end=0.4, skip_last=True)
    assert trainer.method.windows(SD) == [0, 1, 2, 3, 4] and trainer.method.layers() == pytest.approx([1.0, 0.7, 0.4])  # type: ignore
    found = collected(trainer, range(8))
    times = list(trainer.method.policy(SD).times)  # type: ignore[attr-defined]
    steps = [times.index(int(t)) for t in found.columns["t"]]
    starts = {min(k for k, row in zip(steps, found.row, strict=True) if row == prompt) for prompt in range(8)}
    assert len(starts) > 2 and starts <= {0, 1, 2, 3, 4}
    for i, name in enumerate(found.ids):
        layer = name.count(".") - 2
        assert float(found.columns["eta"][i]) == pytest.approx([1.0, 0.7, 0.4][layer])
    again = trainer.method.replay(trainer.ctx, "student", found.latents["x_t"], found.take(range(len(found))))  # type: ignore
    z = (found.latents["x_s"] - again.mean) / again.std
    assert abs(float(z.mean())) < 0.02 and abs(float(z.std()) - 1) < 0.02, "a step is replayed with its own noise level"


def test_a_round_is_on_policy() -> None:
    trainer = grown(start=3, steps=4, depth=1, updates=2, clip=1e-4, train={"lr": 1e-30, "weight_decay": 0.0})
    trainer.train_step()
    values = trainer.meter.read(lambda x: x)
    assert values["ratio"] == 1 and values["drift"] < 1e-4 and values["idle"] == 0 and values["kl"] > 0


@pytest.mark.slow
def test_the_reward_goes_up() -> None:
    trainer = grown(start=2, train={"lr": 3e-3, "batch": 8}, updates=2, clip=0.1)
    before = collected(trainer, range(12)).metrics["reward"].mean()
    warm(trainer, 40)  # the first ones go down
    assert float(collected(trainer, range(12)).metrics["reward"].mean()) > float(before) + 0.03


def test_what_a_tree_costs_is_told() -> None:
    said = method("tree_rpo", steps=10, depth=3, branch=2, members=1).warnings(SD)[-1]
    mean = sum(tree_passes(10, start, 3, 2) for start in range(8)) / 8
    assert said == f"8 samples of a prompt take {mean:g} U-Net passes, and would take 80 if each went alone"
    assert tree_passes(10, 0, 10, 1) == 10 and tree_passes(4, 4 - 2, 2, 3) == 2 + 1 + 3


def test_what_is_refused() -> None:
    for options, expected in (
        ({"depth": 7, "steps": 6}, "finds no window among the 6 of 6 steps"),
        ({"start": 5, "depth": 2, "steps": 6}, "no window from step 5 on .* or method.start"),
        ({"timesteps": [999, 749, 499], "sampler": "renoise", "depth": 1}, "set method.sampler=ddim"),
        ({"eta": 0.0}, "method.eta=0 makes sampling deterministic"),
    ):
        with pytest.raises(UserError, match=expected):
            method("tree_rpo", **options).check(SD)
    with pytest.raises(ValidationError, match="nothing to be compared with"):
        method("tree_rpo", members=1, branch=1)
    with pytest.raises(ValidationError, match="set mean=prompt"):
        method("tree_rpo", credit="siblings", mean="batch", std="batch")
    record = method("tree_rpo", timesteps=[999, 749, 499]).sampling(SD_SCHEDULE)
    assert record is not None and record.deterministic, "outside of windows there is no noise"
