"""Inversion-DPO (Li et al., ACM MM 2025, arXiv 2507.11554)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..base import Needs, Paper
from ..inverted import check_inversion
from ..pair import PairConfig, PairErrors, PairMethod
from .dpo import dpo_loss

if TYPE_CHECKING:
    from ...context import Context
    from ...data.batch import Batch
    from ...denoiser import Denoiser


class InversionDPOConfig(PairConfig):
    """Settings of Inversion-DPO. The SDXL launcher has 80 steps, the script's default is 40."""

    beta: float = Field(2000.0, gt=0, description="strength of the tie to the base")
    inversion_steps: int = Field(40, ge=1, le=1000, description="N; every step of the path enters every update")
    guidance: float = Field(2.0, ge=0, description="classifier-free guidance of both networks along the path")
    form: Literal["target", "path"] = Field(
        "target",
        description="target: the noise of each transport is regressed on where it led; path: distance to the base on "
        "its own path, as released (its gradient is exactly 0 at the start)",
    )
    sign: Literal[-1, 1] = Field(-1, description="-1: what the derivation asks; 1: the released code (form=path only)")

    @model_validator(mode="after")
    def _sign_goes_with_the_path(self) -> InversionDPOConfig:
        if self.sign == 1 and self.form != "path":
            raise ValueError("sign=1 is the released code's, which has form=path; set both or neither")
        return self

    @model_validator(mode="after")
    def _no_safeguard(self) -> InversionDPOConfig:
        if self.safeguard is not None:
            raise ValueError("the safeguard has no form for errors that are summed along a path; leave it at null")
        return self


class InversionDPO(PairMethod[InversionDPOConfig]):
    """DPO summed along the base's own inversion path of each picture, without random noise or times.

    With z_i the path, t_i the level entered by step i, e_i the base's guided noise there and k_i = 1 / (2 a_i):
    ``target`` compares (e_th(z_{i+1}, t_i) - e_i)^2 of student and base, which has a gradient from the first step on;
    ``path`` takes d_i = (e_th(z_i, t_i) - e_i)^2, where the derivation gives u = -(beta/2) mean k_i (d_w - d_l) and the
    released code the opposite sign. The default form is ours (the sheet's derivation).

    The student's calls are recomputed in the backward pass, so that memory holds the path and one call, not N.
    """

    Config = InversionDPOConfig
    paper = Paper(
        title="Inversion-DPO: Precise and Efficient Post-Training for Diffusion Models",
        arxiv="2507.11554",
        implements="the whole path in one logit; a form with a gradient at the start; the released one in both signs",
        differs="default form and sign (see the docstring); per sample (authors: the mean over the batch)",
    )
    needs = Needs(batch="pair", draws=())
    repeated = "inversion_steps"

    def check(self, denoiser: Denoiser) -> None:
        """That the path covers the schedule."""
        check_inversion(denoiser, self.config.inversion_steps)

    def measure(self, ctx: Context, batch: Batch) -> PairErrors:
        """Sums along the path: each error is mean_i k_i times the mean squared distance, in noise."""
        config, denoiser = self.config, ctx.denoiser
        x = torch.cat([batch.latents["chosen"], batch.latents["rejected"]]).float()
        cond = self.pair_cond(batch)

        def predict(role: str, z: Tensor, t: Tensor) -> Tensor:
            return denoiser.to_eps(ctx.model(role, z, t, cond, config.guidance), z, t)

        def distance(z: Tensor, t: Tensor, goal: Tensor) -> Tensor:
            return (predict("student", z, t) - goal).square().mean((1, 2, 3))

        levels, _ = denoiser.inversion_grid(config.inversion_steps, "target", offset=0)
        student, base = torch.zeros(len(x), device=x.device), torch.zeros(len(x), device=x.device)
        left = torch.full((len(x),), -1, device=x.device)
        for level in levels.tolist():
            t = torch.full((len(x),), level, device=x.device)
            with torch.no_grad():
                goal = predict("base", x, t)
                there = denoiser.ddim_step(denoiser.from_eps(goal, x, left), x, left, t).sample
            weight = (1 / (2 * denoiser.alphas_cumprod[level])).item() / config.inversion_steps
            at = there if config.form == "target" else x
            student = student + weight * checkpoint(distance, at, t, goal, use_reentrant=False)
            if config.form == "target":
                with torch.no_grad():
                    base += weight * (predict("base", there, t) - goal).square().mean((1, 2, 3))
            x, left = there, t
        (chosen, rejected), (base_chosen, base_rejected) = student.chunk(2), base.chunk(2)
        return PairErrors(chosen, rejected, base_chosen, base_rejected)

    def objective(self, errors: PairErrors) -> tuple[Tensor, Tensor]:
        """``dpo_loss``; with ``sign=1`` that of the swapped pair."""
        assert errors.base_chosen is not None and errors.base_rejected is not None
        four = (errors.chosen, errors.rejected, errors.base_chosen, errors.base_rejected)
        if self.config.sign == 1:
            four = (four[1], four[0], four[3], four[2])
        return dpo_loss(*four, beta=self.config.beta)
