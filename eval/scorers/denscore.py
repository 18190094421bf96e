"""Scores of long prompts, by segments: LongAlign's Denscore (Liu et al. 2024, arXiv 2410.11817).

The text's embedding is the mean of its sentences' unit embeddings. Reweighted, the part of it that all prompts share
(it knows the style, not the content) counts ``weight`` times: e' = e - (1 - weight) (e . V) V, V the unit mean of e.
Neither is normalised again. Ours: V is of all prompts of a run (theirs: of a training batch), so that a score does not
depend on its neighbours; sentences end at . ! ? ; and the pixels are the checkpoint's (theirs: a random crop)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from ...sentences import sentences
from ._clip import ClipScorer, Towers

WEIGHT = 0.3
SCORERS: dict[str, dict[str, object]] = {
    "denscore": {
        "about": "100 x cosine by sentences of LongAlign's CLIP ViT-H/14, for long prompts",
        "weights": "luping-liu/Denscore",
    },
    "denscore_reweighted": {
        "about": "denscore with the part that all prompts share weighted by 0.3",
        "weights": "luping-liu/Denscore",
    },
    "segments": {"about": "100 x cosine by sentences of any CLIP or PickScore: segments=FOLDER_OR_HUB_ID"},
    "segments_reweighted": {"about": "segments with the part that all prompts share weighted by 0.3"},
}


def reweight(text: torch.Tensor, weight: float = WEIGHT, common: torch.Tensor | None = None) -> torch.Tensor:
    """Text embeddings (B, D) with their part along ``common`` (D,) scaled by ``weight``; not normalised again.

    ``common`` is of unit length; None: that of the mean of ``text``. 1 changes nothing, 0 leaves what is orthogonal."""
    if common is None:
        common = F.normalize(text.mean(0), dim=-1)
    return text - (1 - weight) * (text @ common)[:, None] * common


class Denscore(ClipScorer):
    """``Denscore.from_pretrained("luping-liu/Denscore")(images, prompts)``: 100 x e . f, fp32 (N,)."""

    def __init__(self, towers: Towers, device: torch.device, dtype: torch.dtype, name: str) -> None:
        super().__init__(towers, device, dtype, name)
        self.weight = WEIGHT if name.endswith("_reweighted") else 1.0
        self._planned: list[str] = []
        self._common: torch.Tensor | None = None

    @property
    def formula(self) -> str:  # type: ignore[override]
        return "100*mean(e).f" + ("" if self.weight == 1 else f", common part * {self.weight:g}")

    @property
    def scale(self) -> float:
        return 100.0

    def plan_texts(self, prompts: Sequence[str]) -> None:
        super().plan_texts(prompts)
        if self.weight != 1:
            self._planned, self._common = sorted(set(prompts)), None
            # another list of prompts has another common part, and so other scores
            digest = hashlib.sha256("\n".join(self._planned).encode()).hexdigest()[:16]
            self.fingerprint = {**self.fingerprint, "prompts": digest}

    def embed_texts(self, prompts: Sequence[str]) -> torch.Tensor:
        """Text embeddings, fp32 (N, D): means over sentences, reweighted. Without a planned list of prompts the common
        part is that of ``prompts``."""
        own = super().embed_texts(prompts)
        if self.weight == 1:
            return own
        if self._planned and self._common is None:
            self._common = F.normalize(super().embed_texts(self._planned).mean(0), dim=-1)
        return reweight(own, self.weight, self._common)

    def _encode(self, prompts: Sequence[str]) -> torch.Tensor:
        parts = [sentences(prompt) or [""] for prompt in prompts]
        states = super()._encode([part for own in parts for part in own])
        return torch.stack([part.mean(0) for part in states.split([len(own) for own in parts])])

    def _lengths(self, prompts: Sequence[str]) -> list[int]:
        parts = [sentences(prompt) or [""] for prompt in prompts]
        flat = iter(super()._lengths([part for own in parts for part in own]))
        return [max(next(flat) for _ in own) for own in parts]
