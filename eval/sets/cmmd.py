"""CMMD: Jayasumana et al. 2023, Rethinking FID (arXiv 2401.09603). Squared MMD of unit CLIP ViT-L/14@336 image
embeddings under a Gaussian kernel of width 10, biased estimator, times 1000."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from ..preprocess import P1, Pixels
from ..scorers.clip import Clip
from ._base import Gathered, SetMetric, SetResult

SETS: dict[str, dict[str, object]] = {
    "cmmd": {
        "about": "CMMD to reference pictures (CLIP ViT-L/14@336, Gaussian kernel, x 1000); another CLIP: cmmd=FOLDER",
        "needs": "reference",
        "better": "low",
        "weights": "openai/clip-vit-large-patch14-336",
    },
}
SIGMA, SCALE, CHUNK = 10.0, 1000.0, 1024


def mean_kernel(x: torch.Tensor, y: torch.Tensor) -> float:
    """Mean of exp(-|a - b|^2 / (2 sigma^2)) over all pairs, in fp64 and blocks of ``CHUNK`` rows."""
    x, y = x.double(), y.double()
    total = 0.0
    for block in x.split(CHUNK):
        square = block.square().sum(1)[:, None] + y.square().sum(1)[None] - 2 * block @ y.T
        total += float(torch.exp(-square.clamp(min=0) / (2 * SIGMA**2)).sum())
    return total / (len(x) * len(y))


def cmmd(x: torch.Tensor, y: torch.Tensor) -> float:
    """CMMD of unit embeddings (N, D) and (M, D): 0 for the same set, at most 2000 (1 - exp(-0.02)) = 39.6."""
    return SCALE * (mean_kernel(x, x) + mean_kernel(y, y) - 2 * mean_kernel(x, y))


@dataclass(frozen=True)
class Square(P1):
    """Centre square (floor) first, then the resize: what the authors do."""

    @property
    def id(self) -> str:
        return f"square-then-{super().id}"

    def crop(self, image: Image.Image) -> np.ndarray:
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        return super().crop(image.crop((left, top, left + side, top + side)))


class Cmmd(SetMetric):
    """``load_set("cmmd")(folder, reference=folder)``. Compare values of equal numbers of pictures only."""

    def load(self, source: str, device: str, dtype: str) -> None:
        self.clip = Clip.from_pretrained(source, device, dtype, "clip")
        stated = self.clip.pixels
        assert isinstance(stated, P1)
        self.square = Square(stated.size, "hf", stated.mean, stated.std)
        self.fingerprint = {
            **self.clip.fingerprint,
            "scorer": "cmmd",
            "formula": "1000*mmd2(biased, gauss 10)",
            "scale": "1000",
            "preprocess": self.square.id,
        }

    @property
    def pixels(self) -> Pixels:
        return self.square

    def features(self, crops: np.ndarray) -> torch.Tensor:
        return self.clip.embed_pixels(self.square.normalise(crops).to(self.clip.device))

    def measure(self, pictures: Gathered, reference: Gathered | None) -> SetResult:
        assert reference is not None
        value = cmmd(pictures.features, reference.features)
        return SetResult(self.name, value, len(pictures.features), len(reference.features))
