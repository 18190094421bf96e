"""Aspect buckets: pictures keep about their own shape instead of being cut to squares (SDXL, arXiv 2307.01952, 2.3)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..errors import UserError

if TYPE_CHECKING:
    from ..families import Model
    from ..recipe import DataRecipe

STEP = 64  # sides are multiples of it from LARGE pixels on, below of the VAE's factor
LARGE = 512
WIDEST = 4.0  # width to height at most, and the other way round


@dataclass(frozen=True)
class Buckets:
    """``sizes`` are (height, width) in pixels; one of them is no bucketing."""

    sizes: tuple[tuple[int, int], ...]

    def assign(self, sizes: np.ndarray) -> np.ndarray:
        """Number of the bucket of the nearest aspect for pictures of (n, 2) width and height; the nearest in the
        logarithm, so that tall and wide are alike, and the first of equals. uint16."""
        if len(self.sizes) == 1:
            return np.zeros(len(sizes), np.uint16)
        mine = np.log([w / h for h, w in self.sizes])
        kinds, place = np.unique(sizes, axis=0, return_inverse=True)
        aspect = np.log(np.maximum(kinds[:, 0], 1) / np.maximum(kinds[:, 1], 1))
        nearest = np.abs(aspect[:, None] - mine).round(9).argmin(1)
        return nearest.astype(np.uint16)[place.reshape(-1)]

    def of(self, size: tuple[int, int]) -> tuple[int, int]:
        """(height, width) of the bucket of a picture of (width, height)."""
        return self.sizes[int(self.assign(np.array([size]))[0])]


def usual_sizes(resolution: int, step: int) -> tuple[tuple[int, int], ...]:
    """SDXL's way: sides are multiples of ``step``, areas as near below resolution^2 as they come, aspects up to 4:1."""
    area = resolution * resolution
    found = {(resolution, resolution)}
    for short in range(step, resolution, step):
        long = area // short // step * step
        if long / short <= WIDEST:
            found |= {(short, long), (long, short)}
    return tuple(sorted(found))


def buckets_of(model: Model, recipe: DataRecipe, resolution: int) -> Buckets:
    """What ``data.buckets`` asks for; one square where it asks for nothing.

    Raises UserError for sides that the VAE cannot take."""
    if not recipe.buckets:
        return Buckets(((resolution, resolution),))
    if recipe.buckets is True:
        step = math.lcm(STEP if resolution >= LARGE else model.factor, model.factor)
        return Buckets(usual_sizes(resolution, step))
    for height, width in recipe.buckets:
        if height % model.factor or width % model.factor:
            raise UserError(
                f"data.buckets: [{height}, {width}] has a side that is no multiple of {model.factor}, the VAE's factor"
            )
    return Buckets(tuple(sorted({(h, w) for h, w in recipe.buckets})))
