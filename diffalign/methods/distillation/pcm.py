"""PCM: a consistency model for each phase of the schedule, deterministic from edge to edge."""

from __future__ import annotations

from pydantic import Field

from ..base import Paper
from ..consistency import ConsistencyConfig
from ..segmented import Segmented, SegmentedConfig


class PCMConfig(SegmentedConfig):
    """The authors' settings for SD1.5; theirs for SDXL: 40 steps of the solver and guidance 7 to 8."""

    guidance: tuple[float, float] = Field(
        (5.0, 6.0), description=str(ConsistencyConfig.model_fields["guidance"].description)
    )
    gan_weight: float = Field(0.1, ge=0, description="weight of the student's GAN loss; 0: no GAN")


class PCM(Segmented[PCMConfig]):
    """All of it is in the bases; these are its settings."""

    Config = PCMConfig
    paper = Paper(
        title="Phased Consistency Models",
        arxiv="2405.18407",
        implements="consistency within each of M phases by DDIM jumps to their edges, guided or unguided solver, "
        "adversarial consistency on the frozen teacher's features; sampled by DDIM in M steps",
        differs="edges are the times that sampling asks for (theirs are rounded to the solver's grid, up to 10 times "
        "lower); every step trains student and head, on rows of their own; one head on the middle block, which starts "
        "at zero",
    )
