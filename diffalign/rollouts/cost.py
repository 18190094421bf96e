"""What a round of an online method costs, counted on its own code without a network."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..context import Context
from ..data.batch import Batch, Cond
from ..denoiser import Denoiser

if TYPE_CHECKING:
    from ..methods.base import Method, Phase

META = torch.device("meta")


@dataclass(frozen=True)
class RoundCost:
    """A round of some prompts. ``sampled`` and ``trained``: pictures through the U-Net by role, guided ones twice, in
    sampling (and recalling, see `Method.recall`) and in all updates together; ``decodes`` and ``scores`` (by scorer) of
    pictures; ``items`` that one pass trains on and ``bytes`` that they take, at most: a method may leave some out."""

    sampled: dict[str, int]
    trained: dict[str, int]
    decodes: int
    scores: dict[str, int]
    items: int
    bytes: int

    def json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    def summary(self) -> str:
        """In a line, for people."""
        calls = {"sampling": sum(self.sampled.values()), "updates": sum(self.trained.values())}
        judged = ", ".join(f"{count:,} by {name}" for name, count in self.scores.items()) or "none"
        through = ", ".join(f"{count:,} in {what}" for what, count in calls.items())
        return f"{self.items:,} items; U-Net pictures {through}; {self.decodes:,} decoded; scores: {judged}"


class Counting(Context):
    """A context without networks: shapes alone, each call counted."""

    calls: Counter[str]

    def model(
        self, role: str, x_t: Tensor, t: Tensor, cond: Cond, guidance: float = 1.0, uncond: Cond | None = None
    ) -> Tensor:
        self.calls[role] += len(x_t) * (1 if guidance == 1.0 else 2)
        return torch.empty(x_t.shape, device=META)

    def draw(self, batch: Batch, tag: str = "noise") -> tuple[Tensor, Tensor]:
        shape = (len(batch), *self.shape_of(batch))
        return torch.empty(len(batch), dtype=torch.int64, device=META), torch.empty(shape, device=META)

    def noise(self, tag: str, names: Sequence[str], visits: Sequence[int], shape: Sequence[int]) -> Tensor:
        return torch.empty(len(names), *shape, device=META)


def round_cost(
    method: Method[Any], phase: Phase, denoiser: Denoiser, prompts: Batch, uncond: Cond, names: Sequence[str]
) -> RoundCost:
    """The cost of a round for ``prompts`` on the meta device, scored by ``names``."""
    roles: Any = None  # no network is called
    shape: Any = next((tuple(x.shape[1:]) for x in prompts.latents.values()), (4, 8, 8))
    ctx = Counting(roles, denoiser, 0, META, uncond, phase=phase.name, latent_shape=shape)
    ctx.calls, scores, decoded = Counter(), Counter[str](), [0]

    def decode(latents: Tensor) -> Tensor:
        decoded[0] += len(latents)
        return torch.empty(len(latents), 3, 8, 8, device=META)

    def score(name: str) -> Any:
        def scored(images: Tensor, prompts: Sequence[str], t: Tensor | None = None) -> Tensor:
            scores[name] += len(images)
            return torch.empty(len(images), device=META)

        return scored

    ctx.decoder, ctx.rewards = decode, {name: score(name) for name in names}
    with torch.no_grad():
        found = method.collect(ctx, prompts)
        sampled, ctx.stats = ctx.calls, dict(found.stats)
        ctx.calls, item = Counter(), found.take([0])
        if method.recalls(phase):
            method.recall(ctx, item)
        sampled += Counter({role: count * len(found) for role, count in ctx.calls.items()})
        repeats, trained = method.repeats(phase), Counter[str]()
        # the first update of a round may call more networks than the others
        for repeat, share in ((0, 1), (1, repeats - 1))[:repeats]:
            ctx.repeat, ctx.calls = repeat, Counter()
            method.loss(ctx, item, phase)
            calls = {role: round(count * share * len(found) / method.parts(phase)) for role, count in ctx.calls.items()}
            trained += Counter(calls)
    return RoundCost(dict(sampled), dict(trained), decoded[0], dict(scores), len(found), found.bytes)
