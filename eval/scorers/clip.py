"""CLIPScore as 100 x cosine (no prompt prefix, no clamp): Radford et al. 2021 (arXiv 2103.00020), Hessel et al. 2021
(arXiv 2104.08718) with the original's prefix and 2.5 x relu left out, as diffusion papers report it."""

from __future__ import annotations

from typing import ClassVar

from ._clip import ClipScorer

SCORERS: dict[str, dict[str, object]] = {
    "clip_l14": {
        "about": "100 x cosine of OpenAI CLIP ViT-L/14 (QuickGELU)",
        "weights": "openai/clip-vit-large-patch14",
        "band": (15.0, 40.0),
    },
    "clip_h14": {
        "about": "100 x cosine of LAION CLIP ViT-H/14 (exact GELU)",
        "weights": "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        "band": (15.0, 50.0),
    },
    "clip": {"about": "100 x cosine of any CLIPModel: clip=FOLDER_OR_HUB_ID"},
    "tiny-clip": {"about": "clip with the shipped model of the tiny world", "weights": "asset:tiny-clip"},
}


class Clip(ClipScorer):
    """``Clip.from_pretrained("openai/clip-vit-large-patch14")(images, prompts)``: 100 x cosine, fp32 (N,)."""

    formula = "100*cos"
    expects: ClassVar[dict[str, tuple[int, int, int, str]]] = {
        "clip_l14": (1024, 24, 14, "quick_gelu"),
        "clip_h14": (1280, 32, 14, "gelu"),
    }

    @property
    def scale(self) -> float:
        return 100.0
