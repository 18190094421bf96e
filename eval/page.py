"""What every page of the suite shares: the frame and its style, and pictures that travel inside the page."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from jinja2 import Environment

THUMBNAIL = 384  # longest side of a picture in the page; smaller ones stay as they are
SHEET = 1600
PIXELATED = 128  # pictures up to this side are shown with hard pixels


@dataclass(frozen=True)
class Sheet:
    """A picture with a caption, such as a grid of samples at a step."""

    caption: str
    path: Path


@cache
def environment() -> Environment:
    """Templates of this folder; everything is escaped unless a template says that it is markup."""
    from jinja2 import Environment, FunctionLoader

    folder = resources.files(__package__ or "diffalign.eval")
    loader = FunctionLoader(lambda name: (folder / name).read_text(encoding="utf-8"))
    return Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, loader=loader)


def evenly(items: Sequence[object], count: int) -> list[int]:
    """Places of ``count`` items, evenly through a list, first and last among them: nobody picked them."""
    return [int(i) for i in np.linspace(0, len(items) - 1, min(count, len(items))).round()]


def is_small(path: Path) -> bool:
    """Whether a picture is one of the tiny world's, to be shown with hard pixels."""
    try:
        with Image.open(path) as image:
            return max(image.size) <= PIXELATED
    except OSError:
        return False


def picture_uri(path: Path, longest: int = THUMBNAIL) -> str | None:
    """A picture as a data URI: small ones as PNG, large ones shrunk to JPEG. None when unreadable."""
    try:
        with Image.open(path) as opened:
            return image_uri(opened.convert("RGB"), longest)
    except OSError:
        return None


def image_uri(image: Image.Image, longest: int = THUMBNAIL) -> str:
    """An RGB image as a data URI, as `picture_uri` has it."""
    stream = io.BytesIO()
    if max(image.size) <= PIXELATED:
        image.save(stream, "PNG", optimize=True)
        kind = "png"
    else:
        image.thumbnail((longest, longest), Image.Resampling.LANCZOS)
        image.save(stream, "JPEG", quality=88)
        kind = "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode()}"
