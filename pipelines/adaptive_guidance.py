"""Adaptive Guidance and LinearAG (Castillo et al. 2023, arXiv 2312.12487) for SD1.x, SD2.x and SDXL, without training:
guidance stops paying for the unconditional branch once it says what the conditional one says.

Also usable as ``custom_pipeline``:

    pipe = DiffusionPipeline.from_pretrained("stable-diffusion-v1-5/stable-diffusion-v1-5", trust_remote_code=True,
                                             custom_pipeline="diffalign/pipelines/adaptive_guidance.py")
    found = pipe("a cat", threshold=0.991)
    found.images[0], found.evaluations[0]                 # 2 a step before the stop, 1 after it
    linear = pipe.fit(prompts, num_inference_steps=20)    # LinearAG's regression, once for a sampler
    pipe("a cat", linear=linear, num_inference_steps=20)

Drawing is diffusers' own; hooks on the U-Net leave rows of its call out and put what stands for them back.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from diffusers.utils import BaseOutput
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor, nn

from diffalign.denoiser import Denoiser
from diffalign.errors import UserError
from diffalign.pipelines import stock

NEVER = math.inf  # a threshold that no cosine reaches


class Fit(BaseModel):
    """An unconditional score as a combination of others: sum over steps i of cond[i] eps_c(i) and uncond[i] eps_u(i),
    plus bias. ``cond`` holds steps 0 to this one; ``uncond`` the measured steps before it. ``residual`` is the share of
    eps_u's mean square that the fit left over."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    cond: tuple[float, ...]
    uncond: dict[int, float]
    bias: float
    residual: float


class LinearGuidance(BaseModel):
    """LinearAG's regression for one sampler: the times of its U-Net calls, the guidance of the trajectories that it was
    fitted on, the call from which on nothing is guided, and the fits of the calls whose unconditional branch is not
    evaluated."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    times: tuple[int, ...]
    guidance: float
    until: int
    fits: dict[int, Fit]

    def save(self, file: str | Path) -> Path:
        """Writes it as JSON."""
        Path(file).write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")
        return Path(file)

    @classmethod
    def load(cls, file: str | Path) -> LinearGuidance:
        """Raises UserError when the file is absent or holds something else."""
        try:
            return cls.model_validate(json.loads(Path(file).expanduser().read_text(encoding="utf-8")))
        except (OSError, ValueError, ValidationError) as error:
            reason = " ".join(str(error).split())[:120]
            raise UserError(
                f"'{file}' holds no regression of LinearAG ({reason}); fit one with pipe.fit(...)"
            ) from error


@dataclass
class AdaptiveOutput(BaseOutput):
    """What a call gives.

    Args:
        images: as the family's own pipeline returns them.
        evaluations: network evaluations of each picture: 2 of a guided call, 1 of one without the other branch.
        similarity: cosine of the two scores of each picture (B), one list a U-Net call; nan where not measured.
    """

    images: Any
    evaluations: list[int]
    similarity: list[list[float]]


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine (B,) of a and b (B, C, h, w), in fp64 but on devices that have none."""
    kind = torch.float32 if a.device.type == "mps" else torch.float64
    return torch.cosine_similarity(a.flatten(1).to(kind), b.flatten(1).to(kind), dim=1)


def alternating(calls: int, until: float = 0.5) -> tuple[int, list[int]]:
    """(first call that is not guided, calls that are estimated): every second one of the first share ``until``."""
    end = math.ceil(calls * until)
    return end, list(range(1, end, 2))


class AdaptiveGuidancePipeline(stock.StockPipeline):
    """Samples with guidance as long as it says something; see the module's text."""

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        threshold: float | None = None,
        linear: LinearGuidance | str | Path | None = None,
        **options: Any,
    ) -> AdaptiveOutput:
        """Draws.

        Args:
            threshold: a picture's guidance ends after the call in which the cosine of its two noise predictions
                reached this; 0.991 by default, the authors' range is 0.99 to 0.9999. Above 1 it never does (plain
                guidance); at -1 the first call alone is guided. With ``linear`` the default is never.
            linear: a regression of `fit`, or its file: the unconditional branch of every second guided call is
                estimated, and from ``until`` on nothing is guided.
            options: any other argument of the family's pipeline (``guidance_scale``, ``negative_prompt``, ...).

        Raises UserError for a threshold that is no number and a regression of another sampler.
        """
        if threshold is not None and math.isnan(threshold):
            raise UserError("threshold must be a number (0.99 to 0.9999 are usual; above 1 guidance never stops)")
        given = LinearGuidance.load(linear) if isinstance(linear, str | Path) else linear
        limit = threshold if threshold is not None else (NEVER if given else 0.991)
        options.pop("return_dict", None)
        with self._watched(limit, given) as (pipe, watch):
            images = pipe(prompt, **options).images
        self.maybe_free_model_hooks()
        return AdaptiveOutput(images, watch.evaluations, watch.similarity)

    @torch.no_grad()
    def fit(
        self,
        prompts: Sequence[str],
        *,
        num_inference_steps: int = 20,
        guidance_scale: float = 7.5,
        until: float = 0.5,
        batch: int = 4,
        **options: Any,
    ) -> LinearGuidance:
        """LinearAG's coefficients by least squares on guided trajectories of ``prompts``, one number a score for all
        places of a latent. What is kept of the trajectories are sums, so that their number costs no memory.

        Args:
            until: share of the calls that are guided at all; every second of them is estimated (`alternating`).
            options: of the family's pipeline; the same sampler has to be used afterwards.

        Raises UserError without prompts or guidance, or where ``until`` leaves nothing to be estimated.
        """
        texts = list(prompts)
        if not texts:
            raise UserError("LinearAG is fitted on trajectories of prompts, and there are none; give some")
        if guidance_scale <= 1:
            raise UserError(f"guidance_scale {guidance_scale:g} guides nothing; LinearAG is fitted with more than 1")
        if not 0 < until <= 1:
            raise UserError(f"until is a share of the calls above 0 and up to 1, not {until:g}")
        sums: Sums | None = None
        for start in range(0, len(texts), batch):
            with self._watched(NEVER, None, recording=True) as (pipe, watch):
                pipe(
                    texts[start : start + batch],
                    num_inference_steps=num_inference_steps,
                    guidance_scale=guidance_scale,
                    output_type="latent",
                    **options,
                )
            end, estimated = alternating(len(watch.times), until)
            if not estimated:
                raise UserError(f"until {until:g} of {len(watch.times)} calls leaves none to estimate; raise it")
            sums = sums or Sums(estimated)
            sums.add(watch.cond, watch.uncond)
        assert sums is not None
        self.maybe_free_model_hooks()
        return LinearGuidance(times=tuple(watch.times), guidance=guidance_scale, until=end, fits=sums.solve())

    @contextmanager
    def _watched(
        self, threshold: float, linear: LinearGuidance | None, recording: bool = False
    ) -> Iterator[tuple[Any, Watch]]:
        pipe: Any = self.stock
        config = {**self.scheduler.config, "_class_name": type(self.scheduler).__name__}
        watch = Watch(pipe, Denoiser.from_config(config), threshold, linear, recording)
        # first of all hooks: parts beside the U-Net (user attention) count the rows that are really computed
        handles = [
            self.unet.register_forward_pre_hook(watch.before, with_kwargs=True, prepend=True),
            self.unet.register_forward_hook(watch.after, with_kwargs=True),
        ]
        try:
            yield pipe, watch
        finally:
            for handle in handles:
                handle.remove()


class Watch:
    """Hooks around the U-Net's calls of one sampling run; the unconditional rows come first in a guided call.

    ``cond`` and ``uncond`` are the noise predictions (B, C, h, w) of the calls so far, kept where they are needed."""

    def __init__(
        self, pipe: Any, denoiser: Denoiser, threshold: float, linear: LinearGuidance | None, recording: bool
    ) -> None:
        self.pipe, self.denoiser, self.threshold, self.linear = pipe, denoiser, threshold, linear
        self.keeps = recording or linear is not None
        self.times: list[int] = []
        self.evaluations: list[int] = []
        self.similarity: list[list[float]] = []
        self.stopped: list[bool] = []
        self.cond: list[Tensor] = []
        self.uncond: dict[int, Tensor] = {}
        self._measured: list[int] = []
        self._x = torch.empty(0)
        self._skips = False

    def before(self, unet: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Leaves out the unconditional rows of pictures that need none in this call."""
        x, t = args[0], args[1]
        guided = self.pipe.do_classifier_free_guidance
        count = len(x) // 2 if guided else len(x)
        if not self.times:
            self.evaluations, self.stopped = [0] * count, [False] * count
        self.times.append(round(float(t)))
        measured = range(count) if guided and self._measures() else ()
        self._measured = [row for row in measured if not self.stopped[row]]
        self._x, self._skips = x[-count:], guided and len(self._measured) < count
        for row in range(count):
            self.evaluations[row] += 1 + (row in self._measured)
        if not self._skips:
            return None
        index = torch.tensor([*self._measured, *range(count, 2 * count)], device=x.device)
        return _rows(args, index, len(x)), _rows(kwargs, index, len(x))

    def _measures(self) -> bool:
        """Whether this call evaluates unconditional branches."""
        if self.linear is None:
            return True
        k, known = len(self.times) - 1, self.linear.times
        if k >= len(known) or known[k] != self.times[k]:
            raise UserError(
                f"the regression was fitted for {len(known)} calls from {known[0]} to {known[-1]}, and call {k + 1} is "
                f"at {self.times[k]}; sample with the same steps and scheduler, or fit it again"
            )
        return k < self.linear.until and k not in self.linear.fits

    def after(self, unet: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Puts a row in the place of each that was left out, and sees who needs no guidance any more."""
        count, given = len(self.stopped), output[0]
        k = len(self.times) - 1
        if not self.pipe.do_classifier_free_guidance:
            self.similarity.append([math.nan] * count)
            return None
        cond, measured = given[-count:], given[: len(self._measured)]
        uncond = cond.clone()  # guidance between equals is none: c + w (c - c) is c itself
        if self._measured:
            uncond[self._measured] = measured
        t = torch.full((count,), self.times[k], device=cond.device)
        eps_c, eps_u = (self.denoiser.to_eps(each.float(), self._x.float(), t) for each in (cond, uncond))
        if self.keeps:
            self.cond.append(eps_c)
            if self.linear and k in self.linear.fits:
                guess = combine(self.linear.fits[k], self.cond, self.uncond)
                going = [row for row in range(count) if not self.stopped[row]]
                uncond[going] = self.denoiser.from_eps(guess, self._x.float(), t).to(uncond.dtype)[going]
            else:
                self.uncond[k] = eps_u
        alike = cosine(eps_c, eps_u).tolist()
        self.similarity.append([alike[row] if row in self._measured else math.nan for row in range(count)])
        for row in self._measured:
            self.stopped[row] = alike[row] >= self.threshold
        if not self._skips:
            return None
        whole = torch.cat([uncond, cond])
        return (whole,) if isinstance(output, tuple) else UNet2DConditionOutput(sample=whole)


def combine(fit: Fit, cond: Sequence[Tensor], uncond: dict[int, Tensor]) -> Tensor:
    """The estimated unconditional score (B, C, h, w) from those of the calls so far, this one's conditional last."""
    parts = [weight * score for weight, score in zip(fit.cond, cond, strict=True)]
    return torch.stack([*parts, *(weight * uncond[k] for k, weight in fit.uncond.items())]).sum(0) + fit.bias


class Sums:
    """The normal equations of each estimated call, in fp64, over all trajectories that are added."""

    def __init__(self, estimated: Sequence[int]) -> None:
        self.estimated = list(estimated)
        self.gram: dict[int, Tensor] = {}
        self.right: dict[int, Tensor] = {}
        self.square: dict[int, float] = dict.fromkeys(estimated, 0.0)

    def measured(self, k: int) -> list[int]:
        """The calls before ``k`` whose unconditional score is evaluated."""
        return [i for i in range(k) if i not in self.estimated]

    def add(self, cond: Sequence[Tensor], uncond: dict[int, Tensor]) -> None:
        """The scores (B, C, h, w) of a batch of trajectories, by call."""
        for k in self.estimated:
            known = [*(cond[i] for i in range(k + 1)), *(uncond[i] for i in self.measured(k))]
            flat = torch.stack([score.flatten().cpu().double() for score in known])
            features = torch.cat([flat, torch.ones_like(flat[:1])])
            target = uncond[k].flatten().cpu().double()
            self.gram[k] = self.gram.get(k, 0) + features @ features.T
            self.right[k] = self.right.get(k, 0) + features @ target
            self.square[k] += float(target @ target)

    def solve(self) -> dict[int, Fit]:
        """The fits; scores of neighbouring calls hardly differ: of coefficients that explain as well, the least."""
        found = {}
        for k in self.estimated:
            weights = torch.linalg.pinv(self.gram[k], rtol=1e-12, hermitian=True) @ self.right[k]
            left = self.square[k] - 2 * weights @ self.right[k] + weights @ self.gram[k] @ weights
            *scores, bias = weights.tolist()
            uncond = dict(zip(self.measured(k), scores[k + 1 :], strict=True))
            residual = max(float(left) / max(self.square[k], 1e-300), 0.0)
            found[k] = Fit(cond=tuple(scores[: k + 1]), uncond=uncond, bias=bias, residual=residual)
        return found


def _rows(value: Any, index: Tensor, total: int) -> Any:
    """Rows of every tensor in ``value`` that has ``total`` of them; the rest as it is."""
    if isinstance(value, Tensor):
        return value[index] if value.ndim and len(value) == total else value
    if isinstance(value, dict):
        return {name: _rows(part, index, total) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_rows(part, index, total) for part in value)
    return value
