"""Diffusion-KTO (Li et al., NeurIPS 2024, arXiv 2404.04465): pictures that were liked or not, without pairs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from ...errors import UserError
from ..base import Loss, Method, MethodConfig, Needs, Paper, Phase, Stats

if TYPE_CHECKING:
    from ...context import Context
    from ...data.batch import Batch

Utility = Literal["sigmoid", "loss_averse", "risk_seeking_1", "risk_seeking_2", "risk_seeking_3"]


def reference_point(gains: Tensor, weights: Tensor) -> Tensor:
    """Q: the mean gain of a whole batch, at least 0, from the sums of weighted gains and of weights; no gradient."""
    return (gains / weights.clamp_min(1e-12)).clamp_min(0).detach()


def kto_loss(
    gain: Tensor, label: Tensor, point: Tensor, beta: float, utility: Utility = "sigmoid"
) -> tuple[Tensor, Tensor]:
    """Loss 1 - U (B,) and logit y beta (g - Q) (B,).

    ``gain`` g: the base's error minus the policy's, means over C, h, w; ``label`` y: +1 liked, -1 not; ``point``: Q.
    The utility U of z = beta (g - Q): ``sigmoid``: sigmoid(y z); the authors' others (``--halo``), ``loss_averse``:
    log sigmoid(y z); ``risk_seeking_1``: -y log sigmoid(-z); ``risk_seeking_2``: y exp(z / 100) - 1;
    ``risk_seeking_3``: -log sigmoid(-y z).
    """
    z = beta * (gain - point)
    logit = label * z
    if utility == "sigmoid":
        worth = torch.sigmoid(logit)
    elif utility == "loss_averse":
        worth = F.logsigmoid(logit)
    elif utility == "risk_seeking_1":
        worth = -label * F.logsigmoid(-z)
    elif utility == "risk_seeking_2":
        worth = label * torch.exp(z / 100) - 1
    else:
        worth = -F.logsigmoid(-logit)
    return 1 - worth, logit


class KTOConfig(MethodConfig):
    """Settings of Diffusion-KTO. ``beta`` has no factor 1/2: 1000 is Diffusion-DPO's 2000."""

    beta: float = Field(1000.0, gt=0, description="strength of the tie to the base (authors' convention: no half)")
    utility: Utility = Field("sigmoid", description="how a picture's worth grows with its gain")
    positive_ratio: float | None = Field(
        0.5, gt=0, lt=1, description="share of the weight that liked pictures have; null: as many as there are"
    )
    liked: float = Field(1.0, ge=0, description="lambda of liked pictures")
    disliked: float = Field(1.0, ge=0, description="lambda of the others")


class KTO(Method[KTOConfig]):
    """Each picture is worth what its utility says of its gain over the base, as seen from the batch's mean gain Q.

    Q is over the whole step (all micro-batches and processes), which takes a look at every picture before the first
    backward pass: a forward pass of the student and one of the base for each. Pictures have their own t and noise.
    """

    Config = KTOConfig
    paper = Paper(
        title="Aligning Diffusion Models by Optimizing Human Utility",
        arxiv="2404.04465",
        implements="the released loss with its five utilities; lambda by label; the share of liked pictures",
        differs="that share is by weights of loss and Q, in place of the authors' weighted sampling: the same in the "
        "mean, and every picture is seen once an epoch; their Q is the mean over the pictures on the GPUs, here over "
        "the whole step; a tie counts one half in accuracy (authors: none); kto_gp is left out",
    )
    needs = Needs(batch="rated", columns=("label",))
    couples = "batch"

    def __init__(self, config: KTOConfig) -> None:
        super().__init__(config)
        self.shares = (1.0, 1.0)  # weight of a liked picture, and of another

    def fit(self, columns: Mapping[str, Tensor]) -> None:
        """Weights by label, so that liked pictures have ``positive_ratio`` of all. Raises UserError for one class."""
        liked, count = int((columns["label"] > 0).sum()), len(columns["label"])
        if liked in (0, count):
            lack = "not liked: add rows with label 0" if liked else "liked: add rows with label 1"
            raise UserError(
                f"Diffusion-KTO learns from both kinds of pictures, and none of {count} (held-out ones apart) is {lack}"
            )
        if self.config.positive_ratio is not None:
            share, wanted = liked / count, self.config.positive_ratio
            self.shares = wanted / share, (1 - wanted) / (1 - share)

    def weight(self, batch: Batch) -> Tensor:
        """Weight of each picture (B,)."""
        liked, others = self.shares
        return batch.weight * torch.where(batch.columns["label"] > 0, liked, others)

    def errors(self, ctx: Context, batch: Batch) -> tuple[Tensor, Tensor]:
        """Errors of the student and the base (B,); the base's are kept in the batch."""
        (t, noise), x0, denoiser = ctx.draw(batch), batch.latents["image"], ctx.denoiser
        x_t, target, cond = denoiser.add_noise(x0, noise, t), denoiser.target(x0, noise, t), batch.condition("image")
        student = ctx.error("student", x_t, t, cond, target)
        if "base_error" not in batch.columns:
            with torch.no_grad():
                batch.columns["base_error"] = ctx.error("base", x_t, t, cond, target)
        return student, batch.columns["base_error"]

    def statistics(self, ctx: Context, batch: Batch) -> Stats:
        """Sums of weighted gains and of weights."""
        student, base = self.errors(ctx, batch)
        weights = self.weight(batch)
        return {"gain": ((base - student) * weights).sum(), "weight": weights.sum()}

    def loss(self, ctx: Context, batch: Batch, phase: Phase) -> Loss:
        """Values of one micro-batch against the step's Q."""
        config, label = self.config, batch.columns["label"]
        student, base = self.errors(ctx, batch)
        gain = base - student
        point = reference_point(ctx.stats["gain"], ctx.stats["weight"])
        values, logit = kto_loss(gain, label, point, config.beta, config.utility)
        values = values * torch.where(label > 0, config.liked, config.disliked)
        logit, liked = logit.detach(), (label > 0).float()
        metrics = {
            "accuracy": (logit > 0).float() + 0.5 * (logit == 0).float(),
            "logit": logit,
            "logit_abs": logit.abs(),
            "saturated": (logit.abs() > 5).float(),
            "reference_point": point,
        }
        partial = {
            "chosen_error": (student, liked),
            "rejected_error": (student, 1 - liked),
            "chosen_gain": (gain, liked),
            "rejected_gain": (-gain, 1 - liked),
        }
        return Loss(values, self.weight(batch), metrics, partial)
