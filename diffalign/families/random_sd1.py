"""Models of SD1.5's make with random weights, and pairs of random pictures: what speed and memory are measured on."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from transformers.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

from .known import CLIP_L, SD15_UNET, VAE, Config

WIDTHS = frozenset(
    (
        "block_out_channels",
        "cross_attention_dim",
        "norm_num_groups",
        "hidden_size",
        "intermediate_size",
        "projection_dim",
    )
)
START, END = "<|startoftext|>", "<|endoftext|>"


def divided(config: Config, divisor: int) -> Config:
    """A config with every width divided."""
    cut = {
        key: tuple(w // divisor for w in value) if isinstance(value, tuple) else value // divisor
        for key, value in config.items()
        if key in WIDTHS
    }
    return config | cut


def sd15_unet(divisor: int = 1, size: int = 64) -> UNet2DConditionModel:
    """SD1.5's U-Net with every width divided: 859.5 M weights at 1, 54 M at 4; latents of ``size`` x ``size``."""
    return UNet2DConditionModel(**divided(SD15_UNET, divisor) | {"sample_size": size})


def sd15_vae(divisor: int = 1, size: int = 64) -> AutoencoderKL:
    """SD1.5's VAE with every width divided: 83.7 M weights at 1."""
    return AutoencoderKL(**divided(VAE, divisor) | {"sample_size": 8 * size})


def sd15_text_encoder(divisor: int = 1) -> CLIPTextModel:
    """SD1.5's text encoder with every width divided: 123.1 M weights at 1."""
    return CLIPTextModel(CLIPTextConfig(**divided(CLIP_L, divisor)))


def byte_tokenizer() -> CLIPTokenizer:
    """A CLIPTokenizer without merges: one token a byte, 77 in all."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    symbols = [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    tokens = [*symbols, *(s + "</w>" for s in symbols), START, END]
    vocab = {token: i for i, token in enumerate(tokens)}
    return CLIPTokenizer(
        vocab=vocab, merges=[], bos_token=START, eos_token=END, unk_token=END, pad_token=END, model_max_length=77
    )


def write_random_sd1(folder: Path, divisor: int = 1, size: int = 64, seed: int = 0) -> Path:
    """A pipeline folder with SD1.5's configs, every width divided by ``divisor`` (1, 4 or 16), and random weights.

    Args:
        size: side of the latents that the U-Net names as its own; pictures have 8 times that.

    The files are bf16, 2.1 GB at ``divisor`` 1."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = StableDiffusionPipeline(
            vae=sd15_vae(divisor, size),
            text_encoder=sd15_text_encoder(divisor),
            tokenizer=byte_tokenizer(),
            unet=sd15_unet(divisor, size),
            scheduler=PNDMScheduler(
                beta_start=0.00085,
                beta_end=0.012,
                beta_schedule="scaled_linear",
                set_alpha_to_one=False,
                steps_offset=1,
                skip_prk_steps=True,
            ),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    bars = is_progress_bar_enabled()
    disable_progress_bar()
    pipeline.to(dtype=torch.bfloat16).save_pretrained(folder)
    if bars:
        enable_progress_bar()
    return folder


def write_random_pairs(folder: Path, count: int, side: int, seed: int = 0) -> Path:
    """``count`` pairs of coloured checks, ``side`` pixels wide, with prompts of random letters."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    lines = []
    for i in range(count):
        row = {"prompt": "".join(rng.choice(list("abcdefgh "), 40))}
        for name in ("chosen", "rejected"):
            row[name] = f"{i}-{name}.png"
            checks = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
            checks.resize((side, side), Image.Resampling.NEAREST).save(folder / row[name])
        lines.append(json.dumps(row))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder
