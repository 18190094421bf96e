"""Keyed randomness: every draw is a function of its key, never of a global state, rank or micro-batch (DESIGN 3).

numpy's counter-based Philox under a 128-bit key hashed from the parts, drawn on the CPU: the same numbers on every
device, and nothing to save for an exact resume.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from itertools import islice

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


def _high(a: np.ndarray, factor: int) -> np.ndarray:
    """Upper 64 bits of the product of uint64 numbers and one factor, by halves of 32 bits."""
    low, mask = np.uint64(32), np.uint64(0xFFFFFFFF)
    a1, a0 = a >> low, a & mask
    b1, b0 = np.uint64(factor >> 32), np.uint64(factor & 0xFFFFFFFF)
    middle = a1 * b0 + ((a0 * b0) >> low)
    return a1 * b1 + (middle >> low) + ((a0 * b1 + (middle & mask)) >> low)


def uniforms(names: Iterable[str], *parts: Part) -> np.ndarray:
    """``generator(*parts, name).random()`` for every name, fp64, without a generator for each.

    Philox4x64-10 (Salmon et al. 2011) written out for whole arrays; its first number of the first counter."""
    found = []
    rest = iter(names)
    while block := list(islice(rest, 1 << 15)):
        digests = (hashlib.blake2b(repr((*parts, name)).encode(), digest_size=16).digest() for name in block)
        keys = np.frombuffer(b"".join(digests), "<u8").reshape(-1, 2)
        k0, k1 = keys[:, 0].copy(), keys[:, 1].copy()
        x0, x1, x2, x3 = np.ones_like(k0), np.zeros_like(k0), np.zeros_like(k0), np.zeros_like(k0)
        for _ in range(10):
            h0, l0 = _high(x0, 0xD2E7470EE14C6C93), x0 * np.uint64(0xD2E7470EE14C6C93)
            h1, l1 = _high(x2, 0xCA5A826395121157), x2 * np.uint64(0xCA5A826395121157)
            x0, x1, x2, x3 = h1 ^ x1 ^ k0, l1, h0 ^ x3 ^ k1, l0
            k0, k1 = k0 + np.uint64(0x9E3779B97F4A7C15), k1 + np.uint64(0xBB67AE8584CAA73B)
        found.append((x0 >> np.uint64(11)) * 2.0**-53)
    return np.concatenate(found) if found else np.zeros(0)
