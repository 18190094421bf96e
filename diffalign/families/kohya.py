"""LoRA files as kohya-ss' sd-scripts writes them, which ComfyUI, A1111 and Forge read.

``lora_unet_<layer>.lora_down.weight``, ``.lora_up.weight`` and ``.alpha``, dots of the layer's name as underscores. SD1
and SD2 keep diffusers' names; SDXL has those of its original network (``input_blocks_4_1_...``), on which sd-scripts
trains. A layer's change is alpha / rank * up @ down.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import UserError

if TYPE_CHECKING:
    from .lora import LoraWeights

PREFIX = "lora_unet_"
# layers outside the blocks
OUTSIDE = {
    "conv_in": "input_blocks_0_0",
    "conv_out": "out_2",
    "time_embedding.linear_1": "time_embed_0",
    "time_embedding.linear_2": "time_embed_2",
    "add_embedding.linear_1": "label_emb_0_0",
    "add_embedding.linear_2": "label_emb_0_2",
}
# layers of a residual block
RESNET = {
    "conv1": "in_layers_2",
    "time_emb_proj": "emb_layers_1",
    "conv2": "out_layers_3",
    "conv_shortcut": "skip_connection",
}
BLOCK = re.compile(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")
MIDDLE = re.compile(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)")
# ss_base_model_version as sd-scripts writes it for each family
VERSIONS = {"sd1": "sd_v1", "sd2": "sd_v2", "sdxl": "sdxl_base_v1-0"}
ARCHITECTURES = {  # library/sai_model_spec.py of sd-scripts
    "sd1": "stable-diffusion-v1",
    "sd2": "stable-diffusion-v2-512",
    "sdxl": "stable-diffusion-xl-v1-base",
}


def kohya_names(layers: Iterable[str], family: str, config: Mapping[str, Any]) -> dict[str, str]:
    """kohya's name of each layer, without a suffix; no two layers share one.

    Args:
        layers: diffusers' names, such as ``mid_block.attentions.0.proj_in``.
        family: ``sd1``, ``sd2`` or ``sdxl``.
        config: of the U-Net.

    Raises UserError for a layer that the format has no name for."""
    if family != "sdxl":
        return {layer: PREFIX + layer.replace(".", "_") for layer in layers}
    return {layer: PREFIX + original_name(layer, config) for layer in layers}


def original_name(layer: str, config: Mapping[str, Any]) -> str:
    """A layer of SDXL's U-Net under its name in the original network, dots as underscores.

    There the blocks of a side are numbered through: each holds a residual block (0) and a transformer (1) or only the
    first; a downsampling has a number of its own, an upsampling is the last part of its block's last number."""
    per_block = config.get("layers_per_block")
    if not isinstance(per_block, int) or config.get("mid_block_type", "") != "UNetMidBlock2DCrossAttn":
        raise UserError("this U-Net is not built as SDXL's is, so kohya's names do not fit it; use --format diffusers")
    if layer in OUTSIDE:
        return OUTSIDE[layer]
    if found := MIDDLE.fullmatch(layer):
        kind, index, rest = found[1], int(found[2]), found[3]
        return f"middle_block_1_{_rest(rest)}" if kind == "attentions" else f"middle_block_{2 * index}_{_resnet(rest)}"
    found = BLOCK.fullmatch(layer)
    if not found:
        raise UserError(f"kohya's LoRA format has no name for the layer '{layer}'; use --format diffusers")
    side, block, kind, index, rest = found[1], int(found[2]), found[3], int(found[4]), found[5]
    number = block * (per_block + 1) + index + (side == "down")
    place = "input_blocks" if side == "down" else "output_blocks"
    if kind == "downsamplers":
        return f"input_blocks_{(block + 1) * (per_block + 1)}_0_op"
    if kind == "upsamplers":
        part = 2 if "CrossAttn" in config["up_block_types"][block] else 1
        return f"output_blocks_{block * (per_block + 1) + per_block}_{part}_{_rest(rest)}"
    if kind == "attentions":
        return f"{place}_{number}_1_{_rest(rest)}"
    return f"{place}_{number}_0_{_resnet(rest)}"


def _rest(layer: str) -> str:
    return layer.replace(".", "_")


def _resnet(layer: str) -> str:
    if layer not in RESNET:
        raise UserError(f"kohya's LoRA format has no name for the layer '{layer}'; use --format diffusers")
    return RESNET[layer]


def to_kohya(
    lora: LoraWeights, family: str, config: Mapping[str, Any], dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Tensors of the file, as they are or in ``dtype``; alpha stays fp32. rsLoRA is in alpha: scale = alpha / rank.

    Every layer has the same alpha (that of most layers); where a layer's differs, its up matrix takes the factor, since
    diffusers misreads alphas that differ.

    Raises UserError for DoRA, whose magnitudes other readers take differently, and for layers without a name."""
    if lora.dora:
        raise UserError("this LoRA is a DoRA, which kohya's readers do not take alike; use --format merged")
    alpha = common_alpha(lora)
    tensors = {}
    for layer, name in kohya_names(lora.layers, family, config).items():
        down, up = lora.down(layer), lora.up(layer)
        if lora.alphas[layer] != alpha:
            up = (up.float() * (lora.alphas[layer] / alpha)).to(up.dtype)
        tensors[f"{name}.lora_down.weight"] = down.to(dtype or down.dtype).contiguous()
        tensors[f"{name}.lora_up.weight"] = up.to(dtype or up.dtype).contiguous()
        tensors[f"{name}.alpha"] = torch.tensor(alpha, dtype=torch.float32)
    return tensors


def common_alpha(lora: LoraWeights) -> float:
    """The alpha of most layers."""
    return Counter(lora.alphas.values()).most_common(1)[0][0]


def kohya_metadata(lora: LoraWeights, family: str, prediction: str, resolution: int, title: str) -> dict[str, str]:
    """The entries that readers show or choose by: sd-scripts' minimum (``ss_...``) and ModelSpec 1.0.1.

    Args:
        prediction: ``epsilon`` or ``v_prediction``.
        resolution: side of the base model's pictures in pixels."""
    v = prediction == "v_prediction"
    ranks = sorted(set(lora.ranks.values()))
    kernels = any(lora.down(layer).shape[2:] == (3, 3) for layer in lora.layers)
    rank = str(ranks[0]) if len(ranks) == 1 else "Dynamic"
    alpha = f"{common_alpha(lora):g}"
    architecture = ARCHITECTURES[family] if not (v and family == "sd2") else "stable-diffusion-v2-768-v"
    return {
        "ss_base_model_version": VERSIONS[family] + ("_v" if v and family != "sdxl" else ""),
        "ss_v2": str(family == "sd2"),
        "ss_network_module": "networks.lora",
        "ss_network_dim": rank,
        "ss_network_alpha": alpha,
        "ss_network_args": json.dumps({"conv_dim": rank, "conv_alpha": alpha} if kernels else {}),
        "ss_output_name": title,
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{architecture}/lora",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models"
        if family == "sdxl"
        else "diffusers",
        "modelspec.title": title,
        "modelspec.resolution": f"{resolution}x{resolution}",
        "modelspec.prediction_type": "v" if v else "epsilon",
    }
