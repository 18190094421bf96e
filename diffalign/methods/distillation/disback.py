"""DisBack: the teacher is first degraded to its own few-step samples; the student then follows it all the way back."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ...checkpoint import checkpoint_dirs, load_checkpoint
from ...errors import UserError
from ...recipe import load_recipe
from ..adversarial import Adversarial
from ..base import Loss, Paper, Phase, Times
from ..score_distill import Sample
from .dmd2 import DMD2Config

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ...context import Context
    from ...data.batch import Batch, Cond
    from ...facts import SamplingRecord
    from ...roles import Roles

STUDENT = "student"


class DisBackConfig(DMD2Config):
    """DMD2's settings in one step, and the path."""

    timesteps: Times = Field((999,), min_length=1, description="the student's times, falling")
    stage: Literal["distill", "degrade"] = Field(
        "distill",
        description="degrade trains the teacher on what the first student makes, and its checkpoints are the path; "
        "distill has a student follow the path back",
    )
    path: str = Field(
        "",
        description="for stage=distill: the run of stage=degrade, whose checkpoints are the path; empty: none",
    )
    every: int = Field(1000, ge=1, description="steps after which the next checkpoint gives the teacher's score")

    @model_validator(mode="after")
    def _apart(self) -> DisBackConfig:
        if self.stage == "degrade":
            odd = [name for name in ("path", "gan_weight", "step_fake", "align") if getattr(self, name)]
            if odd:
                raise ValueError(f"{odd[0]} is for stage=distill; stage=degrade trains the teacher alone")
        return self


def path_of(run: str) -> tuple[Path, ...]:
    """The checkpoints of a run of stage=degrade, from the teacher to the first student.

    Raises UserError where there are none, or the run is of another kind."""
    folder = Path(run).expanduser()
    if not (folder / "recipe.yaml").is_file():
        raise UserError(f"method.path '{run}' is no run folder; give that of a run with method.stage=degrade")
    made = load_recipe(folder / "recipe.yaml").method
    if made.name != "disback" or made.model_dump().get("stage") != "degrade":
        raise UserError(f"method.path '{run}' is a run of method '{made.name}', not of disback with stage=degrade")
    found = checkpoint_dirs(folder / "checkpoints")
    if not found:
        raise UserError(f"method.path '{run}' has no checkpoints; train it again with train.save_every and train.keep")
    return tuple(found)


class DisBack(Adversarial[DisBackConfig]):
    """Two runs. ``stage=degrade``: the teacher, as the role ``student``, learns to denoise what the first student
    makes, which is the teacher asked at few times. The run's checkpoints lead from the one to the other.
    ``stage=distill``: DMD2, whose teacher's score is that of the last checkpoint at first and moves on by one every
    ``every`` steps, until it is the base's (arXiv 2408.15991, algorithms 1 and 2).
    """

    Config = DisBackConfig
    paper = Paper(
        title="Distribution Backtracking Builds A Faster Convergence Trajectory for Diffusion Distillation",
        arxiv="2408.15991",
        implements="the path by training on the first student's samples, and DMD2 along it back to the teacher",
        differs="the path really gives the teacher's score, where the authors' code drops its weights; no GAN by "
        "default; the first student is the teacher at few steps; all points of the path are guided as the teacher is",
    )

    def __init__(self, config: DisBackConfig) -> None:
        super().__init__(config)
        self.path: tuple[Path, ...] = ()
        if config.stage == "degrade":
            self.roles, self.phases = (STUDENT,), (Phase("degrade", (STUDENT,)),)
        elif config.path:
            self.path = path_of(config.path)
            self.roles = (*self.roles, *self.points)

    @property
    def points(self) -> tuple[str, ...]:
        """Roles of the path, frozen, from the teacher to the first student."""
        return tuple(f"path-{number}" for number, _ in enumerate(self.path, 1))

    def teacher(self, step: int) -> str:
        """The role that gives the teacher's score after ``step`` steps."""
        left = len(self.path) - step // self.config.every
        return self.points[left - 1] if left > 0 else "base"

    def notes(self) -> list[str]:
        if self.config.stage == "degrade":
            return ["train.keep is how many points the path will have, each one of train.save_every's checkpoints"]
        if not self.path:
            return [*super().notes(), "method.path is empty: without a path this is DMD2"]
        steps = len(self.path) * self.config.every
        return [*super().notes(), f"the path has {len(self.path)} points; from step {steps} on the teacher is the base"]

    def sampling(self, scheduler: Mapping[str, Any]) -> SamplingRecord | None:
        """None of a degraded teacher, which takes as many steps as the teacher."""
        return None if self.config.stage == "degrade" else super().sampling(scheduler)

    def begin(self, roles: Roles) -> None:
        """Loads the path.

        Raises UserError where it was trained with another `model.lora`."""
        if not self.path:
            return
        made = load_recipe(Path(self.config.path).expanduser() / "recipe.yaml").model
        scale = made.lora.rank if made.lora.alpha is None else made.lora.alpha
        adapters = None if made.storage == "copies" else (made.lora.rank, scale)
        own = None if roles.lora is None else (roles.lora.r, roles.lora.lora_alpha)
        for role, folder in zip(self.points, self.path, strict=True):
            state = load_checkpoint(folder)[0]["roles"][STUDENT]
            state = {name.replace(f".{STUDENT}.", f".{role}."): value for name, value in state.items()}
            if own != adapters or state.keys() != roles.named_parameters(role).keys():
                raise UserError(
                    f"method.path '{self.config.path}' was trained with other settings of model.storage or model.lora "
                    "(rank, alpha, targets); set them as there"
                )
            roles.load_state_dict(role, state)

    def call_student(self, ctx: Context, x_in: Tensor, t: Tensor, cond: Cond) -> tuple[Tensor, Tensor]:
        """The student's x0 (B, C, h, w) and its network's own output; the first student's where stage=degrade."""
        if self.config.stage == "distill":
            return super().call_student(ctx, x_in, t, cond)
        output = ctx.model("base", x_in, t, cond)
        return ctx.denoiser.to_x0(output, x_in, t), output

    def fake(self, ctx: Context, x_t: Tensor, t: Tensor, sample: Sample, guidance: float = 1.0) -> Tensor:
        """What denoises the student's samples: the degraded teacher is trained as a fake score is."""
        if self.config.stage == "distill":
            return super().fake(ctx, x_t, t, sample, guidance)
        return ctx.model(STUDENT, x_t, t, sample.cond, guidance)

    def real_x0(self, ctx: Context, x_t: Tensor, t: Tensor, sample: Sample, guidance: float = 1.0) -> Tensor:
        """The score of where the path stands, as x0 (B, C, h, w)."""
        return ctx.denoiser.to_x0(ctx.model(self.teacher(ctx.step), x_t, t, sample.cond, guidance), x_t, t)

    def loss(self, ctx: Context, batch: Batch, phase: Phase) -> Loss:
        """Either phase of DMD2, or the degradation."""
        if self.config.stage == "distill":
            return super().loss(ctx, batch, phase)
        with torch.no_grad():
            sample = self.generate(ctx, batch)
        return self.critic_loss(ctx, batch, sample)
