"""The two-tower scorers: scale x cosine of a transformers ``CLIPModel``'s image and text embeddings."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Self

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import CLIPModel, CLIPTokenizer
from transformers.utils import logging as transformers_logging

from ...errors import UserError
from ..preprocess import CLIP_MEAN, CLIP_STD, P1
from . import list_scorers
from ._base import CODE_VERSION, Scored, Scorer, resolve_device, resolve_dtype, resolve_weights, weights_sha256

TEXT_BATCH = 64
MAX_CACHED = 100_000  # text embeddings kept: 400 MB at 1024 floats


class ClipScorer(Scorer):
    """Base of CLIPScore and PickScore. Subclasses give the scale and what they expect of a named checkpoint."""

    formula: ClassVar[str]
    # name -> (vision width, vision layers, patch, activation) of checkpoints whose name promises an architecture
    expects: ClassVar[dict[str, tuple[int, int, int, str]]] = {}

    def __init__(
        self, model: CLIPModel, tokenizer: CLIPTokenizer, pixels: P1, device: torch.device, dtype: torch.dtype
    ) -> None:
        # Read before the cast: exp of an fp16 logit scale is off by up to 0.4 %.
        self.logit_scale = float(model.logit_scale.detach().float())
        self.model = model.eval().requires_grad_(False).to(device=device, dtype=dtype)
        self.tokenizer, self.pixels, self.device, self.dtype = tokenizer, pixels, device, dtype
        self.max_tokens = int(model.config.text_config.max_position_embeddings)
        self.preprocess_id = pixels.id
        self.texts_encoded = 0
        self._texts: dict[str, torch.Tensor] = {}
        self._block: dict[str, tuple[str, ...]] = {}

    @classmethod
    def from_pretrained(
        cls, path: str | Path | None = None, device: str = "auto", dtype: str = "auto", name: str | None = None
    ) -> Self:
        """Load a CLIPModel folder or hub id: config, weights, tokenizer, and the preprocessor where there is one.

        Raises UserError when it is missing, is no CLIP, lacks weights, or is not what its name promises."""
        about = list_scorers()[name] if name else next(a for a in list_scorers().values() if a.module == cls._module())
        source = path or about.weights
        if source is None:
            raise UserError(f"scorer '{about.name}' needs a path; say {about.name}=FOLDER_OR_HUB_ID")
        folder = resolve_weights(source, about.name)
        where = resolve_device(device)
        dtype_name, torch_dtype = resolve_dtype(dtype, where)
        _check_config(folder, about.name, cls.expects.get(about.name))
        model, report = _load(folder)
        lost = [k for k in report["missing_keys"] if not k.endswith("position_ids")]
        if lost or report["mismatched_keys"]:
            raise UserError(
                f"weights in '{source}' do not fit its config.json (missing {lost[0] if lost else 'shapes'})"
            )
        scorer = cls(model, CLIPTokenizer.from_pretrained(folder), _pixels(folder, model), where, torch_dtype)
        scorer.name, scorer.path = about.name, str(source)
        scorer.fingerprint = {
            "scorer": cls._module(),
            "formula": cls.formula,
            "scale": f"{scorer.scale:.6g}",
            "weights": weights_sha256(folder),
            "preprocess": scorer.preprocess_id,
            "max_tokens": str(scorer.max_tokens),
            "dtype": dtype_name,
            "code": CODE_VERSION,
        }
        return scorer

    @classmethod
    def _module(cls) -> str:
        return cls.__module__.rsplit(".", 1)[-1]

    @property
    def scale(self) -> float:
        """What the cosine is multiplied with."""
        raise TypeError(f"{type(self).__name__} has no scale")

    def prepare(self, image: Image.Image) -> np.ndarray:
        return self.pixels.crop(image)

    @torch.no_grad()
    def score_prepared(self, prepared: Sequence[np.ndarray], prompts: Sequence[str]) -> Scored:
        images = self.embed_pixels(self.pixels.normalise(np.stack(list(prepared))).to(self.device))
        cosine = (images * self.embed_texts(prompts)).sum(1)
        return Scored((self.scale * cosine).cpu())

    def reward(self, images: torch.Tensor, prompts: str | Sequence[str]) -> torch.Tensor:
        texts = [prompts] * len(images) if isinstance(prompts, str) else list(prompts)
        if len(texts) != len(images):
            raise UserError(f"{len(images)} images but {len(texts)} prompts; give one prompt an image, or one for all")
        embedded = self.embed_pixels(self.pixels.tensor(images.to(self.device)))
        return (self.scale * (embedded * self.embed_texts(texts)).sum(1)).to(images.device)

    def embed_pixels(self, pixels: torch.Tensor) -> torch.Tensor:
        """Normalised pixels (N, 3, S, S) -> unit image embeddings, fp32 (N, D). Differentiable."""
        return unit(projected(self.model.get_image_features(pixel_values=pixels.to(self.dtype))))

    @torch.no_grad()
    def embed_texts(self, prompts: Sequence[str]) -> torch.Tensor:
        """Unit text embeddings, fp32 (N, D); each distinct prompt is encoded once."""
        needed = list(dict.fromkeys(p for p in prompts if p not in self._texts))
        if needed and len(self._texts) + len(needed) > MAX_CACHED:
            self._texts.clear()
            needed = list(dict.fromkeys(prompts))
        blocks = list(dict.fromkeys(self._block[p] for p in needed if p in self._block))
        free = sorted(p for p in needed if p not in self._block)
        blocks += [tuple(free[i : i + TEXT_BATCH]) for i in range(0, len(free), TEXT_BATCH)]
        for block in blocks:
            self.texts_encoded += len(block)
            self._texts.update(zip(block, self._encode(block), strict=True))
        return torch.stack([self._texts[p] for p in prompts])

    def plan_texts(self, prompts: Sequence[str]) -> None:
        unique = sorted(set(prompts))
        lengths = self._lengths(unique)
        order = sorted(range(len(unique)), key=lambda i: lengths[i])
        for start in range(0, len(order), TEXT_BATCH):
            block = tuple(unique[i] for i in order[start : start + TEXT_BATCH])
            self._block.update(dict.fromkeys(block, block))

    def truncated(self, prompts: Sequence[str]) -> list[bool]:
        return [n > self.max_tokens for n in self._lengths(prompts)]

    def _lengths(self, prompts: Sequence[str]) -> list[int]:
        if not prompts:
            return []
        return [len(ids) for ids in self.tokenizer(list(prompts), truncation=False, verbose=False).input_ids]

    def _encode(self, prompts: Sequence[str]) -> torch.Tensor:
        # Padding to the longest is free: the tower is causal and pooled at the first end token.
        tokens = self.tokenizer(
            list(prompts), padding=True, truncation=True, max_length=self.max_tokens, return_tensors="pt"
        ).to(self.device)
        out = self.model.get_text_features(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
        return unit(projected(out))


def projected(out: object) -> torch.Tensor:
    """The projected feature: transformers 4 returns the tensor, transformers 5 an object that holds it."""
    return out if isinstance(out, torch.Tensor) else out.pooler_output  # type: ignore[attr-defined]


def unit(features: torch.Tensor) -> torch.Tensor:
    """fp32, length 1 along the last axis."""
    return F.normalize(features.float(), dim=-1)


def _load(folder: Path) -> tuple[CLIPModel, dict[str, list[str]]]:
    """The model in fp32 and what did not fit, without transformers' own progress bar."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        return CLIPModel.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def _check_config(folder: Path, name: str, expected: tuple[int, int, int, str] | None) -> None:
    config = json.loads((folder / "config.json").read_text())
    if config.get("model_type") != "clip":
        kind = config.get("model_type") or "/".join(config.get("architectures") or ["something else"])
        raise UserError(f"'{folder}' for scorer '{name}' holds a {kind}, not a CLIPModel; give a CLIP folder")
    if expected is None:
        return
    vision = config.get("vision_config") or {}
    # CLIPConfig's own defaults (ViT-B/32, quick_gelu) stand for keys that a config leaves out.
    have = (
        vision.get("hidden_size", 768),
        vision.get("num_hidden_layers", 12),
        vision.get("patch_size", 32),
        vision.get("hidden_act", "quick_gelu"),
    )
    if have != expected:
        raise UserError(
            f"'{folder}' is not what '{name}' stands for: width, layers, patch, activation are {have}, "
            f"want {expected}; say clip={folder} for another CLIP"
        )


def _pixels(folder: Path, model: CLIPModel) -> P1:
    file = folder / "preprocessor_config.json"
    stated = json.loads(file.read_text()) if file.is_file() else {}
    (r, g, b), (sr, sg, sb) = stated.get("image_mean", CLIP_MEAN), stated.get("image_std", CLIP_STD)
    return P1(size=int(model.config.vision_config.image_size), mean=(r, g, b), std=(sr, sg, sb))
