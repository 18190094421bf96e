"""PickScore v1: Kirstain et al. 2023, Pick-a-Pic (arXiv 2305.01569). tau x cosine, tau = exp(logit_scale) as the
checkpoint has it. Two images of one prompt: p(A over B) = sigmoid(s_A - s_B)."""

from __future__ import annotations

import math

from ._clip import ClipScorer

SCORERS: dict[str, dict[str, object]] = {
    "pickscore": {
        "about": "PickScore v1: tau x cosine of a CLIP ViT-H/14 tuned on Pick-a-Pic",
        "weights": "yuvalkirstain/PickScore_v1",
        "band": (12.0, 28.0),
    },
    "tiny-pickscore": {
        "about": "pickscore with the shipped model of the tiny world",
        "weights": "asset:tiny-pickscore",
    },
}


class PickScore(ClipScorer):
    """``PickScore.from_pretrained("yuvalkirstain/PickScore_v1")(images, prompts)``: tau x cosine, fp32 (N,)."""

    formula = "tau*cos"

    @property
    def scale(self) -> float:
        return math.exp(self.logit_scale)
