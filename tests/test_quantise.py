"""A quantised base under fp32 adapters: what is quantised, what it costs in accuracy, that it trains, what it exports.

The parts that quantise need bitsandbytes (the extra ``8bit``), whose newer releases run on the CPU as well:
`make test-8bit` makes an environment with it."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from command import diffalign
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file
from small import final_state, log_of, lora_of, same_tree, settings, write_pairs
from torch import nn

from diffalign.errors import UserError
from diffalign.families import load_model
from diffalign.families.known import meta_network
from diffalign.families.quantise import check_quantize, quantisable, weight_bytes
from diffalign.memory import optimizer_bytes
from diffalign.optim import make_optimizer
from diffalign.recipe import ModelRecipe, TrainRecipe

needs_package = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs the extra 8bit: make test-8bit")
MODES = ("8bit", "4bit")


def test_nearly_all_of_sdxl_is_quantised() -> None:
    unet = meta_network("sdxl")
    names = quantisable(unet)
    share = sum(unet.get_submodule(name).weight.numel() for name in names) / sum(p.numel() for p in unet.parameters())
    assert share > 0.85 and not any("embedding" in name for name in names)
    assert weight_bytes(unet, torch.bfloat16) == 2 * 2_567_463_684
    eight, four = (weight_bytes(unet, torch.bfloat16, mode) / weight_bytes(unet, torch.bfloat16) for mode in MODES)
    assert 0.5 < eight < 0.58 and 0.25 < four < 0.37


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    check_quantize("none", "copies")
    with pytest.raises(UserError, match=r"model\.quantize=4bit is for adapters"):
        check_quantize("4bit", "copies")
    monkeypatch.setattr("diffalign.families.quantise.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs bitsandbytes; pip install 'diffalign\[8bit\]'"):
        check_quantize("8bit", "adapters")


def test_the_refusal_is_one_line(tiny_model_folder: Path, tmp_path: Path) -> None:
    args = settings(tiny_model_folder, write_pairs(tmp_path / "pairs"), tmp_path / "run", model__storage="copies")
    done = diffalign("train", *args, "model.quantize=8bit")
    assert done.status == 2 and "is for adapters" in done.line and not (tmp_path / "run").exists()


# ---- with bitsandbytes ----------------------------------------------------------------------------------------------


@needs_package
@pytest.mark.parametrize("mode", MODES)
def test_layers_are_quantised_and_agree(mode: Any, tiny_model_folder: Path) -> None:
    device = torch.device("cpu")
    plain = load_model(ModelRecipe(path=str(tiny_model_folder)), device, torch.float32)
    few = load_model(ModelRecipe(path=str(tiny_model_folder), quantize=mode), device, torch.float32)
    names = quantisable(few.unet)
    assert len(names) > 20 and {few.unet.get_submodule(name).weight.dtype for name in names} == {
        torch.int8 if mode == "8bit" else torch.uint8
    }
    assert few.unet.time_embedding.linear_1.weight.dtype == few.unet.conv_in.weight.dtype == torch.float32
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        a, b = (m.call_unet(m.unet, x, 500, m.uncond(2)) for m in (plain, few))
    error = float((a - b).norm() / a.norm())
    assert 0 < error < (0.05 if mode == "8bit" else 0.3)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("quantised")


def options(place: Path, model: Path, mode: str) -> dict[str, Any]:
    return {
        "model": model,
        "data": write_pairs(place / "pairs"),
        "model__quantize": mode,
        "model__gradient_checkpointing": True,
        "train__steps": 6,
        "train__save_every": 3,
        "train__log_every": 3,
        "output__merged": True,
    }


@needs_package
@pytest.mark.parametrize("mode", MODES)
def test_a_run_trains_resumes_and_exports_over_the_original_weights(
    mode: str, tiny_model_folder: Path, place: Path
) -> None:
    chosen = options(place, tiny_model_folder, mode)
    out, again = place / mode, place / f"{mode}-again"
    done = diffalign("train", *settings(out=out, **chosen))
    assert done.status == 0, done.err
    held = final_state(out)
    assert {t.dtype for t in held["roles"]["student"].values()} == {torch.float32}
    assert all(t.dtype == torch.float32 for s in held["optimizers"]["student"]["state"].values() for t in s.values())
    assert any(float(t.abs().max()) > 1e-3 for name, t in lora_of(out).items() if "lora_B" in name)
    # exact resume
    assert diffalign("train", *settings(out=again, **{**chosen, "train__steps": 3})).status == 0
    assert diffalign("train", *settings(out=again, **chosen)).status == 0
    assert same_tree(held["roles"], final_state(again)["roles"])
    # the merged pipeline: the original weights with the adapter added, in full precision
    merged = UNet2DConditionModel.from_pretrained(out / "merged", subfolder="unet").state_dict()
    base = UNet2DConditionModel.from_pretrained(tiny_model_folder, subfolder="unet").state_dict()
    lora = load_file(out / "model" / "pytorch_lora_weights.safetensors")
    assert merged.keys() == base.keys()
    for name, weight in base.items():
        layer = f"unet.{name.removesuffix('.weight')}"
        if f"{layer}.lora_A.weight" in lora:
            weight = weight + 6 / 4 * lora[f"{layer}.lora_B.weight"] @ lora[f"{layer}.lora_A.weight"]
        torch.testing.assert_close(merged[name], weight, atol=1e-6, rtol=1e-5)
    StableDiffusionPipeline.from_pretrained(tiny_model_folder).load_lora_weights(out / "model")


@needs_package
def test_training_on_a_quantised_base_follows_the_plain_one(tiny_model_folder: Path, place: Path) -> None:
    """The same pairs and noise: held-out errors of a run on an 8-bit base stay near those of the plain run."""
    runs = {mode: place / f"near-{mode}" for mode in ("none", "8bit")}
    for mode, out in runs.items():
        changes = {**options(place, tiny_model_folder, mode), "train__lr": 1e-3, "output__merged": False}
        assert diffalign("train", *settings(out=out, **changes)).status == 0
    plain, few = (log_of(out, "validate")[-1]["chosen_error"] for out in runs.values())
    assert plain == pytest.approx(few, rel=0.02)


@needs_package
def test_an_8_bit_optimiser_trains(tiny_model_folder: Path, place: Path) -> None:
    changes = {**options(place, tiny_model_folder, "4bit"), "train__optimizer": "adamw8bit", "output__merged": False}
    done = diffalign("train", *settings(out=place / "adam8", **changes))
    assert done.status == 0, done.err
    assert all(torch.isfinite(t).all() for t in final_state(place / "adam8")["roles"]["student"].values())


@needs_package
def test_states_of_the_8_bit_optimiser_are_as_planned() -> None:
    named = {"large": nn.Parameter(torch.randn(256, 256)), "small": nn.Parameter(torch.randn(320))}
    optimizer = make_optimizer(TrainRecipe(optimizer="adamw8bit"), list(named.values()), "student")
    for parameter in named.values():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    held = {id(t): t for s in optimizer.state.values() for n, t in s.items() if torch.is_tensor(t) and "qmap" not in n}
    assert optimizer_bytes("adamw8bit", named) == pytest.approx(sum(t.nbytes for t in held.values()), rel=0.02)


def test_adapters_and_states_stay_fp32_over_a_half_base(tiny_model_folder: Path, place: Path) -> None:
    changes = {**options(place, tiny_model_folder, "none"), "model__dtype": "bf16", "output__merged": False}
    done = diffalign("train", *settings(out=place / "bf16", **changes))
    assert done.status == 0, done.err
    state = final_state(place / "bf16")
    tensors = [*state["roles"]["student"].values()]
    tensors += [t for s in state["optimizers"]["student"]["state"].values() for t in s.values()]
    assert {t.dtype for t in tensors} == {torch.float32}
    base = load_model(ModelRecipe(path=str(tiny_model_folder), dtype="bf16"), torch.device("cpu"), torch.bfloat16)
    assert {p.dtype for p in base.unet.parameters()} == {torch.bfloat16} and isinstance(base.unet, nn.Module)
