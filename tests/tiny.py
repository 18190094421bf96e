"""A random SD1.x pipeline folder of the real classes, small enough to be built anew in a second."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

START, END = "<|startoftext|>", "<|endoftext|>"
# What the scheduler_config.json of SD1.5 and SDXL-base says.
SD_SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "prediction_type": "epsilon",
}


def byte_tokenizer(max_length: int = 77) -> CLIPTokenizer:
    """A CLIPTokenizer with no merges: one token a byte, so a prompt of n letters (spaces apart) has n + 2 tokens."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    symbols = [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    tokens = [*symbols, *(s + "</w>" for s in symbols), START, END]
    return CLIPTokenizer(
        vocab={token: i for i, token in enumerate(tokens)},
        merges=[],
        bos_token=START,
        eos_token=END,
        unk_token=END,
        pad_token=END,
        model_max_length=max_length,
    )


def tiny_unet(in_channels: int = 4, cross: int = 16) -> UNet2DConditionModel:
    """About 160,000 weights, latents of 8 x 8 (any even size works), attention at both resolutions."""
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=in_channels,
        out_channels=4,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=cross,
        attention_head_dim=2,
        norm_num_groups=8,
    ).eval()


def tiny_pipeline(seed: int = 0, prediction_type: str = "epsilon", in_channels: int = 4) -> StableDiffusionPipeline:
    """The parts with random weights: VAE f=8 (64 px <-> 8 x 8 x 4), text width 16, 77 tokens, PNDM like SD1.5."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = byte_tokenizer()
        text = CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=32,
            projection_dim=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=77,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        vae = AutoencoderKL(
            block_out_channels=(8, 8, 8, 8),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=4,
            sample_size=64,
        )
        return StableDiffusionPipeline(
            vae=vae.eval(),
            text_encoder=CLIPTextModel(text).eval(),
            tokenizer=tokenizer,
            unet=tiny_unet(in_channels),
            scheduler=PNDMScheduler(**{**SD_SCHEDULE, "prediction_type": prediction_type, "skip_prk_steps": True}),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )


def write_tiny_model(folder: Path, seed: int = 0, variant: str | None = None, max_shard_size: str = "10GB") -> Path:
    """Save :func:`tiny_pipeline` as a diffusers folder; ``variant='fp16'`` and small shards as the hub has them."""
    pipeline = tiny_pipeline(seed)
    if variant == "fp16":
        pipeline = pipeline.to(dtype=torch.float16)
    pipeline.save_pretrained(folder, variant=variant, max_shard_size=max_shard_size)
    return folder


def ddim_scheduler(**options: object) -> DDIMScheduler:
    """diffusers' DDIM scheduler on the schedule of SD1.5, without clipping."""
    return DDIMScheduler(**{**SD_SCHEDULE, "clip_sample": False, **options})
