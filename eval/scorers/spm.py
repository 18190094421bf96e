"""SPO's step-aware preference model (Liang et al. 2024, arXiv 2406.04314): tau x cosine, of pictures that stand for
what a denoiser believes at a time. A finished picture is at time 0."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from ...errors import UserError
from ..spm import load_step_aware
from ._base import texts_for
from ._clip import ClipScorer, Shape, Towers, unit

SCORERS: dict[str, dict[str, object]] = {
    "spm": {
        "about": "a step-aware preference model: spm=FOLDER of a run of method spm, or of the PickScore it starts as",
    },
}


class StepAwareScorer(ClipScorer):
    """``StepAwareScorer.from_pretrained("runs/spm-sd15")(images, prompts)``; ``reward(images, prompts, t)`` at times.

    A plain CLIP folder is taken too: the model as it is before training, the same at every time."""

    formula = "tau*cos at a time"

    @classmethod
    def load(cls, source: str | Path, name: str, expected: Shape | None) -> Towers:
        """The step-aware model in the place of a CLIP."""
        model, towers = load_step_aware(source, name)
        return replace(towers, model=model)

    @property
    def scale(self) -> float:
        return math.exp(self.logit_scale)

    def reward(self, images: torch.Tensor, prompts: str | Sequence[str], t: torch.Tensor | None = None) -> torch.Tensor:
        """Differentiable scores fp32 (N,) of float (N, 3, H, W) in [0, 1] at times (N,); None: finished pictures."""
        texts = texts_for(len(images), prompts)
        if t is not None and len(t) != len(images):
            raise UserError(f"{len(images)} images but {len(t)} times; give one time an image")
        pixels = self.pixels.tensor(images.to(self.device)).to(self.dtype)
        embedded = unit(self.model.get_image_features(pixels, None if t is None else t.to(self.device)))
        return self.value((embedded * self.embed_texts(texts)).sum(1)).to(images.device)
