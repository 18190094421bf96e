"""``model.start``: the student begins as an existing LoRA, while the base, teacher and reference, stays what it is.

Fused by ``model.loras`` the same LoRA would be a part of the base: of every role, and of what the student is drawn to.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .errors import UserError
from .families.guidance import embedding_width
from .families.lora import LoraWeights, find_lora, read_lora, told_width
from .recipe import Recipe
from .roles import Roles

STUDENT = "student"


def start_student(roles: Roles, recipe: Recipe) -> None:
    """Gives the student the weights of the LoRA ``model.start``; all other roles stay the base.

    An adapter of at least its rank and layers holds it exactly, whatever its alpha; full copies have it added.

    Raises UserError when it is none, is for another network, or does not fit into ``model.lora``."""
    path = str(recipe.model.start)
    if STUDENT not in roles.trained:
        raise UserError(f"model.start does not go with method '{recipe.method.name}', which trains no LoRA; remove it")
    lora = read_lora(find_lora(path), roles.unet)
    if lora.others or lora.dora:
        what = f"also changes {' and '.join(lora.others)}" if lora.others else "is a DoRA, which rescales the weights"
        raise UserError(f"model.start '{path}' {what}; a student starts from the LoRA of a U-Net alone")
    width = told_width(lora.state)
    if width and not embedding_width(roles.unet):
        raise UserError(
            f"model.start '{path}' is told its guidance by an embedding; set model.guidance_embedding={width}"
        )
    if roles.lora is None:
        _add(roles, lora)
    else:
        _fill(roles, lora, path)


@torch.no_grad()
def _add(roles: Roles, lora: LoraWeights) -> None:
    network = roles.networks[STUDENT]
    for layer in lora.layers:
        weight = network.get_submodule(layer).weight
        assert isinstance(weight, Tensor)
        scale, down, up = lora.alphas[layer] / lora.ranks[layer], lora.down(layer), lora.up(layer)
        weight += (scale * up.float().flatten(1) @ down.float().flatten(1)).view_as(weight).to(weight)


@torch.no_grad()
def _fill(roles: Roles, lora: LoraWeights, path: str) -> None:
    """The first ranks of the adapter are the LoRA's; the others have B = 0, as have layers that it lacks."""
    config, own = roles.lora, roles.named_parameters(STUDENT)
    assert config is not None
    most = max(lora.ranks.values())
    if most > config.r:
        raise UserError(f"model.start '{path}' has rank {most}, and model.lora.rank is {config.r}; raise it to {most}")
    for layer in lora.layers:
        names = [f"{layer}.lora_{part}.{STUDENT}.weight" for part in "AB"]
        if names[0] not in own:
            raise UserError(
                f"model.start '{path}' changes {layer}, which model.lora.targets leave out; set model.lora.targets "
                "to all, or to the LoRA's own layers"
            )
        a, b, rank = own[names[0]], own[names[1]], lora.ranks[layer]
        scale = lora.alphas[layer] / rank / (config.lora_alpha / config.r)
        a[:rank] = lora.down(layer).to(a)
        b.zero_()
        b[:, :rank] = scale * lora.up(layer).to(b)
