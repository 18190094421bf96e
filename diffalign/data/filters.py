"""Which pairs are left out by a policy: too small a gap of scores, equal and nearly equal pictures, repeated rows.

What was kept is remembered by 64-bit numbers, a few words a row.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from ..errors import UserError
from ..recipe import DataRecipe
from .keyindex import NumberSet
from .rows import digest_of
from .scan import Look

ENTRY = struct.Struct("<4Q")  # of the journal: the row's key, its prompt's key, the two difference hashes
GAP = "score gap below data.min_gap"


def number_of(*parts: str) -> int:
    """A 64-bit hash of texts."""
    return int(digest_of(*(part.encode(errors="surrogatepass") for part in parts))[:16], 16)


class Names:
    """Ids made from content: the second row of the same content gets ``-2``."""

    def __init__(self) -> None:
        self.once = NumberSet()
        self.again: dict[int, int] = {}

    def __contains__(self, content: str) -> bool:
        return int(content[:16], 16) in self.once

    def take(self, content: str) -> str:
        """The content's id; from now on it is taken. ``content`` is a hash in hex."""
        number = int(content[:16], 16)
        if number not in self.once:
            self.once.add(number)
            return content
        self.again[number] = self.again.get(number, 1) + 1
        return f"{content}-{self.again[number]}"


class Filters:
    """``data.min_gap``, ``data.duplicates`` and ``data.near_duplicates`` over rows in order.

    ``journal`` (None unless asked for) collects what was remembered since it was last emptied; :meth:`restore` takes
    it back, for work that goes on where it was stopped."""

    def __init__(self, recipe: DataRecipe, journal: bool = False) -> None:
        self.min_gap, self.exact, self.near = recipe.min_gap, recipe.duplicates == "skip", recipe.near_duplicates
        self.seen = NumberSet()
        self.hashes: dict[int, list[tuple[int, ...]]] = {}
        self.journal = bytearray() if journal else None

    def refuse(self, prompts: Sequence[str | None], looks: Sequence[Look], gap: float | None) -> tuple[str, str] | None:
        """(reason, detail) of a pair that is left out; None for one that is kept, which is remembered.

        ``gap`` is the winner's score minus the loser's, None where one of them has none."""
        if self.min_gap is not None:
            if gap is None:
                return "no score", "data.min_gap needs both scores"
            if gap < self.min_gap:
                return GAP, f"{gap:.4g}"
        first, second = looks
        if self.exact and first.pixels == second.pixels:
            return "identical images", "bytes" if first.digest == second.digest else "pixels"
        if self.near is not None:
            bits = (first.hash ^ second.hash).bit_count()
            if bits <= self.near:
                return "near-identical images", f"{bits} of 64 bits differ"
        key = number_of(*(text or "" for text in prompts), *sorted((first.digest, second.digest)))
        if self.exact and key in self.seen:
            return "duplicate", ""
        prompt = number_of(prompts[0] or "")
        if self.near is not None and self.is_near(prompt, (first.hash, second.hash)):
            return "near duplicate", "of an earlier pair of this prompt"
        self._keep(key, prompt, (first.hash, second.hash))
        return None

    def refuse_one(self, prompt: str, look: Look) -> tuple[str, str] | None:
        """The same for a captioned picture. Raises UserError where a gap is asked for."""
        self.no_gap("single pictures")
        key, number = number_of(prompt, look.digest), number_of(prompt)
        if self.exact and key in self.seen:
            return "duplicate", ""
        if self.near is not None and self.is_near(number, (look.hash, look.hash)):
            return "near duplicate", "of an earlier picture of this prompt"
        self._keep(key, number, (look.hash, look.hash))
        return None

    def refuse_list(self, prompt: str, looks: Sequence[Look]) -> tuple[str, str] | None:
        """The same for a list: only equal pictures in equal order. Raises UserError where a gap is asked for."""
        self.no_gap("lists")
        key = number_of(prompt, *(look.digest for look in looks))
        if self.exact and key in self.seen:
            return "duplicate", ""
        self._keep(key, number_of(prompt), (0, 0))
        return None

    def no_gap(self, rows: str) -> None:
        """Raises UserError for ``data.min_gap`` over rows that have none."""
        if self.min_gap is not None:
            raise UserError(
                f"data.min_gap is the least gap between a pair's scores, and the data are {rows}; remove it"
            )

    def restore(self, journal: bytes) -> None:
        """Remember what an earlier process kept."""
        for key, prompt, *hashes in ENTRY.iter_unpack(journal):
            self._remember(key, prompt, tuple(hashes))

    def is_near(self, prompt: int, hashes: tuple[int, ...]) -> bool:
        """Whether a row of this prompt has these pictures, in any order, but for a few bits."""
        assert self.near is not None
        for known in self.hashes.get(prompt, ()):
            for order in {hashes, hashes[::-1]}:
                if all((a ^ b).bit_count() <= self.near for a, b in zip(known, order, strict=True)):
                    return True
        return False

    def _keep(self, key: int, prompt: int, hashes: tuple[int, int]) -> None:
        self._remember(key, prompt, hashes)
        if self.journal is not None:
            self.journal += ENTRY.pack(key, prompt, *hashes)

    def _remember(self, key: int, prompt: int, hashes: tuple[int, ...]) -> None:
        if self.exact:
            self.seen.add(key)
        if self.near is not None:
            self.hashes.setdefault(prompt, []).append(hashes)
