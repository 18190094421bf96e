"""What is saved opens in plain diffusers and draws the same image as the live model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open

from diffalign.families import Model, load_model, save_lora, save_merged
from diffalign.recipe import LoraFile, ModelRecipe
from diffalign.roles import Roles

CPU = torch.device("cpu")


def load(folder: Path | str, **options: object) -> Model:
    return load_model(ModelRecipe(path=str(folder), **options), CPU, torch.float32)


def trained(
    model: Model, targets: str | list[str], rank: int, alpha: float, **options: object
) -> tuple[Roles, LoraConfig]:
    """Two roles with adapters on the model's U-Net, as a run has them, each far from zero."""
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=model.lora_targets(targets), **options)
    roles = Roles(model.unet, model.call_unet, ("student", "fake"), config)
    generator = torch.Generator().manual_seed(rank)
    for role in roles.names:
        for parameter in roles.parameters(role):
            parameter.data = torch.randn(parameter.shape, generator=generator) * (
                0.6 if targets == "attention" else 0.1
            )
    return roles, config


def adapter(model: Model, role: str) -> dict[str, torch.Tensor]:
    return get_peft_model_state_dict(model.unet, adapter_name=role)


def draw(pipeline: StableDiffusionPipeline) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    result = pipeline(["a cat", "a dog"], num_inference_steps=4, generator=generator, output_type="np")
    return result.images


def draw_live(model: Model, roles: Roles, role: str) -> np.ndarray:
    with roles.active(role):
        return draw(model.pipeline())


CASES = [
    ("attention", 4, 4.0, {}),
    ("attention", 4, 1.0, {}),
    ("all", 8, 20.0, {}),
    ("all", 4, 8.0, {"use_rslora": True}),
]


@pytest.mark.parametrize(("targets", "rank", "alpha", "options"), CASES)
def test_a_lora_draws_the_same_image(
    targets: str, rank: int, alpha: float, options: dict, tmp_path: Path, tiny_model_folder: Path
) -> None:
    model = load(tiny_model_folder)
    roles, config = trained(model, targets, rank, alpha, **options)
    live, base = draw_live(model, roles, "student"), draw_live(model, roles, "base")
    assert np.abs(live - base).max() > 0.05, "the adapter must be seen, else nothing is tested"
    file = save_lora(adapter(model, "student"), config, tmp_path, {"method": "dpo"})
    assert [p.name for p in tmp_path.iterdir()] == ["pytorch_lora_weights.safetensors"]

    reloaded = StableDiffusionPipeline.from_pretrained(tiny_model_folder)
    assert np.abs(draw(reloaded) - base).max() < 1e-5
    reloaded.load_lora_weights(tmp_path)
    assert np.abs(draw(reloaded) - live).max() < 1e-5
    config_there = next(iter(reloaded.unet.peft_config.values()))
    assert (config_there.r, config_there.lora_alpha) == (rank, alpha)
    with safe_open(file, framework="pt") as opened:
        names = set(opened.keys())
        header = opened.metadata()
    assert names == {f"unet.{name}.lora_{x}.weight" for name in model.lora_targets(targets) for x in "AB"}
    assert header["format"] == "pt" and header["method"] == "dpo"
    assert json.loads(header["lora_adapter_metadata"])["unet.lora_alpha"] == alpha


@pytest.mark.parametrize(("targets", "rank", "alpha", "options"), CASES[1:])
def test_a_merged_pipeline_draws_the_same_image(
    targets: str, rank: int, alpha: float, options: dict, tmp_path: Path, tiny_model_folder: Path
) -> None:
    model = load(tiny_model_folder)
    roles, config = trained(model, targets, rank, alpha, **options)
    live = draw_live(model, roles, "student")
    before = {name: tensor.clone() for name, tensor in model.unet.state_dict().items()}
    folder = save_merged(model, tmp_path / "m", lora=(adapter(model, "student"), config))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.unet.state_dict().items())
    assert not list(folder.glob(".*"))
    merged = StableDiffusionPipeline.from_pretrained(folder)
    assert np.abs(draw(merged) - live).max() < 1e-5
    assert type(merged.scheduler).__name__ == model.scheduler_config["_class_name"] == "PNDMScheduler"
    assert merged.scheduler.config.steps_offset == 1
    assert load(folder).family == "sd1"


def test_alpha_is_not_lost(tmp_path: Path, tiny_model_folder: Path) -> None:
    """The same tensors under alpha 2 and alpha 8 draw different images: the file's header decides."""
    model = load(tiny_model_folder)
    _, config = trained(model, "attention", 4, 2.0)
    other = LoraConfig(r=4, lora_alpha=8.0, target_modules=config.target_modules)
    images = []
    for name, settings in (("a", config), ("b", other)):
        save_lora(adapter(model, "student"), settings, tmp_path / name)
        pipeline = StableDiffusionPipeline.from_pretrained(tiny_model_folder)
        pipeline.load_lora_weights(tmp_path / name)
        images.append(draw(pipeline))
    assert np.abs(images[0] - images[1]).max() > 0.05


def test_export_after_an_earlier_lora_was_fused(tmp_path: Path, tiny_model_folder: Path) -> None:
    """Plain base + first LoRA at its scale + second LoRA = the live model, whose base has the first one fused."""
    first = load(tiny_model_folder)
    _, config = trained(first, "all", 4, 6.0)
    save_lora(adapter(first, "student"), config, tmp_path / "first")

    model = load(tiny_model_folder, loras=[LoraFile(path=str(tmp_path / "first"), scale=0.5)])
    roles, config = trained(model, "all", 8, 4.0)
    live = draw_live(model, roles, "student")
    save_lora(adapter(model, "student"), config, tmp_path / "second")
    save_merged(model, tmp_path / "merged", lora=(adapter(model, "student"), config))

    plain = StableDiffusionPipeline.from_pretrained(tiny_model_folder)
    plain.load_lora_weights(tmp_path / "second")
    assert np.abs(draw(plain) - live).max() > 0.05, "the first LoRA must be seen"
    plain = StableDiffusionPipeline.from_pretrained(tiny_model_folder)
    plain.load_lora_weights(tmp_path / "first")
    plain.fuse_lora(lora_scale=0.5)
    plain.unload_lora_weights()
    plain.load_lora_weights(tmp_path / "second")
    assert np.abs(draw(plain) - live).max() < 1e-5
    assert np.abs(draw(StableDiffusionPipeline.from_pretrained(tmp_path / "merged")) - live).max() < 1e-5


def test_a_trained_copy_is_saved_whole(tmp_path: Path, tiny_model_folder: Path) -> None:
    model = load(tiny_model_folder)
    roles = Roles(model.unet, model.call_unet, ("student",), None)
    student = roles.networks["student"]
    with torch.no_grad():
        student.conv_out.weight.mul_(1.5)
    folder = save_merged(model, tmp_path / "m", unet=student)
    saved = StableDiffusionPipeline.from_pretrained(folder)
    assert torch.equal(saved.unet.conv_out.weight, student.conv_out.weight)
    assert not torch.equal(saved.unet.conv_out.weight, model.unet.conv_out.weight)


def test_smaller_formats_and_writing_again(tmp_path: Path, tiny_model_folder: Path) -> None:
    model = load(tiny_model_folder)
    _, config = trained(model, "attention", 4, 4.0)
    folder = tmp_path / "m"
    for dtype in (torch.float32, torch.float16):
        save_merged(model, folder, lora=(adapter(model, "student"), config), dtype=dtype)
        save_lora(adapter(model, "student"), config, folder, dtype=dtype)
        for part in ("unet", "vae", "text_encoder"):
            with safe_open(next((folder / part).glob("*.safetensors")), framework="pt") as opened:
                assert opened.get_tensor(next(iter(opened.keys()))).dtype == dtype
        with safe_open(folder / "pytorch_lora_weights.safetensors", framework="pt") as opened:
            assert opened.get_tensor(next(iter(opened.keys()))).dtype == dtype
    assert model.vae.dtype == torch.float32
    again = load(folder).encode_prompts(["a cat"]).embeds
    torch.testing.assert_close(again, model.encode_prompts(["a cat"]).embeds, atol=1e-2, rtol=1e-2)
