"""The family on a CUDA device: kernels agree, encoders leave and come back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from diffalign.families import load_model, pick_device, pick_dtype
from diffalign.recipe import ModelRecipe

pytestmark = pytest.mark.gpu


def test_auto_takes_the_gpu_and_a_half_format() -> None:
    device = pick_device("auto")
    assert device.type == "cuda" and pick_dtype("auto", device) in (torch.bfloat16, torch.float16)


def test_flash_agrees_with_sdpa(tiny_model_folder: Path) -> None:
    device = pick_device("cuda")
    outputs = []
    for attention in ("sdpa", "flash"):
        recipe = ModelRecipe(path=str(tiny_model_folder), attention=attention)
        model = load_model(recipe, device, torch.bfloat16)
        x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)).to(device)
        with torch.no_grad():
            outputs.append(model.call_unet(model.unet, x, 500, model.uncond(2)))
    torch.testing.assert_close(*outputs, atol=2e-2, rtol=2e-2)


def test_encoders_leave_and_come_back(tiny_model_folder: Path) -> None:
    model = load_model(ModelRecipe(path=str(tiny_model_folder)), pick_device("cuda"), torch.float32)
    before = model.encode_prompts(["a cat"]).embeds
    model.release_encoders()
    assert {p.device.type for part in model.encoders() for p in part.parameters()} == {"cpu"}
    assert torch.equal(model.encode_prompts(["a cat"]).embeds, before)
    mean, _ = model.encode_images(torch.zeros(1, 3, 64, 64))
    assert mean.device.type == model.decode(mean).device.type == "cuda"
