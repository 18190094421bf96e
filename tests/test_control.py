"""Controls of a base on its student, and back: beside the student's adapter, at any strength; how alike edits are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from tiny import tiny_pipeline, tiny_sdxl_pipeline

from diffalign.errors import UserError
from diffalign.families import save_lora
from diffalign.families.lora import load_lora
from diffalign.keyed import normal
from diffalign.pipelines.control import active, controlled, transfer

NOTEBOOKS = Path(__file__).parents[1] / "pipelines" / "notebooks"
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
PROMPTS = ["a cat", "a dog"]


def saved(unet: Any, folder: Path) -> str:
    """The adapter ``made`` of a U-Net as a LoRA."""
    config = LoraConfig(r=4, lora_alpha=4, target_modules=TARGETS)
    save_lora(get_peft_model_state_dict(unet, adapter_name="made"), config, folder)
    unet.delete_adapters(["made"])
    return str(folder)


def random_lora(folder: Path, seed: int, size: float = 0.1) -> str:
    unet = tiny_pipeline().unet
    unet.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=TARGETS), adapter_name="made")
    with torch.no_grad():
        for k, (name, parameter) in enumerate(unet.named_parameters()):
            if "lora_" in name:
                parameter.copy_(size * normal((parameter.numel(),), seed, k).view_as(parameter))
    return saved(unet, folder)


def draw(pipe: Any) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        PROMPTS, num_inference_steps=2, guidance_scale=1.0, output_type="np", latents=normal((2, 4, 8, 8), 0)
    ).images


def test_a_control_goes_beside_what_is_active_and_leaves_no_trace(tmp_path: Path) -> None:
    control, student = random_lora(tmp_path / "control", 1), random_lora(tmp_path / "student", 2)
    pipe = tiny_pipeline()
    base = draw(pipe)
    with controlled(pipe, control) as strength:
        alone = draw(pipe)
        strength(0.0)
        assert np.array_equal(draw(pipe), base)
        with pytest.raises(UserError, match="has a control already"), controlled(pipe, control):
            pass
    assert np.array_equal(draw(pipe), base) and np.abs(alone - base).max() > 1e-3
    load_lora(pipe, Path(student) / "pytorch_lora_weights.safetensors", "student")
    pipe.set_adapters(["student"], [0.7])
    there = draw(pipe)
    with controlled(pipe, control) as strength:
        assert active(pipe.unet) == ["student", "control"]
        both = draw(pipe)
        strength(-1.0)
        contrary = draw(pipe)
        strength(0.0)
        assert np.array_equal(draw(pipe), there)
    assert active(pipe.unet) == ["student"] and np.array_equal(draw(pipe), there)
    for a, b in ((both, there), (both, alone), (contrary, both)):
        assert np.abs(a - b).max() > 1e-3
    # both at once: their weights added up, as merging them in turn gives
    merged = tiny_pipeline()
    load_lora(merged, Path(student) / "pytorch_lora_weights.safetensors", "student")
    merged.fuse_lora(lora_scale=0.7)
    merged.unload_lora_weights()
    with controlled(merged, control):
        np.testing.assert_allclose(draw(merged), both, atol=1e-4)


def test_edits_that_are_the_same_have_cosine_one(tmp_path: Path) -> None:
    small = random_lora(tmp_path / "small", 1, 0.03)
    given = {"num_inference_steps": 2, "guidance_scale": 1.0}
    options: dict[str, Any] = {"options": given, "other_options": given}
    pipes = tiny_pipeline(), tiny_pipeline()
    for pipe in pipes:
        pipe.set_progress_bar_config(disable=True)
    same = transfer(*pipes, small, PROMPTS, **options)
    assert same.similarity == pytest.approx((1.0, 1.0), abs=1e-5) and same.effect == pytest.approx(same.other_effect)
    assert min(same.effect) > 1e-4 and "cosine 1.00" in same.summary()
    other = transfer(pipes[0], tiny_pipeline(seed=5), small, PROMPTS, **options)
    assert max(map(abs, other.similarity)) < 0.9
    none = transfer(*pipes, small, PROMPTS, strength=0.0, **options)
    assert none.similarity == (0.0, 0.0) and none.effect == (0.0, 0.0)
    with pytest.raises(UserError, match="there are none"):
        transfer(*pipes, small, [])
    with pytest.raises(UserError, match=r"does not fit|another|of another"):
        transfer(tiny_sdxl_pipeline(), pipes[0], small, PROMPTS)


@pytest.mark.slow
def test_the_notebook_runs_and_a_slider_steers_base_and_student(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every code cell in turn. The slider of either model makes on the other the edit that it makes on its own."""
    monkeypatch.setenv("MPLBACKEND", "agg")
    book = json.loads((NOTEBOOKS / "guidance.ipynb").read_text(encoding="utf-8"))
    code = [cell for cell in book["cells"] if cell["cell_type"] == "code"]
    assert code[0]["metadata"]["tags"] == ["parameters"] and not any(cell["outputs"] for cell in code)
    names: dict[str, Any] = {}
    exec("".join(code[0]["source"]), names)
    names |= {"OUT": str(tmp_path), "ROUNDS": 6, "UPDATES": 100, "SLIDER": 60}
    for cell in code[1:]:
        exec("".join(cell["source"]), names)
    for owner, found in names["transfers"].items():
        print(owner, found.summary(), found.similarity)
        assert np.mean(found.similarity) > 0.5, owner
        assert min(np.mean(found.effect), np.mean(found.other_effect)) > 0.01, owner
