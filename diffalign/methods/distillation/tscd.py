"""TSCD: Hyper-SD's trajectory segmented consistency distillation, in stages of 8, 4, 2 and 1 segments."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from pydantic import Field, field_validator

from ...facts import SamplingRecord, student_record
from ..base import Paper
from ..consistency import ConsistencyConfig, Form
from ..score_distill import Time
from ..segmented import Segmented, SegmentedConfig


class TSCDConfig(SegmentedConfig):
    """The first stage. A next one has half the segments, and the last stage's run as ``model.start``."""

    segments: int = Field(
        8, ge=1, description="segments of this stage: 8, then 4, 2 and 1, each from the last by model.start"
    )
    guidance: tuple[float, float] = Field(
        (7.5, 7.5), description=str(ConsistencyConfig.model_fields["guidance"].description)
    )
    loss: Form = Field("mse", description=str(ConsistencyConfig.model_fields["loss"].description))
    timesteps: tuple[Time, ...] | None = Field(
        None, min_length=1, description="other times to sample at, falling; null: a step for each segment"
    )

    @field_validator("timesteps")
    @classmethod
    def _fall(cls, times: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if times is not None and any(a <= b for a, b in pairwise(times)):
            raise ValueError(f"the student's times must fall, such as [999, 499], not {list(times)}")
        return times


class TSCD(Segmented[TSCDConfig]):
    """One stage. Edges of a stage are edges of the one before, so that segments merge in pairs.

    A student of one segment is a consistency model: it is sampled by its x0 and new noise, as TCD is with eta 1."""

    Config = TSCDConfig
    paper = Paper(
        title="Hyper-SD: Trajectory Segmented Consistency Model for Efficient Image Synthesis",
        arxiv="2404.13686",
        implements="trajectory segmented consistency distillation, a stage a run; squared distance, with a GAN by "
        "option; sampled by DDIM in as many steps as segments",
        differs="without public training code: solver, guidance and the GAN (PCM's) are ours, their noise perturbation "
        "and dynamic weight of the losses are left out, as are human feedback and one-step score distillation "
        "(`draft` and `dmd2` go on from a run)",
    )

    def sampling(self, scheduler: Mapping[str, Any]) -> SamplingRecord:
        """DDIM from edge to edge, or, of one segment, x0 and new noise."""
        times = self.config.timesteps or self.edges(scheduler)
        return student_record(scheduler, times, renoise=self.config.segments == 1)
