"""model.offload: idle parts leave the device and come back the same. That it is another device: tests/gpu."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from world import gap, make_context, make_trainer, warm, weights

from diffalign.families import load_model
from diffalign.methods import make_method
from diffalign.recipe import ModelRecipe
from diffalign.roles import BASE
from diffalign.trainer import Trainer


def resting(trainer: Trainer) -> Trainer:
    trainer.roles.rest()
    return trainer


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_resting_base_trains_the_same(checkpointing: bool) -> None:
    plain, rested = (
        make_trainer(make_method("dpo", {"beta": 100.0}), storage="copies", checkpointing=checkpointing)
        for _ in range(2)
    )
    warm(plain, 3)
    warm(resting(rested), 3)
    assert gap(weights(plain), weights(rested)) == 0


def test_weights_are_on_the_device_for_a_call_only() -> None:
    trainer = resting(make_trainer(make_method("dpo", {}), storage="copies"))
    roles, base = trainer.roles, trainer.roles.networks[BASE]
    homes = [p.data_ptr() for p in base.parameters()]
    during: list[list[int]] = []
    base.register_forward_hook(lambda *_: during.append([p.data_ptr() for p in base.parameters()]))
    x, t, cond = torch.randn(1, 4, 8, 8), torch.zeros(1, dtype=torch.int64), make_context(roles).uncond
    with torch.no_grad():
        roles(BASE, x, t, cond)
    assert not set(during[0]) & set(homes), "a copy for the call"
    assert [p.data_ptr() for p in base.parameters()] == homes
    # where a graph may need them, they stay until the next call
    x.requires_grad_()
    out = roles(BASE, x, t, cond)
    assert [p.data_ptr() for p in base.parameters()] != homes
    out.sum().backward()
    assert x.grad is not None and torch.isfinite(x.grad).all()
    with torch.no_grad():
        roles(BASE, x, t, cond)
    assert [p.data_ptr() for p in base.parameters()] == homes


def test_encoders_are_on_the_device_one_kind_at_a_time(tiny_model_folder: Path) -> None:
    """On the meta device, from where nothing comes back: each way in a model of its own."""
    where = []
    for part in ("vae", "text_encoder"):
        model = load_model(ModelRecipe(path=str(tiny_model_folder), offload=True), torch.device("cpu"), torch.float32)
        model.device = torch.device("meta")
        model.ensure_encoders()
        assert {p.device.type for m in model.encoders() for p in m.parameters()} == {"cpu"}, (
            "none until it is asked for"
        )
        model.ensure_encoders(getattr(model, part))
        where.append([next(m.parameters()).device.type for m in (model.vae, model.text_encoder)])
    assert where == [["meta", "cpu"], ["cpu", "meta"]]


def test_the_network_may_wait_for_the_encoders(tiny_model_folder: Path) -> None:
    recipe = ModelRecipe(path=str(tiny_model_folder))
    model = load_model(recipe, torch.device("cpu"), torch.float32, place=False)
    model.device = torch.device("meta")
    assert {p.device.type for p in model.unet.parameters()} == {"cpu"}
    model.place_unet()
    assert {p.device.type for p in model.unet.parameters()} == {"meta"}


def test_large_pictures_pass_the_vae_one_by_one(tiny_model_folder: Path) -> None:
    model = load_model(ModelRecipe(path=str(tiny_model_folder)), torch.device("cpu"), torch.float32)
    assert [model.at_once(side, side) for side in (64, 512, 768, 1024, 2048)] == [256, 4, 1, 1, 1]
    sizes: list[int] = []
    model.vae.encoder.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    model.encode_images(torch.zeros(3, 3, 64, 64))
    model.at_once = lambda height, width: 2  # type: ignore[method-assign, assignment]
    model.encode_images(torch.zeros(3, 3, 64, 64))
    assert sizes == [3, 2, 1]
