"""The loop on a CUDA device: no wait in a step, half formats learn, a resumed run is the same run."""

from __future__ import annotations

import copy

import pytest
import torch
from world import TwoRole, TwoRoleConfig, gap, make_context, make_trainer, warm, weights

from diffalign.methods import make_method
from diffalign.trainer import Trainer

pytestmark = pytest.mark.gpu


def on_gpu(name: str, autocast: torch.dtype | None = None) -> Trainer:
    method = TwoRole(TwoRoleConfig()) if name == "two" else make_method(name, {})
    made = make_trainer(method)
    for network in {id(n): n for n in [*made.roles.networks.values(), *made.roles.modules.values()]}.values():
        network.cuda()
    ctx = make_context(made.roles, autocast=autocast)
    ctx.device, ctx.uncond = torch.device("cuda"), ctx.uncond.to("cuda")
    return Trainer(method, ctx, made.source, made.recipe, made.accelerator)


@pytest.mark.parametrize("name", ["dpo", "mapo", "sft", "two"])
def test_a_step_does_not_wait_for_the_device(name: str) -> None:
    trainer = warm(on_gpu(name, torch.bfloat16))
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer.train_step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
def test_half_formats_stay_finite_and_move(autocast: torch.dtype | None) -> None:
    trainer = on_gpu("dpo", autocast)
    before = weights(trainer)
    warm(trainer, 4)
    after = weights(trainer)
    assert all(bool(torch.isfinite(w).all()) and w.dtype == torch.float32 for w in after)
    assert gap(before, after) > 1e-4


def test_resume_is_exact_when_deterministic() -> None:
    torch.use_deterministic_algorithms(True)
    try:
        straight = warm(on_gpu("dpo"), 4)
        first = warm(on_gpu("dpo"), 2)
        second = on_gpu("dpo")
        second.load(copy.deepcopy(first.state()))
        warm(second, 2)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(map(torch.equal, weights(straight), weights(second)))
