"""The original (LDM and SGM) layout of checkpoints, written from diffusers networks by a key map of the tests' own."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file
from torch import Tensor, nn

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
HEADS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}


def unet_names(unet: nn.Module) -> dict[str, str]:
    """Original name of each tensor of a U-Net, without the prefix."""
    layers, attentive = unet.config.layers_per_block, [type(b).__name__.startswith("Cross") for b in unet.up_blocks]
    found = {}
    for name in unet.state_dict():
        if match := re.match(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.*)", name):
            way, block, kind, number, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
            first = block * (layers + 1)
            if kind == "downsamplers":
                new = f"input_blocks.{first + 1 + layers}.0.{rest.replace('conv', 'op')}"
            elif kind == "upsamplers":
                new = f"output_blocks.{first + layers}.{2 if attentive[block] else 1}.{rest}"
            else:
                side = f"input_blocks.{first + 1 + number}" if way == "down" else f"output_blocks.{first + number}"
                new = f"{side}.{0 if kind == 'resnets' else 1}.{rest}"
        else:
            head = next(h for h in HEADS if name.startswith(h + "."))
            new = HEADS[head] + name.removeprefix(head)
        if ".resnets." in name:
            head, part, tail = re.fullmatch(r"(.*\.)(\w+)(\.(?:weight|bias))", new).groups()  # type: ignore[union-attr]
            new = head + RESNET[part] + tail
        found[name] = new
    return found


def vae_tensors(vae: nn.Module) -> dict[str, Tensor]:
    """A VAE in the original layout, without the prefix; its attention as 1 x 1 convolutions."""
    levels, out = len(vae.config.block_out_channels), {}
    for name, tensor in vae.state_dict().items():
        new = name.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
        new = re.sub(r"encoder\.down_blocks\.(\d+)\.resnets\.", r"encoder.down.\1.block.", new)
        new = re.sub(r"encoder\.down_blocks\.(\d+)\.downsamplers\.0\.", r"encoder.down.\1.downsample.", new)
        new = re.sub(
            r"decoder\.up_blocks\.(\d+)\.(resnets|upsamplers\.0)\.",
            lambda m: f"decoder.up.{levels - 1 - int(m[1])}.{'block' if m[2] == 'resnets' else 'upsample'}.",
            new,
        )
        new = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", new)
        if ".attentions.0." in new:
            part = new.split(".attentions.0.")[1]
            part = part.replace("group_norm", "norm").replace("to_out.0", "proj_out").replace("to_", "")
            new = new.split("mid_block")[0] + "mid.attn_1." + part
            tensor = tensor[:, :, None, None] if tensor.ndim == 2 else tensor
        out[new] = tensor
    return out


def open_clip(encoder: nn.Module) -> dict[str, Tensor]:
    """A CLIP text encoder under OpenCLIP's names, without the prefix."""
    state = {name.removeprefix("text_model."): tensor for name, tensor in encoder.state_dict().items()}
    out: dict[str, Tensor] = {}
    plain = {
        "embeddings.token_embedding.weight": "token_embedding.weight",
        "embeddings.position_embedding.weight": "positional_embedding",
        "final_layer_norm.weight": "ln_final.weight",
        "final_layer_norm.bias": "ln_final.bias",
    }
    inner = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
    for name, tensor in state.items():
        if name in plain:
            out[plain[name]] = tensor
        elif name == "text_projection.weight":
            out["text_projection"] = tensor.T
        elif ".self_attn.q_proj." in name:
            parts = [state[name.replace("q_proj", f"{c}_proj")] for c in "qkv"]
            block = name.replace("encoder.layers", "transformer.resblocks").split(".self_attn")[0]
            out[f"{block}.attn.in_proj_{name.rsplit('.', 1)[1]}"] = torch.cat(parts)
        elif ".self_attn.k_proj." not in name and ".self_attn.v_proj." not in name:
            new = name.replace("encoder.layers", "transformer.resblocks").replace("self_attn.out_proj", "attn.out_proj")
            for old, short in inner.items():
                new = new.replace(old, short)
            out[new] = tensor
    return out


def original(pipeline: DiffusionPipeline, family: str) -> dict[str, Tensor]:
    """A whole checkpoint in the original layout."""
    state = pipeline.unet.state_dict()
    names = unet_names(pipeline.unet)
    out = {f"model.diffusion_model.{names[name]}": tensor for name, tensor in state.items()}
    out |= {f"first_stage_model.{name}": tensor for name, tensor in vae_tensors(pipeline.vae).items()}
    clip = {
        f"text_model.{name.removeprefix('text_model.')}": tensor
        for name, tensor in pipeline.text_encoder.state_dict().items()
    }
    if family == "sd1":
        out |= {f"cond_stage_model.transformer.{name}": tensor for name, tensor in clip.items()}
    elif family == "sd2":
        tower = open_clip(pipeline.text_encoder)
        last = [n for n in tower if ".resblocks.22." in n]  # the 24th layer is in the file, and is not read
        tower |= {n.replace(".22.", ".23."): torch.randn_like(tower[n]) for n in last}
        out |= {f"cond_stage_model.model.{name}": tensor for name, tensor in tower.items()}
    else:
        out |= {f"conditioner.embedders.0.transformer.{name}": tensor for name, tensor in clip.items()}
        out |= {f"conditioner.embedders.1.model.{n}": t for n, t in open_clip(pipeline.text_encoder_2).items()}
    return {name: tensor.contiguous().clone() for name, tensor in out.items()}


def write_original(pipeline: DiffusionPipeline, family: str, file: Path, **extra: Tensor) -> Path:
    """The checkpoint as a .safetensors file, with ``extra`` marker tensors."""
    save_file({**original(pipeline, family), **extra}, file)
    return file
