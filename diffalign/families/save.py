"""What a training run leaves behind for plain diffusers: a LoRA file, or a whole pipeline folder."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

from ..facts import SamplingRecord
from .base import Model
from .lora import NAME
from .schedulers import recorded_scheduler

# diffusers reads a LoRA's rank, alpha and layers from this header entry, as LoraConfig arguments under "unet.".
HEADER = "lora_adapter_metadata"


def lora_header(config: LoraConfig) -> dict[str, Any]:
    """The LoraConfig arguments that a reload needs: rank, alpha, layers, and whatever differs from peft's defaults."""
    default = LoraConfig()
    header: dict[str, Any] = {
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "target_modules": sorted(config.target_modules),
    }
    for name in ("bias", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "lora_bias"):
        if getattr(config, name) != getattr(default, name):
            header[name] = getattr(config, name)
    return header


def save_lora(
    state: Mapping[str, Tensor],
    config: LoraConfig,
    folder: Path,
    metadata: Mapping[str, str] | None = None,
    dtype: torch.dtype | None = None,
) -> Path:
    """Writes ``pytorch_lora_weights.safetensors`` as diffusers' ``load_lora_weights`` takes it.

    Args:
        state: one adapter as ``peft.get_peft_model_state_dict`` gives it: ``<layer>.lora_A.weight``, no adapter name.
        config: its LoraConfig; rank and alpha go into the file's header, so alpha unequal to rank survives.
        folder: is made; the file appears in it at once or not at all.
        metadata: more entries for the header (method, base model, ...).
        dtype: of the stored tensors, default as they are (fp32).

    Returns:
        The file's path.
    """
    tensors = {f"unet.{name}": t.detach().to("cpu", dtype or t.dtype).contiguous() for name, t in state.items()}
    header = {f"unet.{name}": value for name, value in lora_header(config).items()}
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / NAME
    partial = folder / f".{NAME}.partial"
    save_file(tensors, partial, {**(metadata or {}), "format": "pt", HEADER: json.dumps(header, sort_keys=True)})
    os.replace(partial, file)
    return file


def plain_state(unet: nn.Module) -> dict[str, Tensor]:
    """The U-Net's own weights under their original names, without any adapter."""
    return {
        name.replace(".base_layer.", "."): tensor for name, tensor in unet.state_dict().items() if ".lora_" not in name
    }


def merge_lora(unet: nn.Module, state: Mapping[str, Tensor], config: LoraConfig) -> dict[str, Tensor]:
    """The U-Net's weights with one adapter added, in fp32 on the CPU; the U-Net is not touched.

    W + scale * B A for linear layers, and the same for convolutions, with A (rank, in, k, k) and B (out, rank, 1, 1);
    scale = alpha / rank, or alpha / sqrt(rank) with rsLoRA. Adapters as a run makes them: one rank, no DoRA."""
    merged = {name: tensor.detach().to("cpu", torch.float32, copy=True) for name, tensor in plain_state(unet).items()}
    for name, down in state.items():
        layer, found, _ = name.partition(".lora_A.weight")
        if not found:
            continue
        a, b = down.detach().to("cpu", torch.float32), state[f"{layer}.lora_B.weight"].detach().to("cpu", torch.float32)
        scale = config.lora_alpha / (config.r**0.5 if config.use_rslora else config.r)
        weight = merged[f"{layer}.weight"]
        weight += scale * (b.flatten(1) @ a.flatten(1)).view_as(weight)
    return merged


def save_merged(
    model: Model,
    folder: Path,
    *,
    unet: nn.Module | None = None,
    lora: tuple[Mapping[str, Tensor], LoraConfig] | None = None,
    dtype: torch.dtype = torch.float32,
    record: SamplingRecord | None = None,
) -> Path:
    """Writes a whole pipeline folder that plain ``from_pretrained`` opens; the live networks are not touched.

    Args:
        unet: the U-Net to store, default the model's own; live adapters in it are left out.
        lora: an adapter to add to it (state and config as for `save_lora`).
        folder: is made; model_index.json comes last, so a torn export is no model.
        dtype: of the stored weights. fp32 keeps a small change of the weights; bf16 may round it away.
        record: the sampler of a few-step model, whose scheduler takes the place of the base's.
    """
    source = model.unet if unet is None else unet
    state = merge_lora(source, *lora) if lora else plain_state(source)
    with torch.device("meta"):
        network = type(model.unet).from_config(model.unet.config)
    nn.Module.to(network.to_empty(device="cpu"), dtype).load_state_dict(state)
    parts: dict[str, Any] = {
        name: nn.Module.to(copy.deepcopy(part), "cpu", dtype) if isinstance(part, nn.Module) else part
        for name, part in model.parts().items()
    }
    pipeline = model.assemble(unet=network, **parts)
    if record is not None:
        pipeline.register_modules(scheduler=recorded_scheduler(record))
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / ".partial"
    shutil.rmtree(partial, ignore_errors=True)
    bars = is_progress_bar_enabled()
    disable_progress_bar()  # one bar a file
    try:
        pipeline.save_pretrained(partial, safe_serialization=True)
    finally:
        if bars:
            enable_progress_bar()
    for item in sorted(partial.iterdir(), key=lambda p: p.name == "model_index.json"):
        target = folder / item.name
        if target.is_dir():
            shutil.rmtree(target)
        os.replace(item, target)
    partial.rmdir()
    return folder
