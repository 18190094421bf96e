"""Another VAE than the model's own (``model.vae``), such as one that is fixed for fp16."""

from __future__ import annotations

from pathlib import Path

import torch

from ..errors import UserError
from .device import DTYPES
from .folder import HUB_ID, ModelFolder, builtin_models, open_folder, read_json


def find_vae(name: str, folder: ModelFolder) -> Path:
    """The diffusers folder of a VAE: a folder of one or of a whole model, a file, a built-in model or a hub id.

    Raises UserError when there is none, or when its latents have other channels or another size than the model's."""
    place = Path(name).expanduser()
    if place.is_file():
        found = _of_file(place, folder)
    elif place.is_dir():
        found = place / "vae" if (place / "vae" / "config.json").is_file() else place
    elif name in builtin_models():
        found = open_folder(name).part("vae")
    elif HUB_ID.match(name) and not place.parent.is_dir():
        found = _from_hub(name)
    else:
        raise UserError(f"model.vae '{name}' does not exist: no such folder, file, built-in model or hub id")
    config, own = read_json(found / "config.json", name), folder.config("vae")
    if config.get("_class_name") != "AutoencoderKL":
        raise UserError(f"model.vae '{name}' is a {config.get('_class_name', 'folder of something else')}, no VAE")
    for key, what in (("latent_channels", "latent channels"), ("block_out_channels", "levels")):
        mine, its = own.get(key, 4), config.get(key, 4)
        if isinstance(mine, list) and isinstance(its, list):
            mine, its = len(mine), len(its)
        if mine != its:
            raise UserError(f"model.vae '{name}' has {its} {what} and this model's has {mine}; give one of its family")
    return found


def _of_file(file: Path, folder: ModelFolder) -> Path:
    """A file in the original layout is converted; one of the diffusers layout needs the config beside it."""
    from .single import convert_vae, read_shapes

    names = read_shapes(file)
    if any(name.startswith(("encoder.down_blocks.", "down_blocks.")) for name in names):
        if (file.parent / "config.json").is_file():
            return file.parent
        raise UserError(f"model.vae '{file}' has no config.json beside it; give the folder of the VAE")
    if not any("encoder.conv_in." in name for name in names):
        raise UserError(f"model.vae '{file}' is no VAE: it has no encoder")
    return convert_vae(file, folder.part("vae"))


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download

    files = ["config.json", "diffusion_pytorch_model.safetensors", "vae/config.json", "vae/*.safetensors"]
    try:
        root = Path(snapshot_download(name, allow_patterns=files))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"model.vae '{name}' is no folder here and cannot be had from the hub: {reason}") from error
    return root / "vae" if (root / "vae" / "config.json").is_file() else root


def vae_dtype(name: str, folder: ModelFolder, family: str) -> torch.dtype:
    """``auto`` is fp32. fp16 is lifted to fp32 where the VAE's config says that it overflows (``force_upcast``)."""
    wanted = DTYPES.get(name, torch.float32)
    overflows = bool(folder.config("vae").get("force_upcast", family == "sdxl"))
    return torch.float32 if wanted == torch.float16 and overflows else wanted
