"""LAION's aesthetic predictors: a linear head on the unit image embedding of OpenAI CLIP ViT-L/14; the prompt is not
read. ``aes_v2`` is "improved aesthetic predictor" (sac+logos+ava1, linearMSE): five linear layers with only dropout
between them, so one affine map. ``aes_v1`` is LAION's first, a single layer. Their scales differ."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import numpy as np
import torch
from PIL import Image

from ...errors import UserError
from ..preprocess import P1
from . import list_scorers
from ._base import (
    CODE_VERSION,
    Scored,
    Scorer,
    check_known,
    read_state,
    resolve_weights,
    texts_for,
    weights_sha256,
)
from ._clip import ClipScorer
from ._load import collapse
from .clip import Clip

SCORERS: dict[str, dict[str, object]] = {
    "aes_v2": {
        "about": "LAION aesthetic v2 (sac+logos+ava1): linear head on CLIP ViT-L/14; own files: aes_v2=HEAD@CLIP",
        "weights": "camenduru/improved-aesthetic-predictor:sac+logos+ava1-l14-linearMSE.pth",
        "band": (3.0, 8.0),
    },
    "aes_v1": {"about": "LAION aesthetic v1: one linear layer on CLIP ViT-L/14; aes_v1=HEAD or HEAD@CLIP"},
}
CLIP_L14 = "openai/clip-vit-large-patch14"
V2_LAYERS = ("0", "2", "4", "6", "7")


class Aesthetic(Scorer):
    """``Aesthetic.from_pretrained("sac+logos+ava1-l14-linearMSE.pth@CLIP_FOLDER")(images, "")``: about 1 to 10."""

    towers: ClipScorer
    pixels: P1
    weight: torch.Tensor
    bias: float

    @classmethod
    def from_pretrained(
        cls, path: str | Path | None = None, device: str = "auto", dtype: str = "auto", name: str | None = None
    ) -> Self:
        """``path`` is HEAD or HEAD@CLIP: the head's file, and a CLIP folder or hub id (OpenAI's ViT-L/14 by default).

        Raises UserError for a head that is no such stack, or that does not fit the CLIP."""
        about = list_scorers()[name or "aes_v2"]
        given = path or about.weights
        if given is None:
            raise UserError(f"scorer '{about.name}' needs the file of its head; say {about.name}=HEAD.pth")
        head, _, clip = str(given).partition("@")
        file = resolve_weights(head, about.name, ("*.pth", "*.pt", "*.safetensors"))
        if file.is_dir():
            file = min(f for f in file.iterdir() if f.suffix in (".pth", ".pt", ".safetensors"))
        scorer = cls()
        scorer.name, scorer.path, scorer.weights_note = about.name, str(given), check_known([file], about.name)
        weight, bias = _affine(read_state(file, about.name), file, about.name)
        scorer.towers = _towers(clip, head, device, dtype, about.name)
        width = int(scorer.towers.model.config.projection_dim)
        if len(weight) != width:
            raise UserError(
                f"'{file}' for scorer '{about.name}' reads {len(weight)} numbers, this CLIP gives {width}; "
                "it belongs to OpenAI's ViT-L/14"
            )
        scorer.weight, scorer.bias = weight.float().to(scorer.towers.device), float(bias)
        stated = scorer.towers.pixels
        assert isinstance(stated, P1)
        scorer.pixels = P1(stated.size, "torchvision", stated.mean, stated.std)
        scorer.preprocess_id = scorer.pixels.id
        scorer.fingerprint = {
            "scorer": "aesthetic",
            "formula": "affine of the unit image embedding",
            "scale": "1",
            "weights": weights_sha256([file]),
            "towers": scorer.towers.fingerprint["weights"],
            "preprocess": scorer.preprocess_id,
            "dtype": scorer.towers.fingerprint["dtype"],
            "code": CODE_VERSION,
        }
        return scorer

    def prepare(self, image: Image.Image) -> np.ndarray:
        return self.pixels.crop(image)

    @torch.no_grad()
    def score_prepared(self, prepared: Sequence[np.ndarray], prompts: Sequence[str]) -> Scored:
        pixels = self.pixels.normalise(np.stack(list(prepared))).to(self.towers.device)
        return Scored(self.value(self.towers.embed_pixels(pixels)).cpu())

    def value(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Unit image embeddings, fp32 (N, D) -> scores (N,)."""
        return embeddings @ self.weight + self.bias

    def reward(self, images: torch.Tensor, prompts: str | Sequence[str] = "") -> torch.Tensor:
        texts_for(len(images), prompts)
        pixels = self.pixels.tensor(images.to(self.towers.device))
        return self.value(self.towers.embed_pixels(pixels)).to(images.device)


def _towers(clip: str, head: str, device: str, dtype: str, name: str) -> ClipScorer:
    if clip:
        return Clip.from_pretrained(clip, device, dtype, "clip")
    try:
        return Clip.from_pretrained(CLIP_L14, device, dtype, "clip_l14")
    except UserError as error:
        raise UserError(
            f"scorer '{name}' reads the embeddings of {CLIP_L14}, which is not to be had; say {name}={head}@CLIP_FOLDER"
        ) from error


def _affine(state: dict[str, torch.Tensor], file: Path, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    numbers = sorted({m[1] for k in state if (m := re.fullmatch(r"layers\.(\d+)\.(?:weight|bias)", k))}, key=int)
    try:
        if name == "aes_v1" and set(state) == {"weight", "bias"}:
            return state["weight"].double().reshape(-1), state["bias"].double().reshape(())
        if name == "aes_v2" and tuple(numbers) == V2_LAYERS:
            return collapse(state, [f"layers.{n}" for n in numbers])
    except (RuntimeError, KeyError) as error:
        raise UserError(f"the layers of '{file}' for scorer '{name}' do not chain; download it again") from error
    found = f"layers {', '.join(numbers)}" if numbers else ", ".join(sorted(state)[:3])
    raise UserError(
        f"'{file}' is not what '{name}' stands for ({found}); aes_v2 is the linearMSE file, aes_v1 one layer"
    )
