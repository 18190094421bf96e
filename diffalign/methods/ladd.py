"""LADD's discriminator: heads on several blocks of the frozen teacher (arXiv 2403.12015), as SANA-Sprint has them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from pydantic import Field
from torch import Tensor, nn

from ..errors import UserError, nearest
from .adversarial import Head
from .base import MethodConfig

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel


class LaddConfig(MethodConfig):
    """Settings of the GAN, SANA-Sprint's; log(sigma / alpha) counts for latents of unit deviation."""

    gan_weight: float = Field(0.0, ge=0, description="weight of the student's GAN loss (SANA-Sprint: 0.5); 0: no GAN")
    gan_blocks: tuple[str, ...] = Field(
        (),
        description="blocks of the teacher that heads look at, such as mid_block; none named: all down blocks and it",
    )
    gan_width: int | None = Field(None, gt=0, description="channels of the heads; null: as many as their features")
    gan_time_mean: float = Field(0.093, description="mean of log(sigma / alpha) of the times that the heads see")
    gan_time_std: float = Field(1.0, gt=0, description="standard deviation of log(sigma / alpha) of these times")
    gan_last: float = Field(
        0.5, ge=0, le=1, description="share of samples whose x0 the heads see from the schedule's last time"
    )


def blocks_of(unet: UNet2DConditionModel, names: Sequence[str] = ()) -> dict[str, tuple[int, int]]:
    """Channels and side of what blocks of a U-Net give at its own size, by name; without names, of all down blocks and
    the middle one.

    Raises UserError for a name that is none of these."""
    widths, side = unet.config.block_out_channels, int(unet.config.sample_size)
    known: dict[str, tuple[int, int]] = {}
    for number, (block, width) in enumerate(zip(unet.down_blocks, widths, strict=True)):
        side = side // 2 if block.downsamplers is not None else side
        known[f"down_blocks.{number}"] = (int(width), side)
    known["mid_block"] = (int(widths[-1]), side)
    for name in names:
        if name not in known:
            raise UserError(f"method.gan_blocks: this U-Net has no '{name}'{nearest(name, known)}")
    return {name: known[name] for name in names or known}


class Heads(nn.Module):
    """Features of N blocks -> logits (B, N), by a head each; all 0 at the start."""

    def __init__(self, sizes: Iterable[tuple[int, int]], width: int | None = None) -> None:
        super().__init__()
        self.heads = nn.ModuleList(Head(channels, side, width) for channels, side in sizes)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        return torch.stack([head(seen) for head, seen in zip(self.heads, features, strict=True)], 1)
