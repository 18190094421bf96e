"""What the set metrics share: pictures in, features out, a result with what made it."""

from __future__ import annotations

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ...errors import UserError
from ..items import IMAGE_SUFFIXES, MANIFEST, Item, read_items
from ..preprocess import Pixels, decode
from . import AboutSet

Source = str | Path | Image.Image | Item
Pictures = str | Path | Sequence[str | Path | Image.Image]


@dataclass
class SetResult:
    """One number for a set. ``count`` pictures were used (``reference_count`` of the reference); ``by_group`` holds the
    value of each prompt where there is one; ``errors`` the pictures that could not be read, as (name, reason)."""

    name: str
    value: float
    count: int
    reference_count: int = 0
    by_group: dict[str, float] = field(default_factory=dict)
    parts: dict[str, float] = field(default_factory=dict)
    errors: list[tuple[str, str]] = field(default_factory=list)
    fingerprint: dict[str, str] = field(default_factory=dict)


@dataclass
class Gathered:
    """Features fp32 (N, D) of the pictures that could be read, their groups, and what could not."""

    features: torch.Tensor
    groups: list[Hashable]
    errors: list[tuple[str, str]]


class SetMetric(ABC):
    """Build one with ``load_set``; call it with pictures."""

    def __init__(self, about: AboutSet, source: str, device: str, dtype: str) -> None:
        self.about, self.name, self.path = about, about.name, source
        self.fingerprint: dict[str, str] = {}
        self.load(source, device, dtype)

    @abstractmethod
    def load(self, source: str, device: str, dtype: str) -> None:
        """Read the weights and fill ``fingerprint``."""

    @abstractmethod
    def measure(self, pictures: Gathered, reference: Gathered | None) -> SetResult:
        """The number of gathered features."""

    @property
    @abstractmethod
    def pixels(self) -> Pixels:
        """How a picture becomes an array."""

    @abstractmethod
    def features(self, crops: np.ndarray) -> torch.Tensor:
        """Arrays of ``pixels.crop`` (N, ...) -> features fp32 (N, D)."""

    @torch.no_grad()
    def __call__(
        self,
        pictures: Pictures,
        reference: Pictures | None = None,
        groups: Sequence[Hashable] | None = None,
        batch: int = 32,
    ) -> SetResult:
        """Measure a set.

        Args:
            pictures: a folder (with ``manifest.jsonl`` its pictures are grouped by prompt), a table as
                `diffalign score` takes it, or paths or PIL images.
            reference: pictures to compare with, for metrics that need them.
            groups: what each picture belongs to (its prompt's id), for a list of pictures.

        Raises UserError when nothing can be read, or reference or groups are missing."""
        if (reference is None) == (self.about.needs == "reference"):
            hint = "needs reference pictures" if reference is None else "takes no reference pictures"
            raise UserError(f"set metric '{self.name}' {hint}")
        have = self.gather(pictures, groups, batch)
        other = None if reference is None else self.gather(reference, None, batch)
        if self.about.needs == "groups" and len(have.groups) != len(have.features):
            raise UserError(f"set metric '{self.name}' needs to know the prompt of each picture; give groups")
        result = self.measure(have, other)
        result.errors = have.errors + (other.errors if other else [])
        result.fingerprint = self.fingerprint
        return result

    def gather(self, pictures: Pictures, groups: Sequence[Hashable] | None, batch: int) -> Gathered:
        """Read and embed, a batch at a time; pictures that cannot be read are left out and listed."""
        sources, found = _sources(pictures)
        groups = found if groups is None else list(groups)
        if groups and len(groups) != len(sources):
            raise UserError(f"{len(sources)} pictures but {len(groups)} groups; give one a picture")
        features: list[torch.Tensor] = []
        kept: list[Hashable] = []
        errors: list[tuple[str, str]] = []
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            for start in range(0, len(sources), batch):
                part = sources[start : start + batch]
                crops = list(pool.map(_reader(self.pixels), part))
                good = [i for i, crop in enumerate(crops) if isinstance(crop, np.ndarray)]
                errors += [(_name(part[i]), str(crop)) for i, crop in enumerate(crops) if isinstance(crop, str)]
                kept += [groups[start + i] for i in good] if groups else []
                features += self._by_shape([crops[i] for i in good])
        if not features:
            raise UserError(f"none of the {len(sources)} pictures could be read (first: {': '.join(errors[0])})")
        return Gathered(torch.stack(features), kept, errors)

    def _by_shape(self, crops: Sequence[np.ndarray | str]) -> list[torch.Tensor]:
        """One forward for each shape, features in the order of the pictures."""
        arrays = [c for c in crops if isinstance(c, np.ndarray)]
        out: dict[int, torch.Tensor] = {}
        for shape in dict.fromkeys(a.shape for a in arrays):
            places = [i for i, a in enumerate(arrays) if a.shape == shape]
            out.update(zip(places, self.features(np.stack([arrays[i] for i in places])).float().cpu(), strict=True))
        return [out[i] for i in range(len(arrays))]


def _name(source: Source) -> str:
    return source.image if isinstance(source, Item) else str(source)


def _reader(pixels: Pixels) -> Callable[[Source], np.ndarray | str]:
    def read(source: Source) -> np.ndarray | str:
        try:
            return pixels.crop(decode(source.read() if isinstance(source, Item) else source).image)
        except (OSError, ValueError, SyntaxError) as error:  # PIL raises SyntaxError for some broken PNGs
            return f"{type(error).__name__}: {error}"

    return read


def _sources(pictures: Pictures) -> tuple[list[Source], list[Hashable]]:
    if not isinstance(pictures, str | Path):
        if not pictures:
            raise UserError("no pictures given; give a folder or a list")
        return list(pictures), []
    folder = Path(pictures)
    if (folder / MANIFEST).is_file() or not folder.is_dir():
        items = read_items(folder).items
        return list(items), [i.id for i in items]
    files = sorted((p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES), key=_natural)
    if not files:
        raise UserError(f"folder '{pictures}' holds no images ({', '.join(IMAGE_SUFFIXES)})")
    return list(files), []


def _natural(path: Path) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", path.as_posix())]


def by_group(groups: Sequence[Hashable]) -> dict[str, list[int]]:
    """Group -> places of its pictures, those with two or more. Raises UserError when there are none."""
    found: dict[str, list[int]] = {}
    for place, group in enumerate(groups):
        found.setdefault(str(group), []).append(place)
    several = {group: places for group, places in found.items() if len(places) > 1}
    if not several:
        raise UserError("diversity needs at least two pictures of a prompt; sample with --per-prompt 4")
    return several
