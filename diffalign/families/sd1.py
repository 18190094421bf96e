"""Stable Diffusion 1.x: one CLIP text encoder, the empty prompt as the unconditional branch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from ..data.batch import Cond
from ..errors import UserError
from .base import Model, load_part
from .folder import ModelFolder


class SD1(Model):
    """SD1.x, and every model of its make."""

    family = "sd1"
    pipeline_class = StableDiffusionPipeline

    @classmethod
    def load(cls, folder: ModelFolder, unet_dtype: torch.dtype, device: torch.device, dtype: torch.dtype) -> SD1:
        """The networks on the CPU: U-Net in ``unet_dtype``, the others fp32; ``dtype`` is what the U-Net will be."""
        for component in ("unet", "vae", "text_encoder", "tokenizer", "scheduler"):
            if component not in folder.components() or not (folder.path / component).is_dir():
                raise UserError(f"model '{folder.source}' lacks its {component}/; download the whole folder")
        unet = load_part(UNet2DConditionModel, folder, "unet", unet_dtype)
        text_encoder = load_part(CLIPTextModel, folder, "text_encoder", torch.float32)
        width, cross = text_encoder.config.hidden_size, unet.config.cross_attention_dim
        if cross != width:
            raise UserError(f"model '{folder.source}': text encoder width {width} and U-Net width {cross} differ")
        if not any((folder.path / "tokenizer" / name).is_file() for name in ("vocab.json", "tokenizer.json")):
            raise UserError(f"model '{folder.source}' has no vocab.json in tokenizer/; download the folder again")
        try:
            tokenizer = CLIPTokenizer.from_pretrained(str(folder.path / "tokenizer"), local_files_only=True)
        except (OSError, ValueError, TypeError) as error:
            reason = " ".join(str(error).split())[:160]
            raise UserError(f"model '{folder.source}': tokenizer cannot be loaded: {reason}") from error
        vae = load_part(AutoencoderKL, folder, "vae", torch.float32)
        return cls(folder, unet, vae, text_encoder, tokenizer, device, dtype)

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str], batch: int = 64) -> Cond:
        """Last hidden state after the final layer norm (no clip skip), (B, 77, D) fp32 on the device."""
        self.ensure_encoders()
        limit = self.tokenizer.model_max_length
        parts = []
        for start in range(0, len(prompts), batch):
            tokens = self.tokenizer(
                list(prompts[start : start + batch]),
                padding="max_length",
                max_length=limit,
                truncation=True,
                return_tensors="pt",
            )
            use_mask = getattr(self.text_encoder.config, "use_attention_mask", False)
            mask = tokens.attention_mask.to(self.device) if use_mask else None
            parts.append(self.text_encoder(tokens.input_ids.to(self.device), attention_mask=mask)[0])
        if not parts:
            return Cond(torch.zeros(0, limit, self.text_encoder.config.hidden_size, device=self.device))
        return Cond(torch.cat(parts))

    def _pipeline_options(self) -> Mapping[str, Any]:
        return {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


FAMILY = SD1
