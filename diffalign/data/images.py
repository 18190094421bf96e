"""From the bytes of a picture to what the VAE takes."""

from __future__ import annotations

import io
import struct
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ..keyed import Part, generator

Image.init()  # registers the formats
Alpha = Literal["white", "black", "drop"]
Crop = Literal["center", "random"]
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # the JPEG reader takes phones' MPO files too
# A strip that is longer than this would need gigabytes once its short side is enlarged.
MAX_RATIO = 16


class ImageError(Exception):
    """A picture that cannot be used. ``reason`` is the heading it is counted under."""

    def __init__(self, message: str, reason: str = "unreadable image") -> None:
        super().__init__(message)
        self.reason = reason


def read_file(path: Path) -> bytes:
    """The bytes of a picture's file. Raises ImageError."""
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise ImageError("file does not exist", "missing image") from error
    except OSError as error:
        raise ImageError(f"cannot be read: {error.strerror or error}", "missing image") from error


def load_image(source: Path | bytes, alpha: Alpha = "white") -> Image.Image:
    """A picture as 8-bit RGB, upright.

    The EXIF rotation is applied. Transparent pixels are blended onto ``white`` or ``black``; ``drop`` takes their
    stored colour as it is. Palette, grey, CMYK and 16-bit pictures become 8-bit RGB here, before any resizing. Of an
    animation the first frame is taken. Colour profiles are not applied.

    Raises:
        ImageError: missing, truncated, not a picture, or a strip longer than 16:1.
    """
    data = read_file(source) if isinstance(source, Path) else source
    if not data:
        raise ImageError("file is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # broken EXIF only costs the rotation
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                image.load()
                upright = ImageOps.exif_transpose(image)
                rgb = _to_rgb(upright, alpha)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError("has more pixels than Pillow's safety limit") from error
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, IndexError, KeyError, TypeError) as error:
        text = "not a picture that Pillow can read" if isinstance(error, Image.UnidentifiedImageError) else str(error)
        raise ImageError(" ".join(text.split())) from error
    if max(rgb.size) > MAX_RATIO * min(rgb.size):
        raise ImageError(f"is a strip of {rgb.width}x{rgb.height}, longer than {MAX_RATIO}:1")
    return rgb


def _to_rgb(image: Image.Image, alpha: Alpha) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey: Pillow's own conversion clips at 255 instead of scaling
        values = np.asarray(image).astype(np.float64)
        image = Image.fromarray(np.clip(np.rint(values / 257.0), 0, 255).astype(np.uint8))
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        image = image.convert("RGBA")
        if alpha != "drop":
            back = Image.new("RGBA", image.size, (255, 255, 255, 255) if alpha == "white" else (0, 0, 0, 255))
            back.alpha_composite(image)
            image = back
    return image.convert("RGB")


def difference_hash(image: Image.Image) -> int:
    """64 bits: for 8 x 8 cells of the picture, whether a cell is darker than the one to its right.

    Small changes (JPEG, size, brightness) turn few bits; unlike pictures differ in about 32."""
    small = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BOX), dtype=np.int16)
    return int.from_bytes(np.packbits(small[:, :-1] < small[:, 1:]).tobytes(), "big")


@dataclass(frozen=True)
class Prepared:
    """``pixels`` (3, H, W) fp32 in [-1, 1]; ``original`` (height, width) of the upright picture; ``corner`` (top, left)
    of the crop in the resized picture, SDXL's size conditioning; ``right``: what was cut off at the right."""

    pixels: Tensor
    original: tuple[int, int]
    corner: tuple[int, int]
    right: int

    def mirrored(self) -> Prepared:
        """The same crop of the picture's mirror image: what was cut off at the right lies to the left of it."""
        return Prepared(self.pixels.flip(-1), self.original, (self.corner[0], self.right), self.corner[1])


def prepare(image: Image.Image, resolution: int | tuple[int, int], crop: Crop = "center", key: Part = None) -> Prepared:
    """Resize until (height, width) ``resolution`` is just covered (Lanczos, antialiased), then crop to it; one number
    is a square.

    The random crop is a function of ``key`` alone (the sample's id), as a share of the free range: both members of a
    pair are cut at the same relative place, on every machine, whatever their sizes.
    """
    target = (resolution, resolution) if isinstance(resolution, int) else resolution
    width, height = image.size
    scale = max(target[0] / height, target[1] / width)
    size = (max(target[1], round(width * scale)), max(target[0], round(height * scale)))
    if image.size != size:
        image = image.resize(size, Image.Resampling.LANCZOS)
    free = (size[1] - target[0], size[0] - target[1])
    if crop == "random":
        share = generator("crop", key).random(2)
        corner = (int(share[0] * (free[0] + 1)), int(share[1] * (free[1] + 1)))
    else:
        corner = (free[0] // 2, free[1] // 2)
    top, left = corner
    cut = image.crop((left, top, left + target[1], top + target[0]))
    pixels = torch.from_numpy(np.array(cut, dtype=np.uint8)).permute(2, 0, 1).to(torch.float32)
    return Prepared(pixels.div_(127.5).sub_(1.0).contiguous(), (height, width), corner, free[1] - left)
