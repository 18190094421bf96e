"""``model.start``: the student begins as an existing LoRA, and nobody else does."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn

from diffalign.card import Place, training_table
from diffalign.data.batch import Cond
from diffalign.errors import UserError
from diffalign.facts import Facts
from diffalign.families import Model, load_model, save_lora
from diffalign.publish import without_paths
from diffalign.recipe import ModelRecipe, Recipe, load_recipe
from diffalign.roles import Roles
from diffalign.setup import build_roles, make_method_of

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path) -> Path:
    """Rank 2 and alpha 6, on layers of attention and on convolutions."""
    unet = StableDiffusionPipeline.from_pretrained(tiny_model_folder).unet
    config = LoraConfig(r=2, lora_alpha=6, target_modules=["to_q", "to_out.0", "conv1"])
    unet.add_adapter(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    folder = tmp_path_factory.mktemp("lora")
    save_lora(get_peft_model_state_dict(unet), config, folder)
    return folder


@functools.cache
def loaded(folder: str) -> Model:
    return load_model(ModelRecipe(path=folder), CPU, torch.float32)


def started(folder: Path, start: Path | str, *options: str, method: str = "dmd2") -> tuple[Roles, Recipe]:
    lora = ["model.lora.rank=4", "model.lora.alpha=3", "model.lora.targets=all"]
    recipe = load_recipe(f"tiny/{method}", [f"model.path={folder}", f"model.start={start}", *lora, *options])
    model = copy.copy(loaded(str(folder)))
    model.unet = copy.deepcopy(model.unet)
    return build_roles(model, make_method_of(recipe), recipe, torch.float32), recipe


def asked(network: nn.Module | Any) -> Tensor:
    """What a network, or a role, says of fixed latents."""
    generator = torch.Generator().manual_seed(1)
    x, text = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 7, 16, generator=generator)
    t = torch.tensor([999, 300])
    with torch.no_grad():
        if isinstance(network, nn.Module):
            return network(x, t, text).sample
        roles, name = network
        return roles(name, x, t, Cond(text))


@pytest.mark.parametrize("storage", ["adapters", "copies"])
def test_the_student_is_the_lora_and_all_others_are_the_base(storage: str, lora: Path, tiny_model_folder: Path) -> None:
    """Another rank and alpha, and fewer layers, than those of the run: what plain diffusers says, all the same."""
    roles, _ = started(tiny_model_folder, lora, f"model.storage={storage}")
    plain = StableDiffusionPipeline.from_pretrained(tiny_model_folder)
    base = asked(plain.unet)
    plain.load_lora_weights(lora)
    expected = asked(plain.unet)
    assert float((expected - base).abs().max()) > 0.05
    torch.testing.assert_close(asked((roles, "student")), expected, rtol=1e-4, atol=1e-5)
    for role in ("base", "fake"):
        torch.testing.assert_close(asked((roles, role)), base, rtol=1e-4, atol=1e-5)
    if storage == "adapters":
        assert torch.equal(asked((roles, "fake")), asked((roles, "base")))
        assert all(bool(p.any()) for n, p in roles.named_parameters("student").items() if "lora_A" in n)


def test_starts_that_do_not_fit_are_refused(lora: Path, tiny_model_folder: Path, tmp_path: Path) -> None:
    for start, options, said in (
        (lora, ["model.lora.rank=1"], "has rank 2, and model.lora.rank is 1"),
        (lora, ["model.lora.targets=attention"], "model.lora.targets leave out"),
        (tmp_path / "none", [], "does not exist"),
    ):
        with pytest.raises(UserError, match=said) as caught:
            started(tiny_model_folder, start, *options)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="which trains no LoRA"):
        started(tiny_model_folder, lora, method="softrepa")


def test_an_export_does_not_say_where_it_lay(lora: Path, tiny_model_folder: Path) -> None:
    shown = without_paths(started(tiny_model_folder, lora)[1].dump())
    assert shown["model"]["start"] == lora.name


def test_the_card_names_the_start(lora: Path, tiny_model_folder: Path) -> None:
    facts = Facts(method="dmd2", recipe=started(tiny_model_folder, lora)[1].dump())
    assert training_table(facts, Place())["student starts from"] == str(lora)
    assert training_table(facts, Place(shared=True))["student starts from"] == f"PATH/OF/{lora.name}"
