"""CLIPScore. As diffusion papers report it: 100 x cosine, no prompt prefix, no clamp (Radford et al. 2021, arXiv
2103.00020). ``clipscore_hessel`` is the original of Hessel et al. 2021 (arXiv 2104.08718): ViT-B/32, the prompt after
"A photo depicts ", 2.5 x max(cosine, 0), pixels as torchvision crops them."""

from __future__ import annotations

from typing import ClassVar

import torch

from ..preprocess import Pixels
from ._clip import ClipScorer, Shape, Towers

HESSEL = "clipscore_hessel"
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
    "clipscore_hessel": {
        "about": "the original CLIPScore: 2.5 x max(cosine, 0), ViT-B/32, 'A photo depicts ' before the prompt",
        "weights": "openai/clip-vit-base-patch32",
    },
    "clip": {"about": "100 x cosine of any CLIP: clip=FOLDER_OR_HUB_ID (transformers' or OpenCLIP's layout)"},
    "tiny-clip": {"about": "clip with the shipped model of the tiny world", "weights": "asset:tiny-clip"},
}


class Clip(ClipScorer):
    """``Clip.from_pretrained("openai/clip-vit-large-patch14")(images, prompts)``: 100 x cosine, fp32 (N,)."""

    expects: ClassVar[dict[str, Shape]] = {
        "clip_l14": (1024, 24, 14, "quick_gelu"),
        "clip_h14": (1280, 32, 14, "gelu"),
        "clipscore_hessel": (768, 12, 32, "quick_gelu"),
    }

    def __init__(self, towers: Towers, device: torch.device, dtype: torch.dtype, name: str) -> None:
        self.original = name == HESSEL
        super().__init__(towers, device, dtype, name)
        if self.original:
            self.prefix, self.clean = "A photo depicts ", "openclip"

    @property
    def formula(self) -> str:  # type: ignore[override]
        return "2.5*max(cos,0)" if self.original else "100*cos"

    @property
    def scale(self) -> float:
        return 2.5 if self.original else 100.0

    def value(self, cosine: torch.Tensor) -> torch.Tensor:
        return self.scale * (cosine.clamp(min=0) if self.original else cosine)

    def choose_pixels(self, towers: Towers) -> Pixels:
        return towers.pixels("torchvision" if self.original else None)
