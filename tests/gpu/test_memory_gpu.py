"""Planned against measured memory at SD1.5's real size with random weights, and what leaves the device when idle.

pytest tests/gpu/test_memory_gpu.py -s        prints planned and measured peaks; needs a card of 24 GB
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from diffalign.families import load_model
from diffalign.families.random_sd1 import write_random_pairs, write_random_sd1
from diffalign.memory import CONTEXT
from diffalign.plan import make_plan
from diffalign.recipe import ModelRecipe, Recipe, load_recipe
from diffalign.run import Session, train

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("memory")
    write_random_sd1(folder / "model")
    write_random_pairs(folder / "pairs", 32, 512)
    return folder


def recipe_for(place: Path, name: str, **changes: Any) -> Recipe:
    values = {
        "model.path": place / "model",
        "data.path": place / "pairs",
        "data.cache_dir": place / "cache",
        "output.dir": place / name,
        "output.trackers": "[]",
        "train.batch": 4,
        "train.micro_batch": 4,
        "train.steps": 2,
        "validate.pairs": 0,
        "validate.images": 1,
        "validate.steps": 2,
    } | {key.replace("__", "."): value for key, value in changes.items()}
    return load_recipe("sd15/dpo-lora", [f"{key}={value}" for key, value in values.items()])


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "checkpointing": {"model__gradient_checkpointing": True},
    "copies": {"model__storage": "copies", "model__gradient_checkpointing": True, "train__micro_batch": 1},
}


@pytest.mark.parametrize("case", CASES)
def test_a_planned_peak_is_near_the_measured_one(case: str, place: Path) -> None:
    recipe = recipe_for(place, case, **CASES[case])
    plan = make_plan(recipe)
    found: list[int] = []

    def watch(session: Session) -> None:
        step = session.trainer.train_step

        def measured() -> None:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            step()
            torch.cuda.synchronize()
            found.append(torch.cuda.max_memory_allocated())

        session.trainer.train_step = measured

    train(recipe, progress=False, watch=watch)
    planned = sum(plan.memory["parts"].values()) + plan.memory["activations"]
    print(
        f"{case}: planned {planned / 2**30:.2f} GiB, measured {found[-1] / 2**30:.2f} GiB (context {CONTEXT:,} apart)"
    )
    assert planned == pytest.approx(found[-1], rel=0.15)


def test_idle_parts_are_off_the_device(place: Path) -> None:
    """With offload: the base copy between calls, and the encoders but the one at work."""
    seen: list[set[str]] = []

    def watch(session: Session) -> None:
        model, roles = session.parts.model, session.trainer.roles
        seen.append({p.device.type for p in roles.networks["base"].parameters()})
        model.encode_prompts(["a cat"])
        seen.append({p.device.type for p in model.vae.parameters()})
        model.decode(torch.zeros(1, 4, 8, 8))
        seen.append({p.device.type for p in model.text_encoder.parameters()})
        model.release_encoders()

    changes = {"model__storage": "copies", "model__offload": True, "model__gradient_checkpointing": True}
    train(recipe_for(place, "offload", train__micro_batch=1, **changes), progress=False, watch=watch)
    assert seen == [{"cpu"}, {"cpu"}, {"cpu"}]


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs the extra 8bit")
@pytest.mark.parametrize("mode", ["8bit", "4bit"])
def test_a_quantised_base_is_as_small_as_planned(mode: Any, place: Path) -> None:
    from diffalign.families.quantise import weight_bytes

    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    recipe = ModelRecipe(path=str(place / "model"), quantize=mode, offload=True)
    model = load_model(recipe, torch.device("cuda"), torch.bfloat16)
    grown = torch.cuda.memory_allocated() - before
    plain = load_model(ModelRecipe(path=str(place / "model"), offload=True), torch.device("cpu"), torch.bfloat16)
    assert grown == pytest.approx(weight_bytes(plain.unet, torch.bfloat16, mode), rel=0.05)
    x = torch.zeros(1, 4, 64, 64, device="cuda")
    with torch.no_grad():
        assert torch.isfinite(model.call_unet(model.unet, x, 500, model.uncond(1))).all()
