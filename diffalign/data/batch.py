"""What a training batch is: conditioning, latents and who they belong to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

TIME_IDS = "time_ids"


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
        """The same on another device or in another dtype; the copy does not wait.

        ``time_ids`` and whole numbers keep their dtype: bf16 would round a side of 1001 pixels to 1000."""

        def move(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
            return tensor.to(device=device, dtype=dtype, non_blocking=True)

        added = {
            k: move(v, None if k == TIME_IDS or not v.is_floating_point() else dtype) for k, v in self.added.items()
        }
        return Cond(move(self.embeds, dtype), added)

    def take(self, index: Tensor | slice | Sequence[int]) -> Cond:
        """Rows by index."""
        return Cond(self.embeds[index], {k: v[index] for k, v in self.added.items()})

    def repeat(self, n: int) -> Cond:
        """The whole batch n times after itself: (n B, ...)."""
        return Cond.cat([self] * n)

    def expand(self, n: int) -> Cond:
        """One row spread over n samples without a copy."""
        return Cond(self.embeds.expand(n, -1, -1), {k: v.expand(n, -1) for k, v in self.added.items()})

    def beside(self, other: Cond) -> Cond:
        """This text with what ``other`` says of its pictures (their ``time_ids``)."""
        return Cond(self.embeds, {**other.added, **self.added})

    def sized(self, time_ids: Tensor) -> Cond:
        """With the sizes (B, 6) of its pictures, where the network takes them: together with pooled text."""
        return Cond(self.embeds, {**self.added, TIME_IDS: time_ids}) if self.added else self

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
    drawn ahead by the loader. ``sizes`` (B, 6) fp32 are by the names of ``latents``: height and width of the original,
    top and left of the crop in the resized picture, height and width of what was encoded, all in pixels. ``prompts``
    (B) are the texts themselves, as scorers read them. A batch of prompts alone has no ``latents``; its ``sizes`` has
    the name ``image``: a whole picture at the run's resolution.
    """

    ids: tuple[str, ...]
    visits: tuple[int, ...]
    latents: dict[str, Tensor]
    cond: dict[str, Cond]
    columns: dict[str, Tensor]
    weight: Tensor
    drawn: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    sizes: dict[str, Tensor] = field(default_factory=dict)
    prompts: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.ids)

    def condition(self, picture: str) -> Cond:
        """What the network is told of a picture: its prompt (``rejected_prompt`` where there is one) and, where the
        network takes them, its own sizes."""
        cond = self.cond.get(f"{picture}_prompt", self.cond["prompt"])
        return cond.sized(self.sizes[picture]) if cond.added else cond

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
            {k: v.to(device, non_blocking=True) for k, v in self.sizes.items()},
            self.prompts,
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
            {k: v.pin_memory() for k, v in self.sizes.items()},
            self.prompts,
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
            {k: v[rows] for k, v in self.sizes.items()},
            tuple(self.prompts[i] for i in rows) if self.prompts else (),
        )
