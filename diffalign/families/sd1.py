"""Stable Diffusion 1.x: one CLIP text encoder, the empty prompt as the unconditional branch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel

from ..data.batch import Cond
from ..errors import UserError
from .base import Model, load_part, require_parts
from .folder import ModelFolder
from .text import load_tokenizer, tokenize


class SD1(Model):
    """SD1.x, and every model of its make."""

    family = "sd1"
    pipeline_class = StableDiffusionPipeline

    @classmethod
    def load(cls, folder: ModelFolder, unet_dtype: torch.dtype, device: torch.device, dtype: torch.dtype) -> SD1:
        """The networks on the CPU: U-Net in ``unet_dtype``, the others fp32; ``dtype`` is what the U-Net will be."""
        require_parts(folder, ("unet", "vae", "text_encoder", "tokenizer", "scheduler"))
        unet = load_part(UNet2DConditionModel, folder, "unet", unet_dtype)
        text_encoder = load_part(CLIPTextModel, folder, "text_encoder", torch.float32)
        width, cross = text_encoder.config.hidden_size, unet.config.cross_attention_dim
        if cross != width:
            raise UserError(f"model '{folder.source}': text encoder width {width} and U-Net width {cross} differ")
        tokenizer = load_tokenizer(folder)
        vae = load_part(AutoencoderKL, folder, "vae", torch.float32)
        return cls(folder, unet, vae, text_encoder, tokenizer, device, dtype)

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str], batch: int = 64) -> Cond:
        """Last hidden state after the final layer norm (no clip skip), (B, 77, D) fp32 on the device."""
        self.ensure_encoders(self.text_encoder)
        if self.long_prompts:
            return self.by_segments(prompts, batch)
        parts = []
        for start in range(0, len(prompts), batch):
            tokens = tokenize(self.tokenizer, prompts[start : start + batch])
            use_mask = getattr(self.text_encoder.config, "use_attention_mask", False)
            mask = tokens.attention_mask.to(self.device) if use_mask else None
            parts.append(self.text_encoder(tokens.input_ids.to(self.device), attention_mask=mask)[0])
        if not parts:
            return Cond(
                torch.zeros(
                    0, self.tokenizer.model_max_length, self.text_encoder.config.hidden_size, device=self.device
                )
            )
        return Cond(torch.cat(parts))

    def _pipeline_options(self) -> Mapping[str, Any]:
        return {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


FAMILY = SD1
