"""The pixel pipeline of the CLIP family, bit for bit with PIL, numpy and torch alone (no torchvision).

"P1" of ``spec/evaluators.md`` 1.1: shortest side to S by PIL's antialiased bicubic on uint8, the long side truncated,
centre crop S x S, divided by 255, normalised. Hugging Face's crop floors the offset, torchvision's rounds it (banker's
rounding): they differ by one pixel when the margin is 3 modulo 4. "P2" (sheet 4) is the letterbox of HPSv2: the float
picture resized so that its long side is S, black borders, no crop.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
from PIL import Image, ImageOps

if TYPE_CHECKING:
    import torch

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
Rounding = Literal["hf", "torchvision"]
EXIF_ORIENTATION = 0x0112


class Pixels(Protocol):
    """A pixel pipeline: ``crop`` in the decoding threads, ``normalise`` on whole batches."""

    @property
    def size(self) -> int: ...

    @property
    def id(self) -> str: ...

    def crop(self, image: Image.Image) -> np.ndarray: ...

    def normalise(self, crops: np.ndarray) -> torch.Tensor: ...

    def tensor(self, images: torch.Tensor) -> torch.Tensor: ...


# a picture that is opened once and listed twice must not be read by two threads
LOADING = Lock()


@dataclass(frozen=True)
class Decoded:
    """An upright RGB picture, and what had to be done to get it (``alpha``: laid on white; ``rotated``: EXIF)."""

    image: Image.Image
    flags: tuple[str, ...] = ()


def decode(source: bytes | str | Path | Image.Image) -> Decoded:
    """A picture as upright RGB: EXIF rotation applied, transparency laid on white. Conversion comes before any resize.

    Raises OSError (PIL's UnidentifiedImageError included) when it cannot be read whole."""
    if isinstance(source, Image.Image):
        image = source
        with LOADING:
            image.load()
    else:
        image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
    flags: list[str] = []
    if image.mode == "RGB" and image.getexif().get(EXIF_ORIENTATION, 1) == 1:
        image.load()
        return Decoded(image)
    if image.getexif().get(EXIF_ORIENTATION, 1) != 1:
        image = ImageOps.exif_transpose(image)
        flags.append("rotated")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        if rgba.getchannel("A").getextrema() != (255, 255):
            flags.append("alpha")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, rgba)
    return Decoded(image.convert("RGB"), tuple(flags))


@dataclass(frozen=True)
class P1:
    """The crop pipeline. ``size`` in pixels; ``mean`` and ``std`` of RGB in [0, 1]."""

    size: int = 224
    rounding: Rounding = "hf"
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD

    @property
    def id(self) -> str:
        """What result rows say about the pixels."""
        return f"p1-{self.size}-{self.rounding}-bicubic-alpha_white{_stats(self.mean, self.std)}"

    def crop(self, image: Image.Image) -> np.ndarray:
        """An RGB picture -> uint8 (size, size, 3)."""
        width, height = image.size
        short, long = min(width, height), max(width, height)
        other = int(self.size * long / short)
        shape = (self.size, other) if width <= height else (other, self.size)
        if shape != image.size:
            image = image.resize(shape, Image.Resampling.BICUBIC)
        left, top = _offset(shape[0] - self.size, self.rounding), _offset(shape[1] - self.size, self.rounding)
        return np.asarray(image.crop((left, top, left + self.size, top + self.size)))

    def normalise(self, crops: np.ndarray) -> torch.Tensor:
        """uint8 (N, size, size, 3) -> normalised fp32 (N, 3, size, size)."""
        import torch

        pixels = torch.from_numpy(np.ascontiguousarray(crops)).permute(0, 3, 1, 2).float() / 255
        return _standardise(pixels, self.mean, self.std)

    def __call__(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """RGB pictures of any sizes -> normalised fp32 (N, 3, size, size)."""
        return self.normalise(np.stack([self.crop(image) for image in images]))

    def tensor(self, images: torch.Tensor) -> torch.Tensor:
        """The differentiable path: float (N, 3, H, W) in [0, 1] -> normalised fp32 (N, 3, size, size).

        An approximation of the pixels above: torch's antialiased bicubic on floats, clamped to [0, 1] but not rounded
        to 256 levels. Seen: 0.005 of a normalised unit on average (0.15 at single pixels of a harsh pattern), and 0.5 %
        of the spread of scores. Without a resize the two are equal. Gradients flow to ``images``."""
        import torch.nn.functional as F

        _check_images(images)
        height, width = images.shape[-2:]
        short, long = min(height, width), max(height, width)
        other = int(self.size * long / short)
        shape = (other, self.size) if width <= height else (self.size, other)
        pixels = images.float()
        if shape != (height, width):
            pixels = F.interpolate(pixels, size=shape, mode="bicubic", align_corners=False, antialias=True).clamp(0, 1)
        top, left = _offset(shape[0] - self.size, self.rounding), _offset(shape[1] - self.size, self.rounding)
        return _standardise(pixels[..., top : top + self.size, left : left + self.size], self.mean, self.std)


@dataclass(frozen=True)
class P2:
    """HPSv2's letterbox. ``antialias``: torchvision 0.17 made it the default of its resize; the tables in HPSv2's
    README are older. The two differ by 0.07 a pixel on average on a large picture, and the scores with them."""

    size: int = 224
    antialias: bool = True
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD

    @property
    def id(self) -> str:
        """What result rows say about the pixels."""
        smooth = "antialias" if self.antialias else "no_antialias"
        return f"p2-{self.size}-letterbox-bicubic-{smooth}-alpha_white{_stats(self.mean, self.std)}"

    def crop(self, image: Image.Image) -> np.ndarray:
        """An RGB picture -> float32 (3, size, size), about [0, 1] (bicubic overshoots), borders 0."""
        import torch

        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div(255)
        return self._letterbox(pixels[None])[0].numpy()

    def normalise(self, crops: np.ndarray) -> torch.Tensor:
        """float32 (N, 3, size, size) of :meth:`crop` -> normalised."""
        import torch

        return _standardise(torch.from_numpy(np.ascontiguousarray(crops)), self.mean, self.std)

    def __call__(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """RGB pictures of any sizes -> normalised fp32 (N, 3, size, size)."""
        return self.normalise(np.stack([self.crop(image) for image in images]))

    def tensor(self, images: torch.Tensor) -> torch.Tensor:
        """The differentiable path: float (N, 3, H, W) in [0, 1] -> normalised fp32 (N, 3, size, size). The same
        arithmetic as the exact path, so equal to it where the floats are multiples of 1/255."""
        _check_images(images)
        return _standardise(self._letterbox(images.float()), self.mean, self.std)

    def _letterbox(self, pixels: torch.Tensor) -> torch.Tensor:
        import torch.nn.functional as F

        height, width = pixels.shape[-2:]
        scale = self.size / max(height, width)
        shape = (max(1, round(height * scale)), max(1, round(width * scale)))
        if shape != (height, width):
            pixels = F.interpolate(pixels, size=shape, mode="bicubic", align_corners=False, antialias=self.antialias)
        down, across = self.size - shape[0], self.size - shape[1]
        return F.pad(pixels, (across // 2, across - across // 2, down // 2, down - down // 2))


def _check_images(images: torch.Tensor) -> None:
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise ValueError(f"want float images (N, 3, H, W) in [0, 1], got {images.dtype} {tuple(images.shape)}")


def _standardise(
    pixels: torch.Tensor, mean: tuple[float, float, float], std: tuple[float, float, float]
) -> torch.Tensor:
    return (pixels - pixels.new_tensor(mean).view(1, 3, 1, 1)) / pixels.new_tensor(std).view(1, 3, 1, 1)


def _stats(mean: tuple[float, float, float], std: tuple[float, float, float]) -> str:
    return "" if (mean, std) == (CLIP_MEAN, CLIP_STD) else f"-mean{mean}-std{std}"


def _offset(margin: int, rounding: Rounding) -> int:
    return margin // 2 if rounding == "hf" else round(margin / 2)
