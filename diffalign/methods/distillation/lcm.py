"""LCM: latent consistency distillation, whose student says x0 from every time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import Field
from torch import Tensor, nn

from ...data.batch import Cond
from ...facts import SamplingRecord, student_record
from ...families.guidance import require_embedding, tell
from ..base import Paper, Times
from ..consistency import Consistency, ConsistencyConfig, Point

if TYPE_CHECKING:
    from ...context import Context
    from ...families.base import Model

SIGMA_DATA = 0.5
SCALING = 10.0


def boundary(t: Tensor) -> tuple[Tensor, Tensor]:
    """c_skip and c_out (B, 1, 1, 1) at times t (B,): 1 and 0 at t = 0, within 1e-5 of 0 and 1 from t = 20 on.

    c_skip = s^2 / ((10 t)^2 + s^2) and c_out = 10 t / sqrt((10 t)^2 + s^2) with s = 0.5 (arXiv 2310.04378, app. D)."""
    scaled = SCALING * t.float().reshape(-1, 1, 1, 1)
    bottom = scaled.square() + SIGMA_DATA**2
    return SIGMA_DATA**2 / bottom, scaled / bottom.sqrt()


class LCMConfig(ConsistencyConfig):
    """The authors' settings, for which the LoRA's student gives its own targets."""

    timesteps: Times = Field(
        (999, 759, 499, 259), min_length=1, description="the times that the student is sampled at, falling"
    )
    tell_guidance: bool = Field(
        False,
        description="tell the student the guidance of each sample by its guidance embedding, which "
        "model.guidance_embedding adds, so that sampling chooses it; false: what all of them give is built in",
    )


class LCM(Consistency[LCMConfig]):
    """One trajectory over the whole schedule. It is sampled by its x0, noised anew to each next time."""

    Config = LCMConfig
    paper = Paper(
        title="Latent Consistency Models: Synthesizing High-Resolution Images with Few-Step Inference",
        arxiv="2310.04378",
        implements="guided DDIM with skipped steps, boundary scalings, pseudo-Huber, EMA targets and a guidance "
        "embedding by option, LCM-LoRA (2311.05556); improved consistency training's distance and times (2310.14189) "
        "by option",
        differs="every sample draws its own time and guidance; guidance counts as in diffusers, 1 more than theirs",
    )

    def build(self, family: Model) -> dict[str, nn.Module]:
        """Nothing. Raises UserError where the guidance is to be told to a U-Net that has no embedding for it."""
        if self.config.tell_guidance:
            self._width = require_embedding(family.unet, "method.tell_guidance=true")
        return {}

    def told(self, ctx: Context, point: Point) -> Cond:
        return tell(point.cond, point.w, self._width) if self.config.tell_guidance else point.cond

    def reach(self, ctx: Context, output: Tensor, x: Tensor, t: Tensor, point: Point) -> Tensor:
        """c_skip x + c_out x0."""
        skip, out = boundary(t)
        return skip * x + out * ctx.denoiser.to_x0(output, x, t)

    def sampling(self, scheduler: Mapping[str, Any]) -> SamplingRecord:
        """x0 and new noise, at the times of the settings."""
        told = self.config.guidance if self.config.tell_guidance else None
        return student_record(scheduler, self.config.timesteps, told=told)
