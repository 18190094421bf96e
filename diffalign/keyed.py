"""Keyed randomness: every draw is a function of its key, never of a global state, rank or micro-batch (DESIGN 3).

numpy's counter-based Philox under a 128-bit key hashed from the parts, drawn on the CPU: the same numbers on every
device, and nothing to save for an exact resume.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

Part = int | str | float | bool | None


def generator(*parts: Part) -> np.random.Generator:
    """A generator whose stream depends on all ``parts`` (seed, purpose, visit, phase, repeat, sample id, ...)."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


def normal(shape: Sequence[int], *parts: Part) -> Tensor:
    """Standard normals, fp32, on the CPU."""
    return torch.from_numpy(generator(*parts).standard_normal(tuple(shape), dtype=np.float32))


def permutation(n: int, *parts: Part) -> np.ndarray:
    """A permutation of range(n), int64."""
    return generator(*parts).permutation(n)
