"""Sampling inside training: the steps and their densities (online sheet 0.1, 0.2, C.1 to C.5, D 1 to 5, 22, 35 to 38),
walks that fork, and what a round keeps."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EulerAncestralDiscreteScheduler
from tiny import SD_SCHEDULE
from torch import Tensor
from world import Rows, make_context, make_roles

from diffalign.context import Context
from diffalign.data.batch import Batch
from diffalign.denoiser import Denoiser, log_prob
from diffalign.families.schedulers import recorded_scheduler
from diffalign.methods import make_method
from diffalign.methods.rollout import step_kl
from diffalign.rollouts import Policy, Rollouts, Walk, deal, few_steps, many_steps

SD = Denoiser.from_config(SD_SCHEDULE)
# t: (sigma, w, |a| / sigma) of SPO's grid: leading, N = 20, eta = 1
GOLDEN = {
    951: (0.6444, 0.364, 0.853),
    751: (0.5576, 0.256, 0.716),
    551: (0.4565, 0.202, 0.635),
    351: (0.3442, 0.202, 0.636),
    151: (0.2144, 0.376, 0.868),
    101: (0.1673, 0.651, 1.141),
    51: (0.0406, 14.75, 5.431),
    1: (0.0206, 0.503, 1.003),
}


def many(steps: int = 20, spacing: str = "leading", **options: Any) -> Policy:
    return Policy(*many_steps(SD, steps, spacing), **options)


def pull(policy: Policy, denoiser: Denoiser = SD) -> Tensor:
    """d mean / d output of each step, by autograd on the kernel itself."""
    output = torch.zeros(len(policy), 1, 1, 1, requires_grad=True)
    x, t, s = torch.zeros(len(policy), 1, 1, 1), torch.tensor(policy.times), torch.tensor(policy.ends)
    policy.step(denoiser, output, x, t, s).mean.sum().backward()
    assert output.grad is not None
    return output.grad.flatten()


def test_the_golden_table_of_ddim() -> None:
    policy = many()
    assert policy.times == (*range(951, 0, -50),) and policy.ends[-2:] == (1, 0)
    stds, slopes = policy.stds(SD), pull(policy)
    assert policy.trainable(SD) == list(range(20)), "the last step has a likelihood too"
    for t, (std, weight, ratio) in GOLDEN.items():
        k = policy.times.index(t)
        assert float(stds[k]) == pytest.approx(std, abs=6e-5)
        assert float(slopes[k] ** 2 / (2 * stds[k] ** 2)) == pytest.approx(weight, rel=2e-3)
        assert float(slopes[k].abs() / stds[k]) == pytest.approx(ratio, abs=6e-4) and float(slopes[k]) < 0
    for steps, spacing, t, end, std, weight in (
        (20, "trailing", 49, 0, 0.0289, 28.73),
        (20, "trailing", 499, 449, 0.4282, 0.196),
        (50, "leading", 21, 1, 0.0395, 5.36),
        (50, "leading", 981, 961, 0.4545, 0.131),
    ):
        policy = many(steps, spacing)
        k = policy.times.index(t)
        assert policy.ends[k] == end and float(policy.stds(SD)[k]) == pytest.approx(std, abs=6e-5)
        assert float(pull(policy)[k] ** 2 / (2 * policy.stds(SD)[k] ** 2)) == pytest.approx(weight, rel=4e-3)


def test_the_golden_tables_of_few_steps() -> None:
    """DMD2's four steps, and SDXL-Turbo's in Euler-ancestral's own scale of the latents."""
    renoise = Policy(*few_steps((999, 749, 499, 249)), kernel="renoise")
    stds, slopes = renoise.stds(SD), pull(renoise)
    assert renoise.trainable(SD) == [0, 1, 2] and float(stds[3]) == 0, "the last step has no likelihood"
    assert stds[:3].tolist() == pytest.approx([0.9713, 0.8499, 0.5697], abs=1e-4)
    assert (slopes[:3] ** 2 / (2 * stds[:3] ** 2)).tolist() == pytest.approx([6.410, 3.202, 2.707], rel=1e-3)
    turbo = Policy(*few_steps((999, 749, 499, 249)))
    up = turbo.stds(SD)[:3] / SD.alpha(torch.tensor(turbo.ends[:3])).flatten()
    assert up.tolist() == pytest.approx([3.9193, 1.4816, 0.6259], abs=2e-4)
    weights = pull(turbo)[:3] ** 2 / (2 * turbo.stds(SD)[:3] ** 2)
    assert weights.tolist() == pytest.approx([5.910, 2.702, 2.207], rel=1e-3)


def test_ancestral_steps_are_those_of_diffusers() -> None:
    torch.manual_seed(0)
    schedule = {k: v for k, v in SD_SCHEDULE.items() if k != "set_alpha_to_one"}
    scheduler = EulerAncestralDiscreteScheduler(**schedule | {"timestep_spacing": "trailing"})
    scheduler.set_timesteps(4)
    policy = Policy(*few_steps([int(t) for t in scheduler.timesteps]))
    x = torch.randn(1, 4, 2, 2)
    for k, t in enumerate(scheduler.timesteps):
        eps, scale = torch.randn_like(x), SD.alpha(policy.times[k])
        torch.manual_seed(5)
        theirs = scheduler.step(eps, t, x / scale).prev_sample
        torch.manual_seed(5)
        noise = torch.randn_like(x)
        ours = policy.step(SD, eps, x, t.long()[None], torch.tensor([policy.ends[k]]), noise)
        x = ours.sample
        end = SD.alpha(policy.ends[k]) if policy.ends[k] >= 0 else 1.0
        torch.testing.assert_close(ours.sample / end, theirs, rtol=2e-4, atol=2e-4)


def test_a_step_is_ddims_and_at_full_eta_the_posterior() -> None:
    torch.manual_seed(0)
    x, eps, noise = (torch.randn(1, 4, 8, 8) for _ in range(3))
    policy = many()
    ddim, ddpm = (
        DDIMScheduler(**SD_SCHEDULE, clip_sample=False),
        DDPMScheduler.from_config(SD_SCHEDULE | {"clip_sample": False}),
    )
    ddim.set_timesteps(20)
    ddpm.set_timesteps(20)
    for k in (0, 7, 18):
        t, s = torch.tensor([policy.times[k]]), torch.tensor([policy.ends[k]])
        ours = policy.step(SD, eps, x, t, s, noise)
        torch.testing.assert_close(ours.sample, ddim.step(eps, int(t), x, eta=1.0, variance_noise=noise).prev_sample)
        assert float(ours.std) ** 2 == pytest.approx(float(ddpm._get_variance(int(t))), rel=1e-4)
        still = policy.step(SD, eps, x, t, s, eta=0.0)
        torch.testing.assert_close(still.sample, ddim.step(eps, int(t), x, eta=0.0).prev_sample)


def test_densities_are_torchs() -> None:
    torch.manual_seed(0)
    x, eps, noise = (torch.randn(4, 4, 8, 8, dtype=torch.float64) for _ in range(3))
    flow = Denoiser.from_config({"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000})
    for denoiser, policy in (
        (SD, many()),
        (SD, many(eta=0.3)),
        (SD, Policy(*few_steps((999, 749, 499, 249)), kernel="renoise")),
        (flow, Policy(*few_steps((999, 749, 499, 249)), kernel="flow", eta=0.7)),
    ):
        t, s = torch.tensor(policy.times[-5:-1][:3]), torch.tensor(policy.ends[-5:-1][:3])
        found = policy.step(denoiser, eps[:3], x[:3], t, s, noise[:3])
        expected = torch.distributions.Normal(found.mean, found.std.expand_as(found.mean)).log_prob(found.sample)
        torch.testing.assert_close(
            log_prob(found.sample, found.mean, found.std), expected.mean((1, 2, 3)), rtol=1e-6, atol=1e-6
        )


def test_the_flow_sde_at_its_start_and_without_noise() -> None:
    """Sheet 0.2: at s = 1 the std is the level and the mean x (1 - a^2/2) + v ds; without noise Euler."""
    flow = Denoiser.from_config({"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000})
    x, v = torch.randn(1, 4, 2, 2), torch.randn(1, 4, 2, 2)
    t, s = torch.tensor([999]), torch.tensor([899])
    policy = Policy((999, 899), (899, 799), "flow", 0.7)
    found = policy.step(flow, v, x, t, s)
    assert float(found.std) == pytest.approx(0.7, rel=1e-5)
    torch.testing.assert_close(found.mean, x * (1 - 0.7**2 / 2) - 0.1 * v, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(policy.step(flow, v, x, t, s, eta=0.0).mean, x - 0.1 * v, rtol=1e-5, atol=1e-5)


# online sheet C.6: variance of unit data after each of ten steps (shift 3) under the exact velocity, but for the last
CONTRACTED = {
    ("flow", 0.7): [1.007, 0.992, 0.899, 0.800, 0.703, 0.613, 0.541, 0.507, 0.558],
    ("flow", 0.0): [0.930, 0.855, 0.776, 0.694, 0.610, 0.532, 0.467, 0.437, 0.482],
    ("cps", 0.7): [0.930, 0.854, 0.772, 0.684, 0.592, 0.499, 0.413, 0.353, 0.358],
}
FLOW = Denoiser.from_config({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0})
TENTHS = tuple(range(999, 0, -100))


@pytest.mark.parametrize(("kernel", "level"), CONTRACTED)
def test_what_becomes_of_the_variance_of_flows(kernel: Any, level: float) -> None:
    policy, variance, found = Policy(TENTHS, (*TENTHS[1:], -1), kernel, level), 1.0, []
    one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    for t, end in pairwise(TENTHS):
        s = FLOW.sigma(t).double()
        v = (2 * s - 1) / ((1 - s) ** 2 + s**2) * one
        step = policy.step(FLOW, v, one, torch.tensor([t]), torch.tensor([end]))
        variance = float(step.mean) ** 2 * variance + float(step.std) ** 2
        found.append(variance)
    assert found == pytest.approx(CONTRACTED[kernel, level], abs=6e-4)
    if (kernel, level) == ("flow", 0.7):  # C.5
        stds = [0.700, 0.738, 0.532, 0.442, 0.388, 0.350, 0.320, 0.291, 0.256]
        assert policy.stds(FLOW)[:-1].tolist() == pytest.approx(stds, abs=6e-4) and policy.trainable(FLOW) == [
            *range(9)
        ]


def test_dances_sde_is_flow_grpos_at_its_rate() -> None:
    """D 38: with g = eta mean and std are the same; and D 37: what Flow-GRPO's code calls its KL is |ds| times ours."""
    torch.manual_seed(0)
    x, v, other = torch.randn(3, 1, 4, 2, 2, dtype=torch.float64)
    t, end = torch.tensor([799]), torch.tensor([699])
    s, ds = float(FLOW.sigma(799)), float(FLOW.sigma(699)) - float(FLOW.sigma(799))
    dance, flow = (Policy((799, 699), (699, 599), kernel, 0.3) for kernel in ("dance", "flow"))
    one = dance.step(FLOW, v, x, t, end)
    two = flow.step(FLOW, v, x, t, end, eta=0.3 * ((1 - s) / s) ** 0.5)
    torch.testing.assert_close(one.mean, two.mean)
    torch.testing.assert_close(one.std, two.std)
    assert float(one.std) == pytest.approx(0.3 * (-ds) ** 0.5, rel=1e-5)
    base = dance.step(FLOW, other, x, t, end)
    pair = (torch.distributions.Normal(m, one.std.expand_as(m)) for m in (one.mean, base.mean))
    true = torch.distributions.kl_divergence(*pair).mean()
    torch.testing.assert_close(step_kl(one.mean, base.mean, one.std)[0], true)
    theirs = (one.mean - base.mean).square().mean() / (2 * 0.3**2)
    torch.testing.assert_close(theirs, -ds * true, rtol=1e-5, atol=0)


@pytest.mark.parametrize(("times", "ends"), [((1, 2), (0, 0)), ((), ()), ((5, 3), (3,)), ((5,), (5,))])
def test_wrong_grids_are_refused(times: tuple[int, ...], ends: tuple[int, ...]) -> None:
    with pytest.raises(ValueError):
        Policy(times, ends)


# ---- walks -----------------------------------------------------------------------------------------------------------


def world(rows: int = 3, **options: Any) -> tuple[Context, Batch]:
    return make_context(make_roles(), **options), Rows(kind="prompt").batch(range(rows), [0] * rows)


def walked(walk: Walk) -> list[Any]:
    return [walk.step() for _ in range(len(walk.policy))]


def test_a_walk_is_the_same_again_and_alone() -> None:
    ctx, batch = world()
    policy = many(4, guidance=3.0)
    first, again = (walked(Walk(ctx, batch, policy, members=2)) for _ in range(2))
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a.x_s, b.x_s) and torch.equal(a.log_prob, b.log_prob), "bit for bit"
    alone = walked(Walk(ctx, batch.take([1]), policy, members=2))
    torch.testing.assert_close(alone[-1].x_s, first[-1].x_s[2:4], rtol=1e-4, atol=1e-4)
    other = Walk(make_context(make_roles(), seed=1), batch, policy, members=2)
    assert not torch.equal(other.x, Walk(ctx, batch, policy, members=2).x)
    for a, b in pairwise(first):
        assert torch.equal(a.x_s, b.x_t)
        drawn = (a.x_s - a.mean) / a.std
        torch.testing.assert_close(a.log_prob, log_prob(a.x_s, a.mean, a.std))
        assert abs(float(drawn.std()) - 1) < 0.1
    again_out = policy.step(
        ctx.denoiser, Walk(ctx, batch, policy, members=2).output(), first[0].x_t, first[0].t, first[0].s
    )
    assert torch.equal(again_out.mean, first[0].mean), "a recorded step is replayed from its input"


def test_no_noise_of_a_walk_has_two_uses() -> None:
    """The first noise and each step's, of each member of each prompt: all of their own."""
    ctx, batch = world()
    walk = Walk(ctx, batch, many(4, guidance=1.0), members=2)
    drawn = [walk.x, *((taken.x_s - taken.mean) / taken.std for taken in walked(walk))]
    table = torch.corrcoef(torch.cat(drawn).flatten(1))  # the last step's std is small, and so its noise is rounded
    assert table.shape == (30, 30)
    assert float((table - torch.eye(30)).abs().max()) < 0.3


def test_forks_share_their_past_and_one_call() -> None:
    ctx, batch = world()
    policy, calls = many(6), []
    ctx.roles.unet.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    walk = Walk(ctx, batch, policy)
    walk.step(), walk.step()
    parents = walk.x.clone()
    walk.output()
    walk.fork(2)
    assert walk.ids[:3] == ["row-0.0.0", "row-0.0.1", "row-1.0.0"] and walk.row == [0, 0, 1, 1, 2, 2]
    assert torch.equal(walk.x, parents.repeat_interleave(2, 0))
    taken = walk.step()
    assert calls == [3, 3, 3], "children take their parent's output"
    assert torch.equal(taken.mean[0], taken.mean[1]) and not torch.equal(taken.x_s[0], taken.x_s[1])
    walk.take([1, 2, 5])
    assert walk.row == [0, 1, 2] and torch.equal(walk.x, taken.x_s[[1, 2, 5]])
    walk.step()
    assert calls[-1] == 3
    plain = Walk(ctx, batch, policy)
    plain.step(), plain.step()
    plain.fork(1)
    assert plain.ids[0] == "row-0.0" and torch.equal(plain.x, parents), "one child is the plain walk"
    assert plain.fork([1, 3, 1]) == [0, 1, 1, 1, 2] and plain.row == [0, 1, 1, 1, 2]
    assert plain.ids == ["row-0.0", "row-1.0.0", "row-1.0.1", "row-1.0.2", "row-2.0"]


def test_each_sample_may_have_a_noise_level_of_its_own() -> None:
    """The steps of the same levels for all; without noise there is no density."""
    for kernel, denoiser in (("ddim", SD), ("flow", FLOW), ("dance", FLOW), ("cps", FLOW)):
        policy = Policy((799, 699), (699, 599), kernel, 1.0)  # type: ignore[arg-type]
        torch.manual_seed(0)
        x, v, noise = torch.randn(3, 3, 4, 2, 2)
        t, s, levels = torch.full((3,), 799), torch.full((3,), 699), torch.tensor([0.0, 0.3, 0.9])
        mixed = policy.step(denoiser, v, x, t, s, noise, levels)
        for i, level in enumerate(levels.tolist()):
            alone = policy.step(denoiser, v, x, t, s, noise, level)
            torch.testing.assert_close(mixed.mean[i], alone.mean[i], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(mixed.std[i], alone.std[i], rtol=1e-4, atol=1e-5)
    ctx, batch = world()
    taken = Walk(ctx, batch, many(4)).step(torch.tensor([0.0, 1.0, 0.5]))
    assert taken.log_prob is not None and taken.log_prob.isnan().tolist() == [True, False, False]
    assert torch.equal(taken.x_s[0], taken.mean[0])


def test_members_may_share_their_start_and_noise_may_be_left_out() -> None:
    ctx, batch = world()
    shared = Walk(ctx, batch, many(4), members=2, shared_noise=True)
    assert torch.equal(shared.x[0], shared.x[1]) and not torch.equal(shared.x[0], shared.x[2])
    taken = shared.step()
    assert not torch.equal(taken.x_s[0], taken.x_s[1])
    still = Walk(ctx, batch, many(4, eta=0.0), members=2, shared_noise=True)
    ends = walked(still)
    assert torch.equal(ends[-1].x_s[0], ends[-1].x_s[1]), "without noise both go the same way"
    assert all(step.log_prob is None for step in ends), "and have no likelihood"
    few = walked(Walk(ctx, batch, Policy(*few_steps((999, 499)), kernel="renoise")))
    assert few[0].log_prob is not None and few[1].log_prob is None
    shifted = Walk(ctx, batch, many(4), shifts=[0, 7, 20])
    assert shifted.t.tolist() == [751, 758, 771] and shifted.step().s.tolist() == [501, 508, 521]


def test_on_policy_the_ratio_is_one_and_rounded_records_drift() -> None:
    """A step recomputed from its record in another batch: equal to rounding, if the record is fp32 (it is)."""
    found = {}
    for name, compute, kept in (
        ("fp32", None, torch.float32),
        ("bf16", torch.bfloat16, torch.float32),
        ("bf16, kept in bf16", torch.bfloat16, torch.bfloat16),
    ):
        ctx, batch = world(autocast=compute)
        walk, far = Walk(ctx, batch, many(10, guidance=5.0), members=2), []
        for taken in walked(walk):
            assert taken.log_prob is not None
            for i in (0, 5):
                x_t, x_s = (x[[i]].to(kept).float() for x in (taken.x_t, taken.x_s))
                output = ctx.model("student", x_t, taken.t[[i]], walk.told().take([i]), 5.0)
                again = walk.policy.step(ctx.denoiser, output, x_t, taken.t[[i]], taken.s[[i]])
                far.append(float(torch.exp(log_prob(x_s, again.mean, again.std) - taken.log_prob[[i]]) - 1))
        found[name] = max(abs(x) for x in far)
    print("largest |ratio - 1| on policy:", ", ".join(f"{name} {drift:.1e}" for name, drift in found.items()))
    assert found["fp32"] < 1e-5 and found["bf16"] < 0.1 and found["bf16, kept in bf16"] > 1e-3


# ---- what a round keeps ----------------------------------------------------------------------------------------------


def rollouts(rows: int = 3, each: int = 5) -> Rollouts:
    _, batch = world(rows)
    row = [r for r in range(rows) for _ in range(each)]
    ids = [f"{batch.ids[r]}@{i}" for i, r in enumerate(row)]
    latents = {"x_t": torch.arange(len(row)).float()[:, None, None, None].expand(-1, 4, 8, 8)}
    return Rollouts(batch, ids, row, latents, {"n": torch.arange(len(row)) * 1.0}, torch.ones(len(row)))


def test_items_are_batches_with_their_prompts_text() -> None:
    found = rollouts()
    found.weight[7] = 0
    batch = found.take([0, 7, 14])
    assert batch.ids == ("row-0@0", "row-1@7", "row-2@14") and batch.prompts == ("a row-0", "a row-1", "a row-2")
    assert torch.equal(batch.cond["prompt"].embeds, found.prompts.cond["prompt"].embeds)
    assert batch.columns["n"].tolist() == [0, 7, 14] and batch.weight.tolist() == [1, 0, 1]
    found.prompts.weight[2] = 0
    assert found.kept() == [0, 1, 2, 3, 4, 5, 6, 8, 9]


def test_dealing_is_a_prompts_own_affair() -> None:
    found = rollouts()
    parts = deal(found, range(15), 2, 0, "policy", 0)
    assert sorted(parts[0] + parts[1]) == list(range(15)) and 6 <= len(parts[0]) <= 9
    alone = deal(found, range(5, 10), 2, 0, "policy", 0)
    assert alone == [[i for i in part if 5 <= i < 10] for part in parts]
    assert deal(found, range(15), 2, 0, "policy", 1) != parts != deal(found, range(15), 2, 1, "policy", 0)
    assert math.isclose(sum(map(len, deal(found, range(15), 20, 0, "policy", 0))), 15)
    few = deal(rollouts(12, 3), range(36), 8, 0, "policy", 0)
    assert min(map(len, few)) > 0 and max(map(len, few)) < 9, "the first updates have no more than the others"


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_a_few_step_student_is_recorded_as_it_is_walked(eta: float) -> None:
    """Uneven times, the last step onto x0; with eta = 1 the same noise is added."""
    method = make_method("nft", {"timesteps": [979, 701, 222], "eta": eta, "guidance": 2.0})
    record = method.sampling(SD_SCHEDULE)
    assert record is not None and record.deterministic == (eta == 0) and record.guidance == 2.0
    scheduler = recorded_scheduler(record)
    scheduler.set_timesteps(timesteps=list(record.timesteps))
    policy = method.policy(SD)  # type: ignore[attr-defined]
    torch.manual_seed(0)
    x = theirs = torch.randn(1, 4, 2, 2)
    for t, s in zip(policy.times, policy.ends, strict=True):
        eps, noise = torch.randn(2, 1, 4, 2, 2)
        theirs = scheduler.step(eps, t, theirs, variance_noise=noise).prev_sample
        x = policy.step(SD, eps, x, torch.tensor([t]), torch.tensor([s]), noise).sample
        torch.testing.assert_close(x, theirs, rtol=2e-4, atol=2e-4)
