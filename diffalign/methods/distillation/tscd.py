"""TSCD: Hyper-SD's trajectory segmented consistency distillation, in stages of 8, 4, 2 and 1 segments."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pydantic import Field
from torch import Tensor

from ...facts import SamplingRecord, student_record
from ..base import Loss, Paper, Times
from ..consistency import ConsistencyConfig, Form
from ..segmented import Segmented, SegmentedConfig

if TYPE_CHECKING:
    from ...context import Context
    from ...data.batch import Batch


class TSCDConfig(SegmentedConfig):
    """The first stage. A next one has half the segments, and the last stage's run as ``model.start``."""

    segments: int = Field(
        8, ge=1, description="segments of this stage: 8, then 4, 2 and 1, each from the last by model.start"
    )
    guidance: tuple[float, float] = Field(
        (7.5, 7.5), description=str(ConsistencyConfig.model_fields["guidance"].description)
    )
    loss: Form = Field("mse", description=str(ConsistencyConfig.model_fields["loss"].description))
    timesteps: Times | None = Field(
        None, min_length=1, description="other times to sample at, falling; null: a step for each segment"
    )
    reward: str = Field(
        "",
        description="human feedback: scorers with gradients that the student's x0 climbs beside, such as pickscore or "
        "hpsv21=FILE; empty: none",
    )
    reward_weight: float = Field(0.01, gt=0, description="weight of each scorer")
    reward_margin: float | None = Field(
        None, description="score from which on nothing is gained: max(0, margin - score); null: there is none"
    )


class TSCD(Segmented[TSCDConfig]):
    """One stage. Edges of a stage are edges of the one before, so that segments merge in pairs.

    A student of one segment is a consistency model: it is sampled by its x0 and new noise, as TCD is with eta 1."""

    Config = TSCDConfig
    paper = Paper(
        title="Hyper-SD: Trajectory Segmented Consistency Model for Efficient Image Synthesis",
        arxiv="2404.13686",
        implements="trajectory segmented consistency distillation, a stage a run; squared distance, with a GAN by "
        "option; human feedback on the student's x0 by option; sampled by DDIM in as many steps as segments; the "
        "one-step score distillation is `dmd2`, which goes on from a run",
        differs="without public training code: solver, guidance and the GAN (PCM's) are ours; their noise perturbation "
        "and dynamic weight of the losses are left out; consistency on real pictures takes the place of their "
        "perceptual loss by instance segmentation in holding the feedback",
    )

    def __init__(self, config: TSCDConfig) -> None:
        super().__init__(config)
        if config.reward:
            self.needs = replace(self.needs, reward=True, decode=True)

    def notes(self) -> list[str]:
        if not self.config.reward:
            return []
        return ["a reward that is climbed by its own gradient gets hacked: look at the pictures, and at other scorers"]

    def add_terms(self, ctx: Context, batch: Batch, found: Loss, x0: Tensor) -> None:
        """Human feedback: minus the scores of what x0 looks like, or how far they are below the margin."""
        if not self.config.reward:
            return
        images, margin = ctx.decode(x0), self.config.reward_margin
        for name in ctx.rewards:
            score = ctx.reward(name, images, batch.prompts)
            lacks = -score if margin is None else (margin - score).clamp(min=0)
            found.values = found.values + self.config.reward_weight * lacks
            found.metrics[f"reward/{name}"] = score

    def sampling(self, scheduler: Mapping[str, Any]) -> SamplingRecord:
        """DDIM from edge to edge, or, of one segment, x0 and new noise."""
        times = self.config.timesteps or self.edges(scheduler)
        return student_record(scheduler, times, renoise=self.config.segments == 1)
