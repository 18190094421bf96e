"""What differs between model families: load, encode, LoRA targets, save. One file a family, found by its name."""

from __future__ import annotations

from importlib import import_module

import torch
from torch import nn

from ..errors import UserError
from ..recipe import ModelRecipe
from .attention import compile_unet, set_attention
from .base import Model
from .device import pick_device, pick_dtype
from .folder import ModelFolder, fetch, identify, open_folder
from .guidance import add_embedding, embedding_width
from .quantise import check_quantize, quantise_unet
from .save import save_lora, save_merged
from .vae import vae_dtype

__all__ = [
    "Model",
    "ModelFolder",
    "compile_unet",
    "detect",
    "load_model",
    "open_folder",
    "pick_device",
    "pick_dtype",
    "save_lora",
    "save_merged",
]


def detect(recipe: ModelRecipe) -> tuple[ModelFolder, str]:
    """The model's folder and family, from its configs alone.

    Raises UserError when the folder is none, or the family is refused or not the recipe's."""
    folder = open_folder(recipe.path, recipe.revision, recipe.variant, recipe.config)
    folder.vae = recipe.vae
    family = identify(folder)
    if recipe.family not in {"auto", family}:
        raise UserError(f"model '{recipe.path}' is {family}, not {recipe.family}; set model.family=auto")
    return folder, family


def load_model(recipe: ModelRecipe, device: torch.device, dtype: torch.dtype, place: bool = True) -> Model:
    """A base model from a folder, built-in name or hub id, frozen, with the recipe's LoRAs fused.

    Args:
        recipe: path, family, revision, variant, guidance_embedding, loras, attention, channels_last are used here.
        device: where it shall be (see `pick_device`).
        dtype: number format of the U-Net (see `pick_dtype`); text encoders stay fp32, the VAE's is the recipe's.
        place: whether the U-Net goes to the device now; else `Model.place_unet` brings it, so that it need not stand
            beside the encoders while they work.

    Raises:
        UserError: refused or damaged model, wrong family, unknown variant, unusable LoRA or attention kernel.
    """
    check_quantize(recipe.quantize, recipe.storage)
    folder, family = detect(recipe)
    fetch(folder, recipe.revision)
    kind: type[Model] = import_module(f"{__name__}.{family}").FAMILY
    # LoRAs are added in fp32, so that a bf16 base is rounded once.
    model = kind.load(folder, torch.float32 if recipe.loras else dtype, device, dtype)
    model.long_prompts = recipe.long_prompts
    if recipe.guidance_embedding and not embedding_width(model.unet):
        add_embedding(model.unet, recipe.guidance_embedding)
    set_attention(model.unet, recipe.attention, device)
    model.fuse_loras(recipe.loras)
    nn.Module.to(model.vae, dtype=vae_dtype(recipe.vae_dtype, folder, family))
    nn.Module.to(model.unet, dtype=dtype)
    if recipe.channels_last:
        model.unet.to(memory_format=torch.channels_last)
    if recipe.quantize != "none":
        quantise_unet(model.unet, recipe.quantize, dtype)
    if place:
        model.place_unet()
    model.offload = recipe.offload
    model.ensure_encoders()
    return model
