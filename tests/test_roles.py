"""Roles: the three traps of switched adapters, both storages, features, EMA."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from world import Rows, make_context, make_roles

from diffalign.roles import Ema, Roles


def perturbed(roles: Roles) -> Roles:
    """Adapters away from their neutral start."""
    with torch.no_grad():
        for k, role in enumerate(roles.trained):
            torch.manual_seed(k)
            for p in roles.parameters(role):
                p.add_(0.3 * torch.randn_like(p))
    return roles


def inputs(n: int = 2) -> tuple:
    batch = Rows().batch(range(n), [0] * n)
    return batch.latents["chosen"], torch.tensor([100, 700][:n]), batch.cond["prompt"]


@pytest.mark.parametrize("storage", ["adapters", "copies"])
def test_every_role_is_its_own_network(storage: str) -> None:
    roles = perturbed(make_roles(("student", "fake"), storage))
    x, t, cond = inputs()
    with torch.no_grad():
        outputs = {role: roles(role, x, t, cond) for role in ("base", "student", "fake")}
        again = roles("base", x, t, cond)
    assert torch.equal(outputs["base"], again)
    for a, b in (("base", "student"), ("base", "fake"), ("student", "fake")):
        assert float((outputs[a] - outputs[b]).abs().max()) > 1e-3


@pytest.mark.parametrize("storage", ["adapters", "copies"])
def test_new_roles_equal_the_base(storage: str) -> None:
    roles = make_roles(("student", "fake"), storage)
    x, t, cond = inputs()
    with torch.no_grad():
        base = roles("base", x, t, cond)
        assert torch.equal(roles("student", x, t, cond), base) and torch.equal(roles("fake", x, t, cond), base)


def test_switching_touches_a_kept_list_and_no_requires_grad(monkeypatch: pytest.MonkeyPatch) -> None:
    roles = make_roles(("student", "fake"))
    roles.train_only(("fake",))
    before = {n: p.requires_grad for n, p in roles.unet.named_parameters()}
    x, t, cond = inputs()
    with torch.no_grad():
        for role in ("student", "base", "fake", "base", "student"):
            roles(role, x, t, cond)

    def walk(*args: object, **options: object) -> None:
        raise AssertionError("a switch walked the module tree")

    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.Module, "named_modules", walk)
        for role in ("base", "fake", "base", "student"):
            roles.activate(role)
    assert {n: p.requires_grad for n, p in roles.unet.named_parameters()} == before
    assert {n for n, on in before.items() if on} == {n for n in before if ".fake." in n}


def test_checkpointing_recomputes_under_the_role_of_the_call() -> None:
    x, t, cond = inputs()

    def gradients(roles: Roles) -> list[torch.Tensor]:
        roles.train_only(("student", "fake"))
        student = roles("student", x, t, cond)
        fake = roles("fake", student, t, cond)
        with torch.no_grad():
            base = roles("base", x, t, cond)  # the role that is active when the backward pass starts
        (student * base + fake).square().mean().backward()
        return [p.grad.clone() for role in ("student", "fake") for p in roles.parameters(role)]

    plain = gradients(perturbed(make_roles(("student", "fake"))))
    ours = gradients(perturbed(make_roles(("student", "fake"), checkpointing=True)))
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(plain, ours, strict=True))

    # the guard is needed: without the role of the call the same network fails or gives other gradients
    naive = perturbed(make_roles(("student", "fake")))
    naive.unet.enable_gradient_checkpointing(lambda m, *a: checkpoint(m.__call__, *a, use_reentrant=False))
    try:
        wrong = gradients(naive)
    except (torch.utils.checkpoint.CheckpointError, AttributeError):
        return
    assert not all(torch.allclose(a, b, atol=1e-7) for a, b in zip(plain, wrong, strict=True))


def test_gradients_flow_through_a_frozen_role_to_its_input() -> None:
    roles = perturbed(make_roles(("student", "fake")))
    roles.train_only(("student",))
    x, t, cond = inputs()
    roles("fake", roles("student", x, t, cond), t, cond).sum().backward()
    assert all(p.grad is not None for p in roles.parameters("student"))
    assert all(p.grad is None for p in roles.parameters("fake"))
    assert not roles("base", x, t, cond).requires_grad


def test_features_come_from_a_hook_and_leave_none_behind() -> None:
    roles = perturbed(make_roles(("student", "fake")))
    x, t, cond = inputs()
    mid = roles.features("fake", x, t, cond, "mid_block")
    assert mid.shape == (2, 32, 4, 4)
    assert not torch.equal(mid, roles.features("base", x, t, cond, "mid_block"))
    assert not roles.unet.mid_block._forward_hooks


def test_adapters_stay_fp32_on_a_bf16_base() -> None:
    from peft import LoraConfig
    from tiny import tiny_unet
    from world import forward

    lora = LoraConfig(r=4, target_modules=["to_q", "conv1"])
    roles = Roles(tiny_unet().to(torch.bfloat16), forward, ("student",), lora)
    assert {p.dtype for p in roles.parameters("student")} == {torch.float32}
    x, t, cond = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.isfinite(roles("student", x, t, cond)).all()


def test_copies_without_reference_train_the_base_in_place() -> None:
    roles = make_roles(("student",), "copies", reference=False)
    assert roles.networks["student"] is roles.unet and "base" not in roles.networks
    with pytest.raises(KeyError, match="no network 'base'"):
        roles("base", *inputs())


def test_state_must_fit() -> None:
    roles = make_roles(("student",))
    state = dict(roles.state_dict("student"))
    state.pop(next(iter(state)))
    with pytest.raises(ValueError, match="does not fit"):
        roles.load_state_dict("student", state)


def test_ema_averages_trainables_and_swaps_back() -> None:
    p = torch.nn.Parameter(torch.zeros(3))
    ema = Ema([p], decay=0.5)
    expected = torch.zeros(3)
    for n in range(1, 6):
        p.data += 1
        decay = min(0.5, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * p.data
        ema.update()
    torch.testing.assert_close(ema.shadow[0], expected)
    live = p.detach().clone()
    with ema.swapped():
        torch.testing.assert_close(p.data, expected)
    assert torch.equal(p.data, live)


def test_guidance_follows_diffusers() -> None:
    roles = perturbed(make_roles())
    context = make_context(roles)
    x, t, cond = inputs()
    with torch.no_grad():
        conditional = context.model("student", x, t, cond)
        uncond = context.model("student", x, t, context.uncond.expand(2))
        guided = context.model("student", x, t, cond, guidance=3.0)
    torch.testing.assert_close(guided, uncond + 3 * (conditional - uncond), rtol=1e-4, atol=1e-5)


def test_a_compiled_network_follows_its_role() -> None:
    plain, compiled = perturbed(make_roles()), perturbed(make_roles())
    # what torch.compile guards on, without the time of a code generator, in one block that has adapters
    compiled.unet.mid_block.compile(backend="eager")
    x, t, cond = inputs()
    for roles in (plain, compiled):
        roles.train_only(("student",))
    for role in ("student", "base", "student"):
        assert torch.equal(plain(role, x, t, cond), compiled(role, x, t, cond))
    for roles in (plain, compiled):
        roles("student", x, t, cond).sum().backward()
    for a, b in zip(plain.parameters("student"), compiled.parameters("student"), strict=True):
        assert torch.equal(a.grad, b.grad)
