"""Existing LoRA files: found, checked against the network, fused into a pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from diffusers import DiffusionPipeline

from ..errors import UserError
from ..recipe import LoraFile
from .folder import HUB_ID, check_safetensors, hash_file
from .targets import adaptable

NAME = "pytorch_lora_weights.safetensors"


def find_lora(path: str, weight_name: str | None = None) -> Path:
    """The safetensors file of a LoRA: a file, a folder of one, a run's folder (its ``model/``), or a hub id.

    Raises UserError when there is none, when a folder holds several, or when the file is pickled or damaged."""
    place = Path(path).expanduser()
    if place.is_dir():
        file = _in_folder(place, path, weight_name)
    elif place.is_file():
        file = place
    elif HUB_ID.match(path) and not place.parent.is_dir():
        file = _from_hub(path, weight_name or NAME)
    else:
        raise UserError(f"LoRA '{path}' does not exist; give its .safetensors file, its folder or a run's folder")
    if file.suffix != ".safetensors":
        raise UserError(
            f"LoRA '{path}' is a {file.suffix or 'nameless'} file; only .safetensors is read, convert it first"
        )
    check_safetensors(file)
    return file


def _in_folder(folder: Path, path: str, weight_name: str | None) -> Path:
    for place in (folder, folder / "model"):
        if weight_name:
            if (place / weight_name).is_file():
                return place / weight_name
            continue
        if (place / NAME).is_file():
            return place / NAME
        files = sorted(place.glob("*.safetensors"))
        if len(files) == 1:
            return files[0]
        if files:
            raise UserError(
                f"LoRA folder '{path}' holds {len(files)} files; set weight_name to one, such as {files[0].name}"
            )
    what = f"no {weight_name}" if weight_name else "no .safetensors file"
    raise UserError(f"LoRA folder '{path}' holds {what}, nor does a model/ in it")


def _from_hub(path: str, name: str) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(path, name))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"LoRA '{path}' is no folder here and {name} cannot be had from the hub: {reason}") from error


def load_lora(pipeline: DiffusionPipeline, file: Path, adapter: str) -> list[str]:
    """Loads a LoRA as ``adapter`` and returns the components it reached (unet, text_encoder).

    Raises UserError when it was made for another network."""
    try:
        state, *_ = pipeline.lora_state_dict(str(file), unet_config=pipeline.unet.config, use_safetensors=True)
        layers = set(adaptable(pipeline.unet))
        for key in state:
            layer = key.removeprefix("unet.").split(".lora")[0]
            if key.startswith("unet.") and layer not in layers:
                raise UserError(f"LoRA '{file}' is for another network: it has a layer {layer} that the U-Net lacks")
        pipeline.load_lora_weights(str(file), adapter_name=adapter, use_safetensors=True)
    except (ValueError, RuntimeError, KeyError, TypeError, IndexError) as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"LoRA '{file}' does not fit this model: {reason}") from error
    reached = [
        name
        for name in ("unet", "text_encoder", "text_encoder_2")
        if adapter in getattr(getattr(pipeline, name, None), "peft_config", {})
    ]
    if not reached:
        raise UserError(f"LoRA '{file}' has no layer for this model; it may be made for another family")
    return reached


def fuse_loras(pipeline: DiffusionPipeline, files: Sequence[LoraFile]) -> list[str]:
    """Adds LoRAs to the weights of a pipeline's networks, in order; returns ``sha256*scale`` of each."""
    fused = []
    for number, lora in enumerate(files):
        file = find_lora(lora.path, lora.weight_name)
        adapter = f"fuse{number}"
        reached = load_lora(pipeline, file, adapter)
        pipeline.fuse_lora(components=reached, lora_scale=lora.scale, adapter_names=[adapter])
        pipeline.unload_lora_weights()
        fused.append(f"{hash_file(file)}*{lora.scale:g}")
    return fused
