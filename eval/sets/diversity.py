"""How different the pictures of one prompt are, by CLIP image embeddings: 1 - mean pairwise cosine, and the Vendi score
(Friedman & Dieng 2022, arXiv 2210.02410). Both are averaged over prompts; a tuned model usually loses some."""

from __future__ import annotations

import numpy as np
import torch

from ..preprocess import Pixels
from ..scorers.clip import Clip
from ._base import Gathered, SetMetric, SetResult, by_group

SETS: dict[str, dict[str, object]] = {
    "diversity_clip": {
        "about": "1 - mean cosine of the pictures of a prompt, CLIP ViT-L/14; another CLIP: diversity_clip=FOLDER",
        "needs": "groups",
        "better": "high",
        "weights": "openai/clip-vit-large-patch14",
    },
    "vendi": {
        "about": "Vendi score of the pictures of a prompt (1 = all alike, K = all different), CLIP ViT-L/14",
        "needs": "groups",
        "better": "high",
        "weights": "openai/clip-vit-large-patch14",
    },
}


def pairwise_diversity(embeddings: torch.Tensor) -> float:
    """1 - mean cosine of the K (K - 1) / 2 pairs of unit vectors (K, D), K >= 2, by the norm of their sum."""
    unit = embeddings.double()
    count = len(unit)
    return float(1 - (unit.sum(0).square().sum() - count) / (count * (count - 1)))


def vendi_score(embeddings: torch.Tensor) -> float:
    """exp of the entropy of the eigenvalues of E E^T / K, for unit vectors (K, D): 1 for copies, K for orthogonal."""
    unit = embeddings.double()
    eigenvalues = torch.linalg.eigvalsh(unit @ unit.T / len(unit)).clamp(min=0)
    return float(torch.special.entr(eigenvalues).sum().exp())


class Diversity(SetMetric):
    """``load_set("diversity_clip")(folder)``: mean over prompts; ``by_group`` has each prompt's."""

    def load(self, source: str, device: str, dtype: str) -> None:
        known = "clip_l14" if source == self.about.weights else "clip"
        self.clip = Clip.from_pretrained(source, device, dtype, known)
        self.fingerprint = {**self.clip.fingerprint, "scorer": self.name, "formula": self.name, "scale": "1"}

    @property
    def pixels(self) -> Pixels:
        return self.clip.pixels

    def features(self, crops: np.ndarray) -> torch.Tensor:
        return self.clip.embed_pixels(self.clip.pixels.normalise(crops).to(self.clip.device))

    def measure(self, pictures: Gathered, reference: Gathered | None) -> SetResult:
        score = vendi_score if self.name == "vendi" else pairwise_diversity
        values = {group: score(pictures.features[places]) for group, places in by_group(pictures.groups).items()}
        return SetResult(self.name, sum(values.values()) / len(values), len(pictures.features), by_group=values)
