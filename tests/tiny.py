"""Random SD1.x, SD2.x and SDXL pipelines of the real classes, small enough to be built anew in a second."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

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


def byte_tokenizer(max_length: int = 77, pad: str = END) -> CLIPTokenizer:
    """A CLIPTokenizer with no merges: one token a byte, so a prompt of n letters (spaces apart) has n + 2 tokens.

    SD2 and SDXL's second one pad with "!"."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    symbols = [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    tokens = [*symbols, *(s + "</w>" for s in symbols), START, END]
    return CLIPTokenizer(
        vocab={token: i for i, token in enumerate(tokens)},
        merges=[],
        bos_token=START,
        eos_token=END,
        unk_token=END,
        pad_token=pad,
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


def tiny_text(tokenizer: CLIPTokenizer, width: int = 16, layers: int = 2, projection: int = 16) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=projection,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=77,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def tiny_vae(**options: object) -> AutoencoderKL:
    """f=8: 64 px <-> 8 x 8 x 4."""
    return AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=64,
        **options,
    ).eval()


def tiny_pipeline(seed: int = 0, prediction_type: str = "epsilon", in_channels: int = 4) -> StableDiffusionPipeline:
    """The parts with random weights: VAE f=8 (64 px <-> 8 x 8 x 4), text width 16, 77 tokens, PNDM like SD1.5."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = byte_tokenizer()
        text, vae = tiny_text(tokenizer), tiny_vae()
        return StableDiffusionPipeline(
            vae=vae,
            text_encoder=CLIPTextModel(text).eval(),
            tokenizer=tokenizer,
            unet=tiny_unet(in_channels),
            scheduler=PNDMScheduler(**{**SD_SCHEDULE, "prediction_type": prediction_type, "skip_prk_steps": True}),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )


def tiny_sd2_pipeline(seed: int = 0, prediction_type: str = "v_prediction") -> StableDiffusionPipeline:
    """SD2's make: linear projections, heads by level, 23 text layers, "!" as padding."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = byte_tokenizer(pad="!")
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(16, 32),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=16,
            attention_head_dim=(2, 4),
            use_linear_projection=True,
            norm_num_groups=8,
        )
        return StableDiffusionPipeline(
            vae=tiny_vae(),
            text_encoder=CLIPTextModel(tiny_text(tokenizer, layers=23)).eval(),
            tokenizer=tokenizer,
            unet=unet.eval(),
            scheduler=ddim_scheduler(prediction_type=prediction_type),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )


def tiny_sdxl_unet(width: int = 40, pooled: int = 12) -> UNet2DConditionModel:
    """SDXL's make: no attention at the first level, two transformer layers at the second, pooled text and sizes."""
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2),
        cross_attention_dim=width,
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + pooled,
        norm_num_groups=8,
    ).eval()


def tiny_sdxl_pipeline(seed: int = 0, zeros: bool = True) -> StableDiffusionXLPipeline:
    """Text widths 16 and 24, pooled text 12 wide; ``zeros``: force_zeros_for_empty_prompt."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizers = byte_tokenizer(), byte_tokenizer(pad="!")
        return StableDiffusionXLPipeline(
            vae=tiny_vae(scaling_factor=0.13025, force_upcast=True),
            text_encoder=CLIPTextModel(tiny_text(tokenizers[0])).eval(),
            text_encoder_2=CLIPTextModelWithProjection(tiny_text(tokenizers[1], 24, 3, 12)).eval(),
            tokenizer=tokenizers[0],
            tokenizer_2=tokenizers[1],
            unet=tiny_sdxl_unet(),
            scheduler=EulerDiscreteScheduler(**{k: v for k, v in SD_SCHEDULE.items() if k != "set_alpha_to_one"}),
            force_zeros_for_empty_prompt=zeros,
            add_watermarker=False,
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
