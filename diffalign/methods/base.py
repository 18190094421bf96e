"""The contract of a method (DESIGN 2): tensors in, losses out; no optimiser, loader, logger or global RNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Generic, Literal, TypeVar

import torch
from pydantic import AfterValidator, ConfigDict, Field
from torch import Tensor, nn

from ..recipe import Section

if TYPE_CHECKING:
    from ..context import Context
    from ..data.batch import Batch
    from ..denoiser import Denoiser
    from ..facts import SamplingRecord
    from ..families.base import Model
    from ..roles import Roles
    from ..rollouts import Rollouts

Stats = dict[str, Tensor]
Columns = dict[str, Tensor]


def _fall(times: tuple[int, ...]) -> tuple[int, ...]:
    if any(a <= b for a, b in pairwise(times)):
        raise ValueError(f"the student's times must fall, such as [999, 749, 499, 249], not {list(times)}")
    return times


Time = Annotated[int, Field(ge=0)]  # an index of the schedule
Times = Annotated[tuple[Time, ...], AfterValidator(_fall)]  # what a few-step student is asked at


class MethodConfig(Section):
    """Settings of a method, checked as strictly as the sections of a recipe."""

    model_config = ConfigDict(frozen=True)


@dataclass(frozen=True)
class Paper:
    """Where a method comes from (``arxiv`` is empty where it is not there), what of it stands here, and what differs
    from the authors' code."""

    title: str
    arxiv: str
    implements: str
    differs: str = ""


@dataclass(frozen=True)
class Needs:
    """What a method asks of its batches: the kind of row, cached columns, texts besides the prompt that some row must
    have, and the tags of its (t, noise) draws.

    ``reference`` is False when the base is never called, so that full fine-tuning need not hold it. ``reward``: the
    scorers of the setting ``reward`` are loaded for ``ctx.reward``; ``scores_only``: those without gradients will do;
    ``decode``: the VAE stays on the device for ``ctx.decode``; ``counts``: the rows of each prompt are counted."""

    batch: Literal["pair", "image", "ranked", "rated", "prompt"] = "pair"
    columns: tuple[str, ...] = ()
    texts: tuple[str, ...] = ()
    draws: tuple[str, ...] = ("noise",)
    reward: bool = False
    scores_only: bool = False
    decode: bool = False
    reference: bool = True
    counts: bool = False


@dataclass(frozen=True)
class Phase:
    """One kind of optimiser step inside a training step.

    Args:
        name: shows in logs and keys the random draws.
        trains: roles that receive gradients; the trainer freezes all others.
        repeats: how often the phase runs in a step: a number, or the name of a field of the method's Config.
        batch: ``fresh`` takes new rows each repeat, ``reuse`` takes those of the phase before, ``round`` takes new rows
            for its first repeat and reuses them in the others.
        pulls: (role, towards, share) of versions of the U-Net: after each update ``role`` is moved by ``share`` of the
            way towards another role's weights. The two start with the same adapters.
    """

    name: str
    trains: tuple[str, ...]
    repeats: int | str = 1
    batch: Literal["fresh", "reuse", "round"] = "fresh"
    pulls: tuple[tuple[str, str, float], ...] = ()


@dataclass
class Loss:
    """One value and one weight a sample, (B,) each.

    The trainer divides by the weight sum of the whole step (all micro-batches, all processes). Weights carry no
    gradient. ``metrics`` are (B,) (averaged with the weights) or scalars (averaged over samples); ``partial`` ones are
    (value (B,), share (B,)), averaged over the samples whose share is not 0."""

    values: Tensor
    weights: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)
    partial: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)


C = TypeVar("C", bound=MethodConfig)


class Method(Generic[C]):
    """Base of every method. A subclass sets ``Config``, ``paper``, ``needs``, ``roles``, ``phases`` and ``loss``."""

    Config: ClassVar[type[MethodConfig]] = MethodConfig
    paper: ClassVar[Paper]
    # of the class, or of an instance whose settings ask for others
    needs: Needs = Needs()
    roles: tuple[str, ...] = ("student",)
    phases: tuple[Phase, ...] = (Phase("main", ("student",)),)
    couples: Literal["none", "group", "batch"] = "none"
    group: int = 1
    """Rows of a step that are compared with one another: neither micro-batches nor processes part them."""
    users: tuple[str, ...] = ()
    """Names behind the data's column ``user``, where it has one; known before ``build``."""
    counts: Mapping[str, int] = {}
    """How many rows each prompt has, where ``needs.counts`` asks for it."""
    repeated: ClassVar[str] = ""
    """The field of Config, if any, that counts equal steps inside one loss: a plan runs few and reckons the others."""

    def __init__(self, config: C) -> None:
        self.config = config

    def repeats(self, phase: Phase) -> int:
        """How often ``phase`` runs in one step."""
        return int(getattr(self.config, phase.repeats)) if isinstance(phase.repeats, str) else phase.repeats

    def rewards(self) -> str:
        """Scorers that ``ctx.reward`` serves, such as ``"pickscore,hpsv21=FILE"``: the setting ``reward``."""
        return str(getattr(self.config, "reward", "")) if self.needs.reward else ""

    def check(self, denoiser: Denoiser) -> None:
        """Before anything is encoded: raises UserError where the settings do not go with the model's schedule."""

    def reason(self) -> str:
        """Why these settings need the rows they do and what else would do, for a person whose data are others."""
        return ""

    def notes(self) -> list[str]:
        """What a run should say at its start about these settings, a line each."""
        return []

    def warnings(self, denoiser: Denoiser) -> list[str]:
        """What it should say besides of these settings on the model's schedule."""
        return []

    def build(self, family: Model) -> dict[str, nn.Module]:
        """Trained roles that are not adapters of the U-Net: heads, soft tokens, user embeddings."""
        return {}

    def begin(self, roles: Roles) -> None:
        """Before training: the weights of roles that begin as something else than the base."""

    def fit(self, columns: Mapping[str, Tensor]) -> None:
        """Once before training: the columns (N,) of all training rows, for settings that follow the data."""

    def statistics(self, ctx: Context, batch: Batch) -> Stats:
        """Sums over the batch that the trainer reduces over micro-batches and processes before ``loss`` is called
        (then ``ctx.stats``). Runs without gradients; what it adds to ``batch.columns`` is there for ``loss``."""
        return {}

    def remember(self, before: Stats, now: Stats) -> Stats:
        """``ctx.stats`` of an update from that of the same phase's last one and the new sums; what is returned is kept,
        and saved with the run. The sums alone, where a method does not say otherwise."""
        return now

    def loss(self, ctx: Context, batch: Batch, phase: Phase) -> Loss:
        """The loss of one micro-batch in ``phase``."""
        raise TypeError(f"{type(self).__name__} defines no loss")

    def collect(self, ctx: Context, prompts: Batch) -> Rollouts:
        """Online methods: what a batch of prompts is sampled and kept for a round of updates (`diffalign.rollouts`),
        without gradients. ``loss`` is then given its items in the place of the prompts."""
        raise TypeError(f"{type(self).__name__} collects no rollouts")

    def recall(self, ctx: Context, items: Batch) -> Columns:
        """Online methods: latents or columns of items in the place of those that ``collect`` kept, which have to come
        from the very call that ``loss`` will make. Called before the first of several updates of a round, without
        gradients, on just the micro-batches of its first pass."""
        return {}

    def recalls(self, phase: Phase) -> bool:
        """Whether a round begins with ``recall``."""
        return type(self).recall is not Method.recall and self.repeats(phase) > 1

    @property
    def online(self) -> bool:
        """Whether samples are made while training."""
        return type(self).collect is not Method.collect

    @property
    def samples(self) -> bool:
        """Whether the model that is trained is sampled meanwhile, and so has to be sampled as it was made to be."""
        return self.online

    def parts(self, phase: Phase) -> int:
        """Online methods: into how many updates one pass over the items of a round is cut."""
        return 1

    def sampling(self, scheduler: Mapping[str, Any]) -> SamplingRecord | None:
        """How a few-step student is to be sampled, from the base's scheduler config; None: as the base is."""
        return None

    def prepare(self, ctx: Context, rows: Batch) -> Columns:
        """Extra columns (B,) that the cache keeps; runs once, without gradients."""
        return {}


def weighted_mean(values: Tensor, weights: Tensor) -> Tensor:
    """sum(w v) / sum(w), a scalar; 0 where all weights are 0."""
    return (values * weights).sum() / weights.sum().clamp_min(torch.finfo(torch.float32).tiny)


def metric_sums(loss: Loss) -> Mapping[str, tuple[Tensor, Tensor]]:
    """(weighted sum, weight sum) of the loss and of each metric, detached: what micro-batches and processes add up."""
    weights = loss.weights.detach().float()
    total = weights.sum()
    sums = {"loss": ((loss.values.detach().float() * weights).sum(), total)}
    for name, value in loss.metrics.items():
        value = value.detach().float()
        sums[name] = ((value * weights).sum(), total) if value.ndim else (value * total, total)
    for name, (value, share) in loss.partial.items():
        share = share.detach().float() * weights
        sums[name] = ((value.detach().float() * share).sum(), share.sum())
    return sums


def on_device(values: Sequence[int] | Sequence[float], device: torch.device) -> Tensor:
    """Numbers that were worked out on the CPU; the copy does not wait."""
    return torch.tensor(values, device="cpu").to(device, non_blocking=True)
