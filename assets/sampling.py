"""Sampling from a pipeline folder of the tiny world: one seed a picture, so that no picture depends on its batch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

STEPS, GUIDANCE, BATCH = 20, 3.0, 64


def load_pipeline(folder: Path) -> DiffusionPipeline:
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample(
    pipe: DiffusionPipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    steps: int = STEPS,
    guidance: float = GUIDANCE,
    **options: object,
) -> torch.Tensor:
    """uint8 (N, 3, 32, 32) by the pipeline's own scheduler (DDIM); ``options`` of its call, such as SDXL's sizes."""
    out = []
    for i in range(0, len(prompts), BATCH):
        generators = [torch.Generator().manual_seed(s) for s in seeds[i : i + BATCH]]
        images = pipe(
            list(prompts[i : i + BATCH]),
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=generators,
            output_type="pt",
            **options,
        ).images
        out.append((images * 255).round().to(torch.uint8))
    return torch.cat(out)
