"""Distilled guidance as a diffusers pipeline for SD1.x, SD2.x and SDXL: one forward a step, and the guidance is told to
adapters (AGD, arXiv 2503.07274) that a run of method ``agd`` left.

Also usable as ``custom_pipeline``:

    pipe = DiffusionPipeline.from_pretrained("stable-diffusion-v1-5/stable-diffusion-v1-5", trust_remote_code=True,
                                             custom_pipeline="diffalign/pipelines/distilled_guidance.py")
    pipe.load_adapters("runs/agd")
    found = pipe("a cat", guidance_scale=7.5)
    found.images[0], found.guidance

Drawing is diffusers' own. A LoRA, an IP-adapter or another checkpoint of the same base goes along: no weight of the
base is changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import BaseOutput

from diffalign.errors import UserError
from diffalign.families.guidance import GuidanceAdapters
from diffalign.pipelines import stock
from diffalign.pipelines.extras import apply_extra, told_guidance


@dataclass
class DistilledOutput(BaseOutput):
    """What a call gives.

    Args:
        images: as the family's own pipeline returns them.
        guidance: what the adapters were told.
    """

    images: Any
    guidance: float


class DistilledGuidancePipeline(stock.StockPipeline):
    """Samples by adapters that stand for guidance; see the module's text."""

    adapters: GuidanceAdapters | None = None

    def load_adapters(self, path: str | Path, scale: float = 1.0) -> DistilledGuidancePipeline:
        """Adapters of an ``agd`` run (its folder, ``model/`` or file) at ``scale``, in the place of earlier ones.

        Raises UserError when there are none there, or they were made for another base."""
        found = apply_extra(self, path, scale=scale)
        if not isinstance(found, GuidanceAdapters):
            found.detach()
            raise UserError(f"'{path}' holds no guidance adapters; give the folder of a run of method agd")
        if self.adapters is not None:
            self.adapters.detach()
        self.adapters = found
        return self

    @torch.no_grad()
    def __call__(
        self, prompt: str | Sequence[str] | None = None, *, guidance_scale: float | None = None, **options: Any
    ) -> DistilledOutput:
        """Draws.

        Args:
            guidance_scale: told to the adapters; as last given, 7.5 at first. Outside of what they were trained for it
                warns; 1 is what the base without guidance says, as far as they learned that.
            options: any other argument of the family's pipeline.

        Raises UserError without adapters and for a negative prompt, which takes the branch that they stand for.
        """
        if self.adapters is None:
            raise UserError("this pipeline has no guidance adapters yet; load a run's by load_adapters(...)")
        negative = [name for name in options if name.startswith("negative_prompt") and options[name] is not None]
        w = self.adapters.chosen if guidance_scale is None else guidance_scale
        options.pop("return_dict", None)
        plain = told_guidance(self.adapters, w, " ".join(negative))
        drawn = self.stock(prompt, guidance_scale=plain, **options)
        self.maybe_free_model_hooks()
        return DistilledOutput(drawn.images, w)
