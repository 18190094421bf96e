"""What a training batch is: conditioning, latents and who they belong to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Cond:
    """Text conditioning of B samples.

    ``embeds`` is (B, L, D); ``added`` holds what SDXL-like networks take besides (``text_embeds`` (B, P), ``time_ids``
    (B, 6)), each with the batch first.
    """

    embeds: Tensor
    added: dict[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return self.embeds.shape[0]

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Cond:
        """The same on another device or in another dtype; the copy does not wait."""
        move = {"device": device, "dtype": dtype, "non_blocking": True}
        return Cond(self.embeds.to(**move), {k: v.to(**move) for k, v in self.added.items()})  # type: ignore[arg-type]

    def take(self, index: Tensor | slice | Sequence[int]) -> Cond:
        """Rows by index."""
        return Cond(self.embeds[index], {k: v[index] for k, v in self.added.items()})

    def repeat(self, n: int) -> Cond:
        """The whole batch n times after itself: (n B, ...)."""
        return Cond.cat([self] * n)

    def expand(self, n: int) -> Cond:
        """One row spread over n samples without a copy."""
        return Cond(self.embeds.expand(n, -1, -1), {k: v.expand(n, -1) for k, v in self.added.items()})

    @staticmethod
    def cat(parts: Sequence[Cond]) -> Cond:
        """Several conditionings after one another on the batch axis."""
        if len(parts) == 1:
            return parts[0]
        return Cond(
            torch.cat([p.embeds for p in parts]), {k: torch.cat([p.added[k] for p in parts]) for k in parts[0].added}
        )


@dataclass
class Batch:
    """B samples, already encoded.

    ``ids`` and ``visits`` (how often each sample was used before) key every random draw. ``latents`` holds (B, C, h, w)
    in fp32 by name (``chosen``, ``rejected`` or ``image``), ``cond`` by name (``prompt``, ``rejected_prompt``),
    ``columns`` numbers (B,). ``weight`` (B,) is 0 for padding rows. ``drawn`` holds (t, noise)
    drawn ahead by the loader.
    """

    ids: tuple[str, ...]
    visits: tuple[int, ...]
    latents: dict[str, Tensor]
    cond: dict[str, Cond]
    columns: dict[str, Tensor]
    weight: Tensor
    drawn: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.ids)

    def to(self, device: torch.device | str) -> Batch:
        """The same on another device; copies from pinned memory do not wait."""
        return Batch(
            self.ids,
            self.visits,
            {k: v.to(device, non_blocking=True) for k, v in self.latents.items()},
            {k: v.to(device) for k, v in self.cond.items()},
            {k: v.to(device, non_blocking=True) for k, v in self.columns.items()},
            self.weight.to(device, non_blocking=True),
            {k: (t.to(device, non_blocking=True), e.to(device, non_blocking=True)) for k, (t, e) in self.drawn.items()},
        )

    def pin(self) -> Batch:
        """The same in page-locked memory, from where copies to a GPU do not wait."""
        return Batch(
            self.ids,
            self.visits,
            {k: v.pin_memory() for k, v in self.latents.items()},
            {
                k: Cond(v.embeds.pin_memory(), {n: a.pin_memory() for n, a in v.added.items()})
                for k, v in self.cond.items()
            },
            {k: v.pin_memory() for k, v in self.columns.items()},
            self.weight.pin_memory(),
            {k: (t.pin_memory(), e.pin_memory()) for k, (t, e) in self.drawn.items()},
        )

    def take(self, index: Sequence[int]) -> Batch:
        """Rows by position."""
        rows = list(index)
        return Batch(
            tuple(self.ids[i] for i in rows),
            tuple(self.visits[i] for i in rows),
            {k: v[rows] for k, v in self.latents.items()},
            {k: v.take(rows) for k, v in self.cond.items()},
            {k: v[rows] for k, v in self.columns.items()},
            self.weight[rows],
            {k: (t[rows], e[rows]) for k, (t, e) in self.drawn.items()},
        )
