"""128-bit keys to numbers in 24 bytes an entry: sorted arrays, and a small dict for what came last."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable

import numpy as np

RECENT = 1 << 16
HEX = re.compile(r"[0-9a-f]{32}")


def key_bytes(key: str) -> bytes:
    """16 bytes of a key: those it spells when it is a plain hash, else their hash."""
    return bytes.fromhex(key) if HEX.fullmatch(key) else hashlib.blake2b(key.encode(), digest_size=16).digest()


def key_array(keys: Iterable[str]) -> np.ndarray:
    """(n, 2) uint64."""
    return np.frombuffer(b"".join(map(key_bytes, keys)), np.uint64).reshape(-1, 2)


def _order(keys: np.ndarray) -> np.ndarray:
    """Stable order by the first half, then the second."""
    return np.lexsort((keys[:, 1], keys[:, 0]))


def first_places(keys: np.ndarray) -> np.ndarray:
    """Positions at which a key (n, 2) appears for the first time, ascending."""
    if not len(keys):
        return np.zeros(0, np.int64)
    order = _order(keys)
    ranked = keys[order]
    new = np.ones(len(keys), bool)
    new[1:] = (ranked[1:] != ranked[:-1]).any(1)
    return np.sort(order[new])


class KeyIndex:
    """Numbers by key; the first number given to a key stays."""

    def __init__(self) -> None:
        self._keys = np.zeros((0, 2), np.uint64)
        self._values = np.zeros(0, np.int64)
        self._recent: dict[bytes, int] = {}

    def __len__(self) -> int:
        self._merge()
        return len(self._keys)

    def add(self, keys: np.ndarray, values: np.ndarray) -> None:
        """``keys`` (n, 2) uint64, ``values`` (n,) int64."""
        if len(keys) > RECENT // 4:
            self._merge(keys, values)
            return
        raw = np.ascontiguousarray(keys).tobytes()
        for n, value in enumerate(values.tolist()):
            self._recent.setdefault(raw[16 * n : 16 * n + 16], value)
        if len(self._recent) > RECENT:
            self._merge()

    def find(self, keys: np.ndarray) -> np.ndarray:
        """(n,) int64: the numbers, -1 for keys that are not here."""
        found = np.full(len(keys), -1, np.int64)
        if len(self._keys) and len(keys):
            place = np.searchsorted(self._keys[:, 0], keys[:, 0])
            open_ = np.arange(len(keys))
            while len(open_):  # keys that share their first half stand side by side
                open_ = open_[place[open_] < len(self._keys)]
                open_ = open_[self._keys[place[open_], 0] == keys[open_, 0]]
                hit = self._keys[place[open_], 1] == keys[open_, 1]
                found[open_[hit]] = self._values[place[open_[hit]]]
                open_ = open_[~hit]
                place[open_] += 1
        if self._recent:
            raw = np.ascontiguousarray(keys).tobytes()
            for n in np.flatnonzero(found < 0).tolist():
                found[n] = self._recent.get(raw[16 * n : 16 * n + 16], -1)
        return found

    def _merge(self, keys: np.ndarray | None = None, values: np.ndarray | None = None) -> None:
        """One sorted run of everything."""
        parts = [(self._keys, self._values)]
        if self._recent:
            raw = np.frombuffer(b"".join(self._recent), np.uint64).reshape(-1, 2)
            parts.append((raw, np.fromiter(self._recent.values(), np.int64, len(self._recent))))
            self._recent = {}
        if keys is not None and values is not None:
            parts.append((keys, values))
        if len(parts) == 1:
            return
        all_keys = np.concatenate([k for k, _ in parts])
        all_values = np.concatenate([v for _, v in parts])
        order = _order(all_keys)
        all_keys = all_keys[order]
        new = np.ones(len(all_keys), bool)
        new[1:] = (all_keys[1:] != all_keys[:-1]).any(1)
        # halves apart: a search then runs over numbers that lie together
        self._keys = np.asfortranarray(all_keys[new])
        self._values = all_values[order][new]


class NumberSet:
    """64-bit numbers in 8 bytes each: a small set for what came last, sorted arrays of doubling size for the rest."""

    def __init__(self) -> None:
        self._recent: set[int] = set()
        self._sorted: list[np.ndarray] = []

    def __contains__(self, number: int) -> bool:
        if number in self._recent:
            return True
        wanted = np.uint64(number)
        for part in self._sorted:
            place = int(np.searchsorted(part, wanted))
            if place < len(part) and part[place] == wanted:
                return True
        return False

    def add(self, number: int) -> None:
        """From now on the number is in."""
        self._recent.add(number)
        if len(self._recent) < RECENT:
            return
        part = np.sort(np.fromiter(self._recent, np.uint64, len(self._recent)))
        while self._sorted and len(self._sorted[-1]) <= len(part):
            part = np.sort(np.concatenate([self._sorted.pop(), part]))
        self._sorted.append(part)
        self._recent.clear()
