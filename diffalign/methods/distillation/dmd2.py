"""DMD2: distribution matching without regression, with more critic updates, a GAN and backward simulation."""

from __future__ import annotations

from pydantic import Field

from ..adversarial import Adversarial, GanConfig
from ..base import Paper, Times


class DMD2Config(GanConfig):
    """The authors' four SDXL steps; their one step of SD1.5: times [999], guidance 1.75, ten critic updates."""

    timesteps: Times = Field((999, 749, 499, 249), min_length=1, description="the student's times, falling")
    guidance: float = Field(8.0, ge=0, description="the teacher's guidance: u + w (c - u); 1 is conditional only")


class DMD2(Adversarial[DMD2Config]):
    """All of it is in the bases; these are its settings."""

    Config = DMD2Config
    paper = Paper(
        title="Improved Distribution Matching Distillation for Fast Image Synthesis",
        arxiv="2405.14867",
        implements="distribution matching on two time scales, GAN on the fake score's features, backward simulation, "
        "one step or several",
        differs="student and fake score are adapters on the teacher; every sample draws a step of its own; the critic "
        "phase makes its samples anew with the updated student; the GAN's head starts at zero; the divisor has a floor",
    )
