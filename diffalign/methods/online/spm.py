"""SPO's step-aware preference model (Liang et al. 2024, arXiv 2406.04314), trained on pairs before SPO itself."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from ...data.batch import Cond
from ..base import Loss, Method, MethodConfig, Needs, Paper, Phase, on_device

if TYPE_CHECKING:
    from ...context import Context
    from ...data.batch import Batch
    from ...eval.spm import StepAware
    from ...families import Model

ROLE = "spm"
TIMES = (0, 251, 501, 701, 951)  # the authors validate at these
DECODED = 4  # pictures that are decoded together


def spm_loss(first: Tensor, second: Tensor, preference: Tensor) -> Tensor:
    """Cross-entropy (B,) of two pictures' scores (B,) with a preference (B,) for the first: 1, 0, or 0.5 of a tie.

    Less the label's own entropy, so that a tie of equal scores costs 0, and a one-hot label with equal scores log 2."""
    logits = torch.stack([first, second], 1).log_softmax(1)
    label = torch.stack([preference, 1 - preference], 1)
    return -(label * logits).sum(1) + torch.special.xlogy(label, label).sum(1)


def preference_of(gap: Tensor, threshold: float) -> Tensor:
    """Labels (B,) from score gaps (B,) of first and second picture: 1 or 0 where the two shares of a softmax differ by
    more than ``threshold`` (tanh(gap / 2), so 0.1 is a gap of 0.2007), else 0.5."""
    wide = torch.tanh(gap.abs() / 2) > threshold
    return torch.where(wide, (gap > 0).to(gap.dtype), torch.full_like(gap, 0.5))


class SPMConfig(MethodConfig):
    """Settings of the step-aware preference model."""

    start: str = Field(
        "yuvalkirstain/PickScore_v1", description="the CLIP it starts as: a folder, a hub id, or asset:tiny-pickscore"
    )
    labels: Literal["data", "scores"] = Field(
        "data",
        description="who prefers: the pairs' own labels, with data.ties=keep ties too, or the scores of data.scorer",
    )
    threshold: float = Field(
        0.1, ge=0, lt=1, description="scores whose softmax shares differ by no more than this are a tie"
    )
    guidance: float = Field(5.0, ge=0, description="the frozen base's guidance when it says x0")
    balance: bool = Field(True, description="weigh a pair by one over the number of pairs of its prompt")


class SPM(Method[SPMConfig]):
    """Which of two noisy states is on the way to the better picture: a PickScore that is told the time.

    Both pictures of a pair are noised to one time with one noise; the frozen base says x0 under guidance, which is
    decoded: that is what the model sees, never latents. All of it trains, text tower and scale included. What a run
    leaves is a scorer: ``spm=RUN``. The authors' labels for SDXL are PickScore's: ``labels: scores`` with
    ``data.scorer: pickscore``.

    Accuracy is logged by time: at each of the authors' five times, the pairs whose time is nearest to it.
    """

    Config = SPMConfig
    paper = Paper(
        title="Aesthetic Post-Training Diffusion Models from Generic Preferences with Step-by-step Preference "
        "Optimization (its preference model)",
        arxiv="2406.04314",
        implements="CLIP with adaLN time conditioning that starts as PickScore at every time, trained on the decoded "
        "x0 predictions of noised pairs; ties, labels by scores, accuracy by time",
        differs="pictures keep their aspect ratio (centre crop); held-out pairs are noised at t = 0 too",
    )
    needs = Needs(batch="pair", decode=True, counts=True)
    roles = (ROLE,)
    phases = (Phase("main", (ROLE,)),)

    def __init__(self, config: SPMConfig) -> None:
        super().__init__(config)
        if config.labels == "scores":
            self.needs = replace(self.needs, columns=("chosen_score", "rejected_score"))

    def reason(self) -> str:
        if self.config.labels == "scores":
            return "method.labels=scores reads them: set data.scorer, such as pickscore"
        return ""

    def build(self, family: Model) -> dict[str, nn.Module]:
        """The preference model. Raises UserError when there is no CLIP at ``start``."""
        from ...eval.spm import load_step_aware, shape_of

        if family.device.type == "meta":
            return {ROLE: shape_of(self.config.start)}
        return {ROLE: load_step_aware(self.config.start)[0]}

    def preference(self, batch: Batch) -> Tensor:
        """For the first picture of each pair (B,): 1, 0 or 0.5."""
        if self.config.labels == "scores":
            return preference_of(batch.columns["chosen_score"] - batch.columns["rejected_score"], self.config.threshold)
        tie = batch.columns.get("tie")
        return torch.ones_like(batch.weight) if tie is None else 1 - 0.5 * (tie > 0).to(batch.weight.dtype)

    @torch.no_grad()
    def believed(self, ctx: Context, batch: Batch, t: Tensor, noise: Tensor) -> Tensor:
        """Pictures (2B, 3, H, W) in [0, 1] of the x0 that the base says of both members, winners first."""
        x0 = torch.cat([batch.latents["chosen"], batch.latents["rejected"]])
        times, denoiser = t.repeat(2), ctx.denoiser
        x_t = denoiser.add_noise(x0, noise.repeat(2, 1, 1, 1), times)
        cond = Cond.cat([batch.condition("chosen"), batch.condition("rejected")])
        said = denoiser.to_x0(ctx.model("base", x_t, times, cond, self.config.guidance), x_t, times)
        return torch.cat([ctx.decode(part) for part in said.split(DECODED)])

    def loss(self, ctx: Context, batch: Batch, phase: Phase) -> Loss:
        """One image-tower call of 2B and one text-tower call of the distinct prompts."""
        t, noise = ctx.draw(batch)
        images = self.believed(ctx, batch, t, noise)
        model: StepAware = ctx.roles.modules[ROLE]  # type: ignore[assignment]
        with ctx.casting():
            first, second = model.scores(images, [*batch.prompts, *batch.prompts], t.repeat(2)).chunk(2)
        preference = self.preference(batch)
        values = spm_loss(first, second, preference)
        weights = batch.weight
        if self.config.balance:
            weights = weights / on_device([float(self.counts.get(p, 1)) for p in batch.prompts], ctx.device)
        gap = (first - second).detach()
        right = (gap * (preference - 0.5) > 0).float()
        told = (preference != 0.5).float()
        metrics = {"score": (first + second) / 2, "gap": gap.abs(), "scale": model.logit_scale.exp()}
        partial = {"accuracy": (right, told)}
        nearest = (t[:, None] - on_device(TIMES, t.device)).abs().argmin(1)
        for place, time in enumerate(TIMES):
            partial[f"accuracy_t{time}"] = (right, told * (nearest == place))
        return Loss(values, weights, metrics, partial)
