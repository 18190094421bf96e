"""HPS v2 and v2.1: Wu et al. 2023, Human Preference Score v2 (arXiv 2306.09341). 100 x cosine of a tuned OpenCLIP
ViT-H/14, pixels letterboxed. The published files are OpenCLIP state dicts; the tokenizer is OpenCLIP's.

Two filters exist: torchvision resizes with antialias since 0.17 (``hpsv2``, ``hpsv21``, as papers since 2024), and did
not before (``..._noaa``, as the tables in the authors' README). They are not comparable."""

from __future__ import annotations

from typing import ClassVar

from ..preprocess import P2, Pixels
from ._clip import ClipScorer, Shape, Towers

SCORERS: dict[str, dict[str, object]] = {
    "hpsv2": {
        "about": "HPS v2.0: 100 x cosine of a tuned ViT-H/14, letterbox with antialias",
        "weights": "xswu/HPSv2:HPS_v2_compressed.pt",
        "band": (18.0, 32.0),
    },
    "hpsv21": {
        "about": "HPS v2.1: 100 x cosine of a tuned ViT-H/14, letterbox with antialias",
        "weights": "xswu/HPSv2:HPS_v2.1_compressed.pt",
        "band": (8.0, 38.0),
    },
    "hpsv2_noaa": {
        "about": "hpsv2 without antialias, as the tables in its README",
        "weights": "xswu/HPSv2:HPS_v2_compressed.pt",
        "band": (18.0, 32.0),
    },
    "hpsv21_noaa": {
        "about": "hpsv21 without antialias, as the tables in its README",
        "weights": "xswu/HPSv2:HPS_v2.1_compressed.pt",
        "band": (8.0, 38.0),
    },
    "hps": {"about": "100 x cosine of any OpenCLIP ViT, letterboxed: hps=FILE_OR_FOLDER"},
    "tiny-hps": {"about": "hps with the shipped model of the tiny world", "weights": "asset:tiny-hps"},
}
VIT_H14: Shape = (1280, 32, 14, "gelu")


class HPS(ClipScorer):
    """``HPS.from_pretrained("HPS_v2.1_compressed.pt", name="hpsv21")(images, prompts)``: 100 x cosine, fp32 (N,)."""

    formula = "100*cos"
    activation = "gelu"
    cleaning = "openclip"
    expects: ClassVar[dict[str, Shape]] = dict.fromkeys(("hpsv2", "hpsv21", "hpsv2_noaa", "hpsv21_noaa"), VIT_H14)

    @property
    def scale(self) -> float:
        return 100.0

    def choose_pixels(self, towers: Towers) -> Pixels:
        (r, g, b), (sr, sg, sb) = towers.mean_std()
        antialias = not self.name.endswith("_noaa")
        self.note = f"letterbox {'with' if antialias else 'without'} antialias"
        return P2(towers.image_size, antialias, (r, g, b), (sr, sg, sb))

    def picture_flags(self, width: int, height: int) -> tuple[str, ...]:
        return ("letterboxed",) if width != height else ()
