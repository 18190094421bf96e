"""OpenCLIP checkpoints in transformers' ``CLIPModel``: the key map both ways, and the sizes read off the tensors.

The map was checked against open_clip 3.3.0 (no key left over, features equal to 2e-8): ``spec/evaluators.md`` 1.3.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from transformers import CLIPConfig

State = dict[str, torch.Tensor]
TOWERS = (("visual.transformer.resblocks", "vision_model"), ("transformer.resblocks", "text_model"))
# OpenCLIP -> transformers, where a tensor only changes its name
PLAIN = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "logit_scale": "logit_scale",
}
TURNED = {"visual.proj": "visual_projection.weight", "text_projection": "text_projection.weight"}  # transposed
BLOCK = {"attn.out_proj": "self_attn.out_proj", "ln_1": "layer_norm1", "ln_2": "layer_norm2"}
BLOCK |= {"mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
HEAD_WIDTHS = {1280: 80, 1408: 88, 1664: 104}  # ViT-H, g, bigG; 64 elsewhere
IGNORED = {"input_resolution", "context_length", "vocab_size", "attn_mask"}  # of OpenAI's own archives


def from_openclip(state: Mapping[str, torch.Tensor]) -> State:
    """An OpenCLIP state dict (ViT with a CLIP text tower) under transformers' names. Tensors are shared, not copied.

    Raises ValueError naming the first key that such a model does not have."""
    out: State = {}
    for key, value in state.items():
        if key in PLAIN:
            out[PLAIN[key]] = value
        elif key in TURNED:
            out[TURNED[key]] = value.T
        elif key not in IGNORED:
            out.update(_block(key, value))
    return out


def _block(key: str, value: torch.Tensor) -> State:
    for prefix, tower in TOWERS:
        match = re.fullmatch(re.escape(prefix) + r"\.(\d+)\.(.+)\.?(weight|bias)", key)
        if match is None:
            continue
        layer, name, kind = f"{tower}.encoder.layers.{match[1]}", match[2].rstrip("._"), match[3]
        if name == "attn.in_proj":
            return {f"{layer}.self_attn.{n}_proj.{kind}": v for n, v in zip("qkv", value.chunk(3), strict=True)}
        if name in BLOCK:
            return {f"{layer}.{BLOCK[name]}.{kind}": value}
    raise ValueError(key)


def to_openclip(state: Mapping[str, torch.Tensor]) -> State:
    """The inverse of :func:`from_openclip`, for a state dict of ``CLIPModel``."""
    plain, turned = {v: k for k, v in PLAIN.items()}, {v: k for k, v in TURNED.items()}
    block = {v: k for k, v in BLOCK.items()}
    towers = {tower: prefix for prefix, tower in TOWERS}
    out: State = {}
    for key, value in state.items():
        if key in plain:
            out[plain[key]] = value
        elif key in turned:
            out[turned[key]] = value.T.contiguous()
        elif match := re.fullmatch(r"(\w+)\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", key):
            prefix, name, kind = f"{towers[match[1]]}.{match[2]}", match[3], match[4]
            if name in block:
                out[f"{prefix}.{block[name]}.{kind}"] = value
            elif name == "self_attn.q_proj":
                thirds = [state[key.replace("q_proj", f"{n}_proj")] for n in "qkv"]
                out[f"{prefix}.attn.in_proj_{kind}"] = torch.cat(thirds)
    return out


def config_of(
    state: Mapping[str, torch.Tensor], activation: str, stated: Mapping[str, Any] | None = None
) -> CLIPConfig:
    """A CLIPConfig for OpenCLIP tensors: sizes from their shapes, head counts and activation from ``stated`` (the
    ``model_cfg`` of an ``open_clip_config.json``) or from the rules of the published models.

    Raises ValueError for towers that a CLIPModel does not have, KeyError for a tensor that is missing."""
    stated = stated or {}
    vision, text = stated.get("vision_cfg", {}), stated.get("text_cfg", {})
    strange = [k for k in ("timm_model_name", "hf_model_name", "attentional_pool") if vision.get(k) or text.get(k)]
    if strange:
        raise ValueError(strange[0])
    patches, width = state["visual.conv1.weight"], state["visual.conv1.weight"].shape[0]
    places, text_width = state["visual.positional_embedding"].shape[0] - 1, state["ln_final.weight"].shape[0]
    head = int(vision.get("head_width", HEAD_WIDTHS.get(width, min(64, width))))
    act = "quick_gelu" if stated.get("quick_gelu") else "gelu" if stated else activation
    vocabulary, context = state["token_embedding.weight"].shape[0], state["positional_embedding"].shape[0]
    return CLIPConfig(
        projection_dim=int(state["visual.proj"].shape[1]),
        vision_config={
            "hidden_size": width,
            "intermediate_size": state["visual.transformer.resblocks.0.mlp.c_fc.weight"].shape[0],
            "num_hidden_layers": _layers(state, "visual.transformer.resblocks."),
            "num_attention_heads": width // head,
            "patch_size": patches.shape[-1],
            "image_size": round(places**0.5) * patches.shape[-1],
            "hidden_act": act,
        },
        text_config={
            "vocab_size": vocabulary,
            "hidden_size": text_width,
            "intermediate_size": state["transformer.resblocks.0.mlp.c_fc.weight"].shape[0],
            "num_hidden_layers": _layers(state, "transformer.resblocks."),
            "num_attention_heads": int(text.get("heads", max(1, text_width // 64))),
            "max_position_embeddings": context,
            "hidden_act": act,
            "bos_token_id": vocabulary - 2,
            "eos_token_id": vocabulary - 1,
            "pad_token_id": vocabulary - 1,
        },
    )


def _layers(state: Mapping[str, torch.Tensor], prefix: str) -> int:
    return 1 + max(int(k.removeprefix(prefix).partition(".")[0]) for k in state if k.startswith(prefix))
