"""What differs between model families: load, encode, LoRA targets, save. One file a family, found by its name."""

from __future__ import annotations

from importlib import import_module, resources

import torch
from torch import nn

from ..errors import UserError
from ..recipe import ModelRecipe
from .attention import compile_unet, set_attention
from .base import Model
from .device import pick_device, pick_dtype
from .folder import ModelFolder, fetch, identify, open_folder
from .save import save_lora, save_merged

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


def families() -> list[str]:
    """Names of the families that can be trained: the files here that define FAMILY."""
    known = ("sd1", "sd2", "sdxl")
    return [name for name in known if resources.files(__name__).joinpath(f"{name}.py").is_file()]


def detect(recipe: ModelRecipe) -> tuple[ModelFolder, str]:
    """The model's folder and family, from its configs alone.

    Raises UserError when the folder is none, or the family is refused, unknown or not the recipe's."""
    folder = open_folder(recipe.path, recipe.revision, recipe.variant)
    family = identify(folder)
    if recipe.family not in {"auto", family}:
        raise UserError(f"model '{recipe.path}' is {family}, not {recipe.family}; set model.family=auto")
    if family not in families():
        raise UserError(
            f"model '{recipe.path}' is not of a supported family yet: needs {family}; known: {', '.join(families())}"
        )
    return folder, family


def load_model(recipe: ModelRecipe, device: torch.device, dtype: torch.dtype) -> Model:
    """A base model from a folder, built-in name or hub id, frozen, with the recipe's LoRAs fused.

    Args:
        recipe: path, family, revision, variant, loras, attention and channels_last are used here.
        device: where it shall be (see `pick_device`).
        dtype: number format of the U-Net (see `pick_dtype`); VAE and text encoder stay fp32.

    Raises:
        UserError: refused or damaged model, wrong family, unknown variant, unusable LoRA or attention kernel.
    """
    folder, family = detect(recipe)
    fetch(folder, recipe.revision)
    kind: type[Model] = import_module(f"{__name__}.{family}").FAMILY
    # LoRAs are added in fp32, so that a bf16 base is rounded once.
    model = kind.load(folder, torch.float32 if recipe.loras else dtype, device, dtype)
    set_attention(model.unet, recipe.attention, device)
    model.fuse_loras(recipe.loras)
    nn.Module.to(model.unet, device=device, dtype=dtype)
    if recipe.channels_last:
        model.unet.to(memory_format=torch.channels_last)
    model.ensure_encoders()
    return model
