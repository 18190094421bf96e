"""The two-tower scorers: scale x cosine of a transformers ``CLIPModel``'s image and text embeddings."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import CLIPModel, CLIPTokenizer

from ...errors import UserError
from ..preprocess import CLIP_MEAN, CLIP_STD, P1, Pixels
from . import About, list_scorers
from ._base import (
    ASSET,
    CODE_VERSION,
    Scored,
    Scorer,
    check_known,
    model_files,
    read_state,
    resolve_device,
    resolve_dtype,
    resolve_weights,
    texts_for,
    weights_sha256,
)
from ._load import load_model
from ._openclip import config_of, from_openclip
from ._text import load_tokenizer, openclip_clean

TEXT_BATCH = 64
MAX_CACHED = 100_000  # text embeddings kept: 400 MB at 1024 floats
STEP_AWARE = "step_aware.safetensors"  # see `eval.spm`
OPENCLIP_CONFIG = "open_clip_config.json"
OPENCLIP_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin", "*.safetensors", "*.pt", "*.bin")
HOLDS = ("config.json", OPENCLIP_CONFIG)
Shape = tuple[int, int, int, str]  # vision width, vision layers, patch, activation


@dataclass(frozen=True)
class Towers:
    """A loaded CLIP in fp32. ``openclip``: it came in OpenCLIP's layout. ``stated``: its image mean and std."""

    model: CLIPModel
    tokenizer: CLIPTokenizer
    files: list[Path]
    openclip: bool
    stated: dict[str, Any]

    def pixels(self, rounding: str | None = None) -> P1:
        """The crop pipeline of this model; OpenCLIP crops as torchvision does, transformers by its own rule."""
        (r, g, b), (sr, sg, sb) = self.mean_std()
        how = "torchvision" if rounding == "torchvision" or (rounding is None and self.openclip) else "hf"
        return P1(size=self.image_size, rounding=how, mean=(r, g, b), std=(sr, sg, sb))  # type: ignore[arg-type]

    def mean_std(self) -> tuple[Sequence[float], Sequence[float]]:
        """Of RGB in [0, 1]."""
        if self.openclip:
            return self.stated.get("mean") or CLIP_MEAN, self.stated.get("std") or CLIP_STD
        return self.stated.get("image_mean", CLIP_MEAN), self.stated.get("image_std", CLIP_STD)

    @property
    def image_size(self) -> int:
        return int(self.model.config.vision_config.image_size)


def load_towers(source: str | Path, name: str, expected: Shape | None = None, activation: str | None = None) -> Towers:
    """A CLIP from a transformers folder, an OpenCLIP folder, or one OpenCLIP checkpoint file.

    Args:
        expected: what a name promises; other sizes are refused.
        activation: of a bare checkpoint file, which does not say it. None: such a file is refused.

    Raises UserError when it is missing, is no CLIP, lacks weights, or is not what its name promises."""
    place = resolve_weights(source, name, HOLDS if activation is None else (*HOLDS, *OPENCLIP_WEIGHTS[2:]))
    if place.is_dir() and (place / "config.json").is_file():
        return _load_transformers(place, source, name, expected)
    return _load_openclip(place, source, name, expected, activation)


def _load_transformers(folder: Path, source: str | Path, name: str, expected: Shape | None) -> Towers:
    config = json.loads((folder / "config.json").read_text())
    if config.get("model_type") != "clip":
        kind = config.get("model_type") or "/".join(config.get("architectures") or ["something else"])
        raise UserError(f"'{folder}' for scorer '{name}' holds a {kind}, not a CLIPModel; give a CLIP folder")
    vision = config.get("vision_config") or {}
    # CLIPConfig's own defaults (ViT-B/32, quick_gelu) stand for keys that a config leaves out.
    have = (
        vision.get("hidden_size", 768),
        vision.get("num_hidden_layers", 12),
        vision.get("patch_size", 32),
        vision.get("hidden_act", "quick_gelu"),
    )
    _check_shape(have, expected, source, name)
    model = load_model(CLIPModel, folder, source, name)
    file = folder / "preprocessor_config.json"
    stated = json.loads(file.read_text()) if file.is_file() else {}
    return Towers(model, CLIPTokenizer.from_pretrained(folder), model_files(folder), False, stated)


def _load_openclip(
    place: Path, source: str | Path, name: str, expected: Shape | None, activation: str | None
) -> Towers:
    folder = place if place.is_dir() else None
    stated: dict[str, Any] = {}
    file = place
    if folder is not None:
        if (folder / OPENCLIP_CONFIG).is_file():
            stated = json.loads((folder / OPENCLIP_CONFIG).read_text())
        found = next((f for pattern in OPENCLIP_WEIGHTS for f in sorted(folder.glob(pattern))), None)
        if found is None:
            raise UserError(f"folder '{source}' for scorer '{name}' holds no weights ({', '.join(OPENCLIP_WEIGHTS)})")
        file = found
    if not stated and activation is None:
        raise UserError(
            f"'{source}' does not say its activation; give a folder with {OPENCLIP_CONFIG}, or openclip={source}@ARCH"
        )
    state = read_state(file, name)
    try:
        config = config_of(state, activation or "gelu", stated.get("model_cfg"))
        renamed = from_openclip(state)
    except (KeyError, ValueError, IndexError) as error:
        raise UserError(
            f"'{file}' for scorer '{name}' is no OpenCLIP ViT with a CLIP text tower ({error.args[0]}); give such a "
            "checkpoint, or take openclip=FILE@ARCH"
        ) from error
    vision = config.vision_config
    have = (vision.hidden_size, vision.num_hidden_layers, vision.patch_size, vision.hidden_act)
    _check_shape(have, expected, source, name)
    tensors = {k: v.float() for k, v in renamed.items()}
    model = load_model(CLIPModel, None, source, name, config=config, state_dict=tensors)
    tokenizer = load_tokenizer(folder, config.text_config.max_position_embeddings)
    if len(tokenizer) != config.text_config.vocab_size:
        raise UserError(
            f"'{source}' for scorer '{name}' has {config.text_config.vocab_size} tokens, its tokenizer "
            f"{len(tokenizer)}; put the tokenizer.json that belongs to it into its folder"
        )
    files = [file] if folder is None else [f for f in model_files(folder) if f.suffix == ".json"] + [file]
    return Towers(model, tokenizer, files, True, stated.get("preprocess_cfg") or {})


def _check_shape(have: Shape, expected: Shape | None, source: str | Path, name: str) -> None:
    if expected is not None and have != expected:
        raise UserError(
            f"'{source}' is not what '{name}' stands for: width, layers, patch, activation are {have}, "
            f"want {expected}; say clip={source} for another CLIP"
        )


class ClipScorer(Scorer):
    """Base of CLIPScore, PickScore and HPS. Subclasses give the scale, the pixels, the text's cleaning, and what they
    expect of a named checkpoint."""

    formula: ClassVar[str]
    expects: ClassVar[dict[str, Shape]] = {}  # of checkpoints whose name promises an architecture
    activation: ClassVar[str | None] = None  # of a bare checkpoint file under a name without a promise
    cleaning: ClassVar[str | None] = None  # hf | openclip; None: as the checkpoint's layout has it
    prefix = ""

    def __init__(self, towers: Towers, device: torch.device, dtype: torch.dtype, name: str) -> None:
        # Read before the cast: exp of an fp16 logit scale is off by up to 0.4 %.
        self.logit_scale = float(towers.model.logit_scale.detach().float())
        self.model = towers.model.eval().requires_grad_(False).to(device=device, dtype=dtype)
        self.name, self.tokenizer, self.device, self.dtype = name, towers.tokenizer, device, dtype
        self.pixels = self.choose_pixels(towers)
        self.clean = self.cleaning or ("openclip" if towers.openclip else "hf")
        self.max_tokens = int(self.model.config.text_config.max_position_embeddings)
        self.preprocess_id = self.pixels.id
        self.texts_encoded = 0
        self._texts: dict[str, torch.Tensor] = {}
        self._block: dict[str, tuple[str, ...]] = {}

    @classmethod
    def from_pretrained(
        cls, path: str | Path | None = None, device: str = "auto", dtype: str = "auto", name: str | None = None
    ) -> Self:
        """Load a CLIP: a transformers folder or hub id, an OpenCLIP folder, or an OpenCLIP checkpoint file.

        Raises UserError when it is missing, is no CLIP, lacks weights, or is not what its name promises."""
        about = cls.about(name)
        source = path or about.weights
        if source is None:
            raise UserError(f"scorer '{about.name}' needs a path; say {about.name}=FOLDER_OR_HUB_ID")
        where = resolve_device(device)
        dtype_name, torch_dtype = resolve_dtype(dtype, where)
        expected = cls.expects.get(about.name)
        towers = cls.load(source, about.name, expected)
        scorer = cls(towers, where, torch_dtype, about.name)
        scorer.path = str(source)
        own = scorer.path.startswith(ASSET)
        scorer.weights_note = "the project's own" if own else check_known(towers.files, about.name)
        scorer.fingerprint = {
            "scorer": cls._module(),
            "formula": scorer.formula,
            "scale": f"{scorer.scale:.6g}",
            "weights": weights_sha256(towers.files),
            "preprocess": scorer.preprocess_id,
            "text": f"{scorer.clean}{' after ' + repr(scorer.prefix) if scorer.prefix else ''}",
            "max_tokens": str(scorer.max_tokens),
            "dtype": dtype_name,
            "code": CODE_VERSION,
        }
        return scorer

    @classmethod
    def load(cls, source: str | Path, name: str, expected: Shape | None) -> Towers:
        """The towers behind a path."""
        towers = load_towers(source, name, expected, expected[3] if expected else cls.activation)
        if any(file.name == STEP_AWARE for file in towers.files):
            raise UserError(
                f"'{source}' is a step-aware preference model, whose CLIP alone says little; give spm={source}"
            )
        return towers

    @classmethod
    def about(cls, name: str | None) -> About:
        """The listing's line of a name, or the first of this scorer's file."""
        listed = list_scorers()
        return listed[name] if name else next(a for a in listed.values() if a.module == cls._module())

    @classmethod
    def _module(cls) -> str:
        return cls.__module__.rsplit(".", 1)[-1]

    def choose_pixels(self, towers: Towers) -> Pixels:
        """The pixel pipeline."""
        return towers.pixels()

    @property
    def scale(self) -> float:
        """What the cosine is multiplied with."""
        raise TypeError(f"{type(self).__name__} has no scale")

    def prepare(self, image: Image.Image) -> np.ndarray:
        return self.pixels.crop(image)

    @torch.no_grad()
    def score_prepared(self, prepared: Sequence[np.ndarray], prompts: Sequence[str]) -> Scored:
        images = self.embed_pixels(self.pixels.normalise(np.stack(list(prepared))).to(self.device))
        return Scored(self.value((images * self.embed_texts(prompts)).sum(1)).cpu())

    def value(self, cosine: torch.Tensor) -> torch.Tensor:
        """The score of a cosine, fp32."""
        return self.scale * cosine

    def reward(self, images: torch.Tensor, prompts: str | Sequence[str]) -> torch.Tensor:
        texts = texts_for(len(images), prompts)
        embedded = self.embed_pixels(self.pixels.tensor(images.to(self.device)))
        return self.value((embedded * self.embed_texts(texts)).sum(1)).to(images.device)

    @torch.no_grad()
    def embed_images(self, prepared: Sequence[np.ndarray]) -> torch.Tensor:
        """Prepared pictures -> unit image embeddings, fp32 (N, D) on the CPU: for diversity and other set metrics."""
        return self.embed_pixels(self.pixels.normalise(np.stack(list(prepared))).to(self.device)).cpu()

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
        return [len(ids) for ids in self.tokenizer(self._read(prompts), truncation=False, verbose=False).input_ids]

    def _read(self, prompts: Sequence[str]) -> list[str]:
        """Prompts as the tokenizer gets them."""
        clean: Callable[[str], str] = openclip_clean if self.clean == "openclip" else str
        return [clean(self.prefix + prompt) for prompt in prompts]

    def _encode(self, prompts: Sequence[str]) -> torch.Tensor:
        # Padding to the longest is free: the tower is causal and pooled at the first end token.
        tokens = self.tokenizer(
            self._read(prompts), padding=True, truncation=True, max_length=self.max_tokens, return_tensors="pt"
        ).to(self.device)
        out = self.model.get_text_features(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
        return unit(projected(out))


def projected(out: object) -> torch.Tensor:
    """The projected feature: transformers 4 returns the tensor, transformers 5 an object that holds it."""
    return out if isinstance(out, torch.Tensor) else out.pooler_output  # type: ignore[attr-defined]


def unit(features: torch.Tensor) -> torch.Tensor:
    """fp32, length 1 along the last axis."""
    return F.normalize(features.float(), dim=-1)
