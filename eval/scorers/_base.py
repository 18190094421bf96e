"""What every scorer shares: where its weights come from, what names them, and how pictures and prompts go in."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Self

import numpy as np
import torch
from PIL import Image

from ...errors import UserError
from ..preprocess import decode

CODE_VERSION = "1"  # raise it when a change of this package changes a score
ASSET = "asset:"
HUB_FILES = ["*.json", "*.safetensors", "*.bin", "*.txt"]
WEIGHT_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")
# sha256 of published files as far as it is known, or the first digits of it that their names or spec sheets give.
KNOWN_SHA256 = {
    "sac+logos+ava1-l14-linearMSE.pth": "21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0",
    "weights-inception-2015-12-05-6726825d.pth": "6726825d",
    "alexnet-owt-7be5be79.pth": "7be5be79",
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

Picture = Image.Image | np.ndarray | torch.Tensor
Pictures = Picture | Sequence[Picture]


@dataclass
class Scored:
    """Scores of N (image, prompt) pairs: fp32 (N,) on the CPU, and named parts of the same shape."""

    values: torch.Tensor
    parts: dict[str, torch.Tensor] = field(default_factory=dict)


class Scorer(ABC):
    """Scores (image, prompt) pairs. Build one with ``from_pretrained``; call it with pictures and prompts."""

    name: str
    path: str
    preprocess_id: str
    fingerprint: dict[str, str]
    texts_encoded: int = 0  # prompts that went through the text tower so far
    weights_note: str = "unknown hash: not checked"  # whether the weights' sha256 was compared with a published one
    note: str = ""  # a convention that a report has to state, such as the letterbox filter of HPS

    @classmethod
    @abstractmethod
    def from_pretrained(
        cls, path: str | Path | None = None, device: str = "auto", dtype: str = "auto", name: str | None = None
    ) -> Self:
        """Load the weights: a folder, a hub id, or None for those that the name stands for."""

    @abstractmethod
    def prepare(self, image: Image.Image) -> np.ndarray:
        """An RGB picture as the array that :meth:`score_prepared` takes. Thread-safe."""

    @abstractmethod
    def score_prepared(self, prepared: Sequence[np.ndarray], prompts: Sequence[str]) -> Scored:
        """Scores of prepared pictures; no gradients. One batch: the caller decides its size."""

    def reward(self, images: torch.Tensor, prompts: str | Sequence[str]) -> torch.Tensor:
        """Differentiable scores: float (N, 3, H, W) in [0, 1] -> fp32 (N,) on the images' device.

        Pixels are resized in torch (antialiased bicubic), an approximation of the exact path of ``__call__``."""
        raise UserError(
            f"scorer '{self.name}' gives no gradients; use a CLIP, PickScore, HPS, ImageReward or aesthetic scorer"
        )

    def truncated(self, prompts: Sequence[str]) -> list[bool]:
        """Which prompts lose tokens. False for scorers that read no text."""
        return [False] * len(prompts)

    def picture_flags(self, width: int, height: int) -> tuple[str, ...]:
        """What this scorer's pixels do to a picture of that size and a reader of its row should know."""
        return ()

    def check_prompts(self, prompts: Sequence[str]) -> None:  # noqa: B027 - a hook
        """Raise UserError for prompts that this scorer cannot judge."""

    def plan_texts(self, prompts: Sequence[str]) -> None:  # noqa: B027 - a hook
        """Tell the scorer which prompts a run will ask for, so that batches of text are the same after a resume."""

    @torch.no_grad()
    def __call__(self, images: Pictures, prompts: str | Sequence[str], batch: int = 32) -> torch.Tensor:
        """Scores fp32 (N,) on the CPU.

        Args:
            images: one or many PIL images, uint8 arrays (H, W, 3), or tensors (3, H, W) or (N, 3, H, W), float in
                [0, 1] or uint8. Floats are rounded to 256 levels, so that a tensor scores like the file saved from it.
            prompts: one text for all, or one an image.
        """
        pictures = to_pictures(images)
        texts = texts_for(len(pictures), prompts)
        self.check_prompts(texts)
        values = [
            self.score_prepared([self.prepare(p) for p in pictures[i : i + batch]], texts[i : i + batch]).values
            for i in range(0, len(pictures), batch)
        ]
        return torch.cat(values) if values else torch.zeros(0)

    @property
    def fingerprint_id(self) -> str:
        """16 hex digits over :attr:`fingerprint`; rows carry it."""
        return fingerprint_id(self.fingerprint)


def fingerprint_id(fingerprint: dict[str, str]) -> str:
    """A short hash of a fingerprint."""
    return hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()[:16]


def texts_for(count: int, prompts: str | Sequence[str]) -> list[str]:
    """One text an image. Raises UserError when the numbers differ."""
    texts = [prompts] * count if isinstance(prompts, str) else list(prompts)
    if len(texts) != count:
        raise UserError(f"{count} images but {len(texts)} prompts; give one prompt an image, or one for all")
    return texts


def to_pictures(images: Pictures) -> list[Image.Image]:
    """Anything ``Scorer.__call__`` takes as a list of RGB pictures. Raises UserError for other shapes and types."""
    if isinstance(images, Image.Image):
        return [decode(images).image]
    if isinstance(images, torch.Tensor | np.ndarray):
        if images.ndim == 3:
            return [_to_picture(images)]
        if images.ndim == 4:
            return [_to_picture(image) for image in images]
        raise UserError(
            f"images of shape {tuple(images.shape)}; give (H, W, 3) arrays or (3, H, W) tensors, one or many"
        )
    return [decode(i).image if isinstance(i, Image.Image) else _to_picture(i) for i in images]


def _to_picture(image: np.ndarray | torch.Tensor) -> Image.Image:
    if isinstance(image, torch.Tensor):
        pixels = image.detach().cpu()
        if pixels.is_floating_point():
            pixels = (pixels.float().clamp(0, 1) * 255).round().to(torch.uint8)
        image = pixels.permute(1, 2, 0).numpy() if pixels.ndim == 3 and pixels.shape[0] == 3 else pixels.numpy()
    elif np.issubdtype(image.dtype, np.floating):
        image = (image.clip(0, 1) * 255).round().astype(np.uint8)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
        raise UserError(
            f"an image of type {image.dtype} and shape {image.shape}; give uint8 (H, W, 3) or float in [0, 1]"
        )
    return Image.fromarray(np.ascontiguousarray(image))


def resolve_device(device: str) -> torch.device:
    """auto -> cuda, mps or cpu. Raises UserError for a device that is not there."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    kind = device.partition(":")[0]
    if kind not in {"cpu", "cuda", "mps"}:
        raise UserError(f"unknown device '{device}'; choose auto, cuda, mps or cpu")
    if (kind == "cuda" and not torch.cuda.is_available()) or (kind == "mps" and not torch.backends.mps.is_available()):
        raise UserError(f"device '{device}' is asked for, but this torch sees none; use --device cpu or auto")
    return torch.device(device)


def resolve_dtype(dtype: str, device: torch.device) -> tuple[str, torch.dtype]:
    """auto -> fp16 on CUDA (closer to fp32 than bf16 for CLIP), fp32 elsewhere."""
    if dtype == "auto":
        dtype = "fp16" if device.type == "cuda" else "fp32"
    if dtype not in DTYPES:
        raise UserError(f"unknown dtype '{dtype}'; choose auto, {', '.join(DTYPES)}")
    return dtype, DTYPES[dtype]


def resolve_weights(path: str | Path, name: str, holds: Sequence[str] = ("config.json",)) -> Path:
    """Where weights are: ``asset:NAME``, a file, a folder that holds one of ``holds`` (globs), a hub id, or
    ``HUB/ID:FILE`` for one file of a hub repository.

    Raises UserError when it is not there and cannot be fetched."""
    text = str(path)
    if text.startswith(ASSET):
        folder = Path(str(resources.files("diffalign.assets") / text.removeprefix(ASSET)))
        if not _holds(folder, holds):
            raise UserError(f"weights of scorer '{name}' are not at {folder}; build them with `make assets`")
        return folder
    place = Path(text).expanduser()
    if place.is_dir():
        if not _holds(place, holds):
            raise UserError(f"folder '{path}' for scorer '{name}' holds no {' or '.join(holds)}; give a model folder")
        return place
    if place.is_file():
        if place.suffix not in WEIGHT_SUFFIXES:
            raise UserError(f"'{path}' for scorer '{name}' is no weights file ({', '.join(WEIGHT_SUFFIXES)})")
        return place
    repo, _, file = text.partition(":")
    if repo.count("/") != 1 or repo.startswith((".", "/", "~")) or Path(repo).suffix in WEIGHT_SUFFIXES:
        raise UserError(f"weights '{path}' for scorer '{name}' do not exist; give a file, a model folder or a hub id")
    return from_hub(repo, file, name)


def from_hub(repo: str, file: str, name: str) -> Path:
    """A file of a hub repository, or (``file`` empty) the folder of its model files. Raises UserError offline."""
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(repo, file) if file else snapshot_download(repo, allow_patterns=HUB_FILES))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        what = f"'{file}' of '{repo}'" if file else f"'{repo}'"
        raise UserError(
            f"weights {what} for scorer '{name}' are neither here nor to be had from the hub "
            f"({type(error).__name__}); download them and say {name}={'FILE' if file else 'FOLDER'}"
        ) from error


def _holds(folder: Path, patterns: Sequence[str]) -> bool:
    return any(next(folder.glob(pattern), None) is not None for pattern in patterns)


def model_files(folder: Path) -> list[Path]:
    """The files of a model folder that decide a score: configs, tokenizer, and the weights that load."""
    weights = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    names = ["config.json", "open_clip_config.json", "preprocessor_config.json", "tokenizer.json", "vocab.json"]
    return [folder / n for n in [*names, "merges.txt"] if (folder / n).is_file()] + weights


def weights_sha256(files: Sequence[Path]) -> str:
    """sha256 over names and bytes of the files that decide a score."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name}\n".encode())
        _feed(digest, file)
    return digest.hexdigest()


def check_known(files: Sequence[Path], name: str) -> str:
    """What is known of these weights, for :attr:`Scorer.weights_note`.

    Raises UserError for a file of a published name whose bytes are others."""
    for file in files:
        if (expected := KNOWN_SHA256.get(file.name)) is not None:
            digest = hashlib.sha256()
            _feed(digest, file)
            if not digest.hexdigest().startswith(expected):
                raise UserError(
                    f"'{file}' for scorer '{name}' is not the published {file.name} (sha256 {digest.hexdigest()[:8]}, "
                    f"want {expected[:8]}); download it again"
                )
            return f"sha256 of {file.name} checked"
    return "unknown hash: not checked"


def _feed(digest: hashlib._Hash, file: Path) -> None:
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)


def read_state(file: Path, name: str) -> dict[str, torch.Tensor]:
    """The tensors of a ``.safetensors``, ``.pt``, ``.pth`` or ``.bin`` file on the CPU; never runs pickled code.

    A dict under ``state_dict`` is taken out, ``module.`` of wrapped models is cut off. Raises UserError for a file that
    cannot be read so."""
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(file)
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch and safetensors raise their own kinds, pickle's and zip's
        raise UserError(
            f"'{file}' for scorer '{name}' holds no plain tensors ({type(error).__name__}); it may be torn, or need "
            "code to load: give a state dict or a .safetensors file"
        ) from error
    state = state.get("state_dict", state) if isinstance(state, dict) else {}
    tensors = {k.removeprefix("module."): v for k, v in state.items() if isinstance(v, torch.Tensor)}
    if not tensors:
        raise UserError(f"'{file}' for scorer '{name}' holds no state dict; give a checkpoint of weights")
    return tensors
