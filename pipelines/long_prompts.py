"""Long prompts for plain diffusers pipelines: conditioning by segments, as keyword arguments of the call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from ..families.segments import encode_segments, towers_of

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from torch import Tensor

LENGTH = 240  # LongAlign's


def segment_embeds(
    pipeline: DiffusionPipeline,
    prompts: str | Sequence[str],
    negative: str | None = None,
    length: int = LENGTH,
    guided: bool = True,
) -> dict[str, Tensor]:
    """``pipeline(**segment_embeds(pipeline, prompts), ...)`` for SD1.x, SD2.x and SDXL pipelines.

    Args:
        negative: one negative prompt for all; None: the empty one, zeros where an SDXL pipeline zeroes it.
        length: places of text that the U-Net sees, what training had as ``model.long_prompts``.
        guided: whether the unconditional branch is wanted.

    Returns ``prompt_embeds`` (B, length, D), and ``negative_prompt_embeds`` and the pooled ones where there are such.
    """
    towers = towers_of(pipeline)
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    cond = encode_segments(towers, texts, length)
    found = {"prompt_embeds": cond.embeds}
    pooled = cond.added.get("text_embeds")
    if pooled is not None:
        found["pooled_prompt_embeds"] = pooled
    if not guided:
        return found
    other = encode_segments(towers, [negative or ""], length)
    zeros = negative is None and pooled is not None and pipeline.config.force_zeros_for_empty_prompt
    plain, plain_pooled = other.embeds, other.added.get("text_embeds")
    for name, tensor in (("negative_prompt_embeds", plain), ("negative_pooled_prompt_embeds", plain_pooled)):
        if tensor is not None:
            full = tensor.expand(len(texts), *tensor.shape[1:])
            found[name] = torch.zeros_like(full) if zeros else full
    return found
