"""SDXL: two text encoders, pooled text, and the size and crop of the picture as conditioning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from ..data.batch import Cond
from ..errors import UserError
from .base import Model, load_part, require_parts
from .folder import ModelFolder
from .text import load_tokenizer, overflow, tokenize

PARTS = ("unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")


class SDXL(Model):
    """SDXL base, and every model of its make.

    The text is the penultimate hidden states of both encoders side by side, beside the pooled projection of the second
    (offline sheet 0.5). ``time_ids`` of a picture are (original height, width, crop top, left, target height, width).
    """

    family = "sdxl"
    pipeline_class = StableDiffusionXLPipeline

    def __init__(
        self,
        folder: ModelFolder,
        unet: UNet2DConditionModel,
        vae: AutoencoderKL,
        text_encoders: tuple[CLIPTextModel, CLIPTextModelWithProjection],
        tokenizers: tuple[CLIPTokenizer, CLIPTokenizer],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(folder, unet, vae, text_encoders[0], tokenizers[0], device, dtype)
        self.text_encoder_2 = text_encoders[1].requires_grad_(False).eval()
        self.tokenizer_2 = tokenizers[1]
        self.zero_uncond = bool(folder.index.get("force_zeros_for_empty_prompt", True))

    @classmethod
    def load(cls, folder: ModelFolder, unet_dtype: torch.dtype, device: torch.device, dtype: torch.dtype) -> SDXL:
        """The networks on the CPU: U-Net in ``unet_dtype``, the others fp32; ``dtype`` is what the U-Net will be."""
        require_parts(folder, PARTS)
        unet = load_part(UNet2DConditionModel, folder, "unet", unet_dtype)
        first = load_part(CLIPTextModel, folder, "text_encoder", torch.float32)
        second = load_part(CLIPTextModelWithProjection, folder, "text_encoder_2", torch.float32)
        width, cross = first.config.hidden_size + second.config.hidden_size, unet.config.cross_attention_dim
        if cross != width:
            raise UserError(f"model '{folder.source}': text encoders' width {width} and U-Net width {cross} differ")
        pooled = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
        if pooled != second.config.projection_dim:
            raise UserError(
                f"model '{folder.source}': text_encoder_2 gives {second.config.projection_dim} pooled numbers and the "
                f"U-Net takes {pooled}; the folder mixes models, download it again"
            )
        tokenizers = (load_tokenizer(folder), load_tokenizer(folder, "tokenizer_2"))
        vae = load_part(AutoencoderKL, folder, "vae", torch.float32)
        return cls(folder, unet, vae, (first, second), tokenizers, device, dtype)

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str], batch: int = 64) -> Cond:
        """Penultimate states (B, 77, D1 + D2) and ``text_embeds`` (B, P), fp32 on the device; no sizes yet."""
        self.ensure_encoders(self.text_encoder, self.text_encoder_2)
        if self.long_prompts:
            return self.by_segments(prompts, batch)
        pairs = ((self.tokenizer, self.text_encoder), (self.tokenizer_2, self.text_encoder_2))
        parts = []
        # an empty list goes through as one empty text, for the shapes
        for start in range(0, max(1, len(prompts)), batch):
            texts, states = list(prompts[start : start + batch]) or [""], []
            for tokenizer, encoder in pairs:
                ids = tokenize(tokenizer, texts).input_ids.to(self.device)
                output = encoder(ids, output_hidden_states=True)
                states.append(output.hidden_states[-2])
            parts.append(Cond(torch.cat(states, -1), {"text_embeds": output[0]}))
        return Cond.cat(parts).take(slice(0, len(prompts)))

    def uncond(self, n: int = 1) -> Cond:
        """Zeros where the pipeline's ``force_zeros_for_empty_prompt`` says so (SDXL base), else the empty prompt."""
        if self._uncond is None and self.zero_uncond:
            empty = self.encode_prompts([""])
            zeros = {name: torch.zeros_like(tensor) for name, tensor in empty.added.items()}
            self._uncond = Cond(torch.zeros_like(empty.embeds), zeros)
        return super().uncond(n)

    def token_overflow(self, prompts: Sequence[str]) -> list[int]:
        """Tokens that each prompt loses, by the tokenizer that loses more."""
        if self.long_prompts:
            return super().token_overflow(prompts)
        both = zip(overflow(self.tokenizer, prompts), overflow(self.tokenizer_2, prompts), strict=True)
        return [max(pair) for pair in both]

    def encoders(self) -> tuple[nn.Module, ...]:
        """What is needed to encode and decode only."""
        return (*super().encoders(), self.text_encoder_2)

    def parts(self) -> dict[str, Any]:
        """The pipeline's components beside U-Net and scheduler."""
        return {**super().parts(), "text_encoder_2": self.text_encoder_2, "tokenizer_2": self.tokenizer_2}

    def _pipeline_options(self) -> Mapping[str, Any]:
        return {"force_zeros_for_empty_prompt": self.zero_uncond, "add_watermarker": False}


FAMILY = SDXL
