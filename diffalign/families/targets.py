"""Which layers of a U-Net carry adapters."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import nn

from ..errors import UserError, nearest

# to_q, to_k, to_v, to_out of every attention: 128 layers on SD1.5, 560 on SDXL.
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
# Every linear and convolution layer that DMD2 adapts (arXiv 2405.14867, its SDXL LoRA): all but the time embedding's
# own two layers, conv_in and conv_out. 278 layers on SD1.5 and 788 on SDXL.
ALL = (
    *ATTENTION,
    "proj_in",
    "proj_out",
    "ff.net.0.proj",
    "ff.net.2",
    "conv1",
    "conv2",
    "conv_shortcut",
    "downsamplers.0.conv",
    "upsamplers.0.conv",
    "time_emb_proj",
)
# how text encoders and their layers are named in LoRA files and in transformers
TEXT = re.compile(r"(lora_te|te\d?$|te\d?[._]|text_)|(.*\.)?((q|k|v|out)_proj|fc[12]|text_projection|self_attn)(\.|$)")
PRESETS = {"attention": ATTENTION, "all": ALL}


def adaptable(unet: nn.Module) -> list[str]:
    """Exact names of all linear and convolution layers, also where adapters are already in place."""
    names = [
        name.removesuffix(".base_layer")
        for name, module in unet.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d)) and ".lora_" not in name
    ]
    return list(dict.fromkeys(names))


def lora_targets(unet: nn.Module, preset: str | Sequence[str]) -> list[str]:
    """Exact layer names for a preset (``attention``, ``all``) or for explicit names.

    An explicit name is a layer's full name, or its end at a dot: ``to_q``, ``attn1.to_q``.

    Raises UserError when a preset is unknown or a name fits no linear or convolution layer."""
    layers = adaptable(unet)
    if isinstance(preset, str):
        if preset not in PRESETS:
            raise UserError(
                f"unknown model.lora.targets '{preset}'{nearest(preset, PRESETS)} (or a list of layer names)"
            )
        ends: Sequence[str] = PRESETS[preset]
    else:
        ends = preset
        if not ends:
            raise UserError("model.lora.targets is an empty list; name layers, or use attention or all")
    chosen = {end: [n for n in layers if n == end or n.endswith("." + end)] for end in ends}
    if not isinstance(preset, str):
        for end, found in chosen.items():
            if not found and TEXT.match(end):
                raise UserError(
                    f"model.lora.targets: '{end}' is of a text encoder, and text encoders stay as they are "
                    "(prompts are encoded once); name layers of the U-Net, or use attention or all"
                )
            if not found:
                parts = {".".join(n.split(".")[-k:]) for n in layers for k in (1, 2, 3)} | set(layers)
                known = parts if "." in end else {p for p in parts if not p.isdigit()}
                raise UserError(f"model.lora.targets: no linear or convolution layer '{end}'{nearest(end, known)}")
    wanted = {name for found in chosen.values() for name in found}
    return [name for name in layers if name in wanted]
