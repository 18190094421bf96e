"""What is kept of a round's samples, and which update takes what of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .. import keyed
from ..data.batch import Batch, Cond


@dataclass
class Rollouts:
    """N items to train on (transitions, or pairs of them) that were sampled for P prompts; N is at least 1.

    ``ids`` (N,) name the items and key what a loss draws for them; ``row`` (N,) is the prompt of each. ``latents``
    (N, C, h, w) and ``columns`` (N,) are the items' own, ``weight`` (N,) is 0 where there is nothing to learn: such
    items cost no network call. Text is kept once a prompt. ``metrics`` are numbers a prompt (P,), for the curves;
    ``stats`` sums that are added up over micro-batches and processes and stand in ``ctx.stats`` all round.
    """

    prompts: Batch
    ids: list[str]
    row: list[int]
    latents: dict[str, Tensor]
    columns: dict[str, Tensor]
    weight: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)
    stats: dict[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, index: Sequence[int]) -> Batch:
        """Items by position as a batch: with their prompt's text, sizes, latents and columns."""
        prompts, kept = self.prompts, list(index)
        device = self.weight.device
        at, rows = (
            torch.tensor(numbers, device="cpu").to(device, non_blocking=True)
            for numbers in (kept, [self.row[i] for i in kept])
        )
        return Batch(
            tuple(self.ids[i] for i in kept),
            tuple(prompts.visits[self.row[i]] for i in kept),
            {k: v[rows] for k, v in prompts.latents.items()} | {k: v[at] for k, v in self.latents.items()},
            {k: Cond(v.embeds[rows], {n: a[rows] for n, a in v.added.items()}) for k, v in prompts.cond.items()},
            {k: v[rows] for k, v in prompts.columns.items()} | {k: v[at] for k, v in self.columns.items()},
            self.weight[at] * prompts.weight[rows],
            sizes={k: v[rows] for k, v in prompts.sizes.items()},
            prompts=tuple(prompts.prompts[self.row[i]] for i in kept) if prompts.prompts else (),
        )

    def put(self, index: Sequence[int], values: Mapping[str, Tensor]) -> None:
        """Latents or columns of items by position, in the place of what is kept under these names."""
        at = torch.tensor(list(index), device="cpu").to(self.weight.device, non_blocking=True)
        for name, found in values.items():
            kept = self.latents if name in self.latents else self.columns
            kept[name] = kept[name].index_copy(0, at, found.to(kept[name].dtype))

    def kept(self) -> list[int]:
        """Positions of the items that have any weight. Waits for the device: once a round."""
        rows = torch.tensor(self.row, device=self.weight.device)
        return torch.nonzero(self.weight * self.prompts.weight[rows]).flatten().tolist()

    def made(self) -> int:
        """How many items there are of prompts that have weight, whether they are kept or not. Waits for the device."""
        real = (self.prompts.weight > 0).tolist()
        return sum(real[row] for row in self.row)

    @property
    def bytes(self) -> int:
        """What the items take of the memory."""
        held = [*self.latents.values(), *self.columns.values()]
        return sum(tensor.numel() * tensor.element_size() for tensor in held)


def deal(rollouts: Rollouts, kept: Sequence[int], parts: int, seed: int, phase: str, epoch: int) -> list[list[int]]:
    """Positions of the items of each of ``parts`` updates.

    The items of a prompt are shuffled and dealt evenly by a key of its own, from an update that the key says on (else
    the first updates would have most), so that which update trains what depends on neither the other prompts, nor
    micro-batches, nor processes."""
    found: list[list[int]] = [[] for _ in range(parts)]
    by_row: dict[int, list[int]] = {}
    for item in kept:
        by_row.setdefault(rollouts.row[item], []).append(item)
    for row, items in by_row.items():
        name, visit = rollouts.prompts.ids[row], rollouts.prompts.visits[row]
        rng = keyed.generator(seed, "deal", visit, phase, epoch, name)
        first = int(rng.integers(parts))
        for place, chosen in enumerate(rng.permutation(len(items)).tolist(), first):
            found[place % parts].append(items[chosen])
    return [sorted(items) for items in found]
