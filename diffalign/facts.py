"""What is known of weights, kept beside them in diffalign.json: origin, training, and how they want to be sampled.

Imports no torch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from .errors import UserError

FACTS = "diffalign.json"  # what is known of weights, beside them
HUB_ID = r"[\w-][\w.-]*/[\w-][\w.-]*"
Json = dict[str, Any]  # a JSON object
RENOISING = {"LCMScheduler"}  # these draw new noise at every step, whatever eta says


class SamplingRecord(BaseModel):
    """The sampler that a few-step model was made for. A many-step model has none: it is sampled as its base is.

    ``scheduler`` is a class of diffusers and ``config`` its scheduler_config. ``timesteps``, where given, are the exact
    times, in [0, num_train_timesteps) and falling; else the scheduler chooses them for ``steps``. ``guidance`` as in
    diffusers: 1 or less means none, and then the student is never guided. ``eta`` is the share of new noise of
    schedulers that take it (DDIM, TCD). ``scale`` multiplies the unit noise that sampling starts from (SiD: sigma of
    its first time). ``told``: the range of guidance that the network was trained to be told by its embedding, as
    diffusers' pipelines do where it has one, so that no step has a second branch.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    scheduler: Annotated[str, Field(pattern=r"^\w+Scheduler$")]
    config: Json
    steps: Annotated[int, Field(gt=0)]
    guidance: Annotated[float, Field(ge=0)] = 1.0
    timesteps: tuple[Annotated[int, Field(ge=0)], ...] | None = None
    eta: Annotated[float, Field(ge=0, le=1)] = 0.0
    scale: Annotated[float, Field(gt=0)] = 1.0
    told: tuple[float, float] | None = None

    @model_validator(mode="after")
    def _fits(self) -> SamplingRecord:
        if self.timesteps is not None:
            if len(self.timesteps) != self.steps:
                raise ValueError(f"{len(self.timesteps)} timesteps for {self.steps} steps")
            if any(a <= b for a, b in zip(self.timesteps, self.timesteps[1:], strict=False)):
                raise ValueError("timesteps must fall")
            if self.timesteps[0] >= self.config.get("num_train_timesteps", 1000):
                raise ValueError(f"timestep {self.timesteps[0]} is beyond the scheduler's range")
        return self

    @property
    def deterministic(self) -> bool:
        """Whether a step adds no new noise."""
        noisy = self.scheduler in RENOISING or str(self.config.get("algorithm_type", "")).startswith("sde-")
        return not noisy and self.eta == 0

    def scheduler_config(self) -> Json:
        """The contents of a scheduler_config.json."""
        return {**self.config, "_class_name": self.scheduler}

    @property
    def guided(self) -> bool:
        """Whether the student takes classifier-free guidance."""
        return self.guidance > 1

    def times(self, steps: int | None = None) -> tuple[int, ...] | None:
        """The times of ``steps`` steps: the recorded ones, or as many of them, evenly picked, the first always.

        Raises UserError for more steps than are recorded: the student saw no other times."""
        if self.timesteps is None or steps in (None, self.steps):
            return self.timesteps
        assert steps is not None
        if steps > self.steps:
            raise UserError(
                f"this student was made for {self.steps} step{'s' * (self.steps > 1)} (at {self._listed()}), not for "
                f"{steps}; leave the steps out, or choose a scheduler by hand, such as lcm"
            )
        return tuple(self.timesteps[k * self.steps // steps] for k in range(steps))

    def check_base(self, scheduler: Mapping[str, Any], student: str) -> None:
        """Raises UserError when ``student`` was distilled on a network that predicts something else than this base,
        whose scheduler config is ``scheduler``."""
        mine, base = (str(c.get("prediction_type") or "epsilon") for c in (self.config, scheduler))
        if mine != base:
            raise UserError(
                f"student '{student}' was distilled from a model of prediction {mine} and this base has {base}; take "
                "the base that it was made for"
            )

    def call(self, steps: int | None = None, guidance: float | None = None) -> Json:
        """Keyword arguments of a diffusers pipeline beside the prompt. Raises UserError as ``times``."""
        options: Json = {
            "num_inference_steps": steps or self.steps,
            "guidance_scale": self.guidance if guidance is None else guidance,
        }
        if (times := self.times(steps)) is not None:
            options["timesteps"] = list(times)
        if self.eta:
            options["eta"] = self.eta
        return options

    def summary(self) -> str:
        """In a line, for people."""
        times = f" at {self._listed()}" if self.timesteps else ""
        noise = "deterministic" if self.deterministic else "new noise at every step"
        start = "" if self.scale == 1 else f", first noise times {self.scale:.6g}"
        steps = f"{self.steps} step{'s' * (self.steps > 1)}{times}"
        told = f" (told, {self.told[0]:g} to {self.told[1]:g})" if self.told else ""
        return f"{self.scheduler}, {steps}, guidance {self.guidance:g}{told}, {noise}{start}"

    def _listed(self) -> str:
        return ", ".join(map(str, self.timesteps or ()))


# What of a scheduler's config says which noise the network was trained under.
SCHEDULE = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "prediction_type",
    "rescale_betas_zero_snr",
)


def student_record(
    scheduler: Mapping[str, Any],
    timesteps: Sequence[int],
    *,
    renoise: bool = True,
    scale: float = 1.0,
    ancestral: bool = False,
    told: tuple[float, float] | None = None,
) -> SamplingRecord:
    """How plain diffusers samples a student at exactly ``timesteps``, from its base's scheduler config: without
    guidance, or, where it was trained to be ``told`` one of a range, with `told_default` of that.

    ``renoise``: x0 and new noise at every step (LCMScheduler; its boundary scalings are below 1e-5 from t = 20 on);
    else deterministic DDIM steps that end on x0 itself, which is DPMSolver++ of first order, as DDIMScheduler takes no
    times. ``ancestral``, in the place of both: DDIM steps of eta = 1, which are Euler-ancestral's, and DPMSolver++'s as
    an SDE of first order. Where the times are evenly spaced from the last one down, their number alone gives them too.

    Raises UserError for times that do not fall or lie outside the schedule."""
    config: Json = {key: scheduler[key] for key in SCHEDULE if scheduler.get(key) is not None}
    if renoise and not ancestral:
        name = "LCMScheduler"
        config |= {"original_inference_steps": config.get("num_train_timesteps", 1000), "clip_sample": False}
    else:
        name = "DPMSolverMultistepScheduler"
        solver = "sde-dpmsolver++" if ancestral else "dpmsolver++"
        config |= {"algorithm_type": solver, "solver_order": 1, "final_sigmas_type": "zero"}
    config |= {"timestep_spacing": "trailing", "steps_offset": 1}  # 1, as pipelines of SD1.x want to see it
    try:
        return SamplingRecord(
            scheduler=name,
            config=config,
            steps=len(timesteps),
            guidance=told_default(told) if told else 1.0,
            timesteps=tuple(timesteps),
            scale=scale,
            told=told,
        )
    except ValidationError as error:
        reason = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise UserError(f"the student's timesteps {list(timesteps)}: {reason[0].lower()}{reason[1:]}") from None


def told_default(told: tuple[float, float]) -> float:
    """What a student is told that was trained for guidance in this range: 8, LCM's, or what of the range is nearest."""
    return min(max(8.0, told[0]), told[1])


def many_step_record(
    scheduler: Mapping[str, Any], steps: int, told: tuple[float, float] | None = None, guidance: float | None = None
) -> SamplingRecord:
    """How a student is sampled that takes as many steps as its base, but no unconditional branch: DDIM on the schedule
    of the base's scheduler config. ``guidance``: of one that is ``told`` it; by default `told_default`."""
    config: Json = {key: scheduler[key] for key in SCHEDULE if scheduler.get(key) is not None}
    config |= {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1, "timestep_spacing": "leading"}
    if config.get("rescale_betas_zero_snr"):
        config |= {"timestep_spacing": "trailing"}  # the last level is the only one that starts from noise alone
    w = 1.0 if told is None else told_default(told) if guidance is None else guidance
    return SamplingRecord(scheduler="DDIMScheduler", config=config, steps=steps, guidance=w, told=told)


class Facts(BaseModel):
    """diffalign.json. What an older or foreign file does not say is None or empty.

    ``kind``: a LoRA, a whole pipeline, parts beside a U-Net (soft tokens, user attention), or a scorer. ``base`` is the
    model's path or hub id; ``scheduler`` the class of the base's own scheduler; ``rows`` what it was trained on,
    ``prompt`` one of them; ``heldout`` the last held-out numbers; ``data`` a hash of the data; ``export`` the format of
    a copy that `diffalign export` wrote."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)

    format: int = 2
    name: str = "model"
    description: str = ""
    kind: Literal["lora", "pipeline", "extra", "scorer"] = "lora"
    family: str | None = None
    base: str | None = None
    method: str | None = None
    paper: dict[str, str] = Field(default_factory=dict)
    step: int | None = None
    rows: int | None = None
    prompt: str | None = None
    heldout: dict[str, float] = Field(default_factory=dict)
    data: str | None = None
    scheduler: str | None = None
    sampling: SamplingRecord | None = None
    export: str | None = None
    recipe: Json = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _older(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("format", 2) == 1:  # it kept the sample grids' settings as "sampling"
            given = data.get("sampling")
            kept = {"scheduler": given.get("scheduler")} if isinstance(given, dict) else {}
            return {**{k: v for k, v in data.items() if k != "sampling"}, **kept}
        return data

    def text(self) -> str:
        """The contents of the file."""
        return self.model_dump_json(indent=1) + "\n"


def read_facts(folder: Path) -> Facts | None:
    """What diffalign.json in a folder says; None where there is none.

    Raises UserError when it is damaged."""
    file = folder / FACTS
    if not file.is_file():
        return None
    try:
        return Facts.model_validate(json.loads(file.read_text(encoding="utf-8")))
    except ValidationError as error:
        fault = error.errors()[0]
        reason = f"{'.'.join(map(str, fault['loc']))}: {fault['msg'].removeprefix('Value error, ')}".lstrip(": ")
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
    raise UserError(f"'{file}' is damaged ({reason}); restore or delete it")


def find_facts(source: str, revision: str | None = None) -> Facts | None:
    """What is known of weights: in a folder or a run's folder, beside a file, or in a hub repository; None of others.

    Raises UserError when a diffalign.json is damaged."""
    place = Path(source).expanduser()
    if place.exists():
        places = (place.parent,) if place.is_file() else (place, place / "model")
        return next(filter(None, map(read_facts, places)), None)
    if not re.fullmatch(HUB_ID, source) or place.parent.is_dir():
        return None
    from huggingface_hub import hf_hub_download

    try:
        file = Path(hf_hub_download(source, FACTS, revision=revision))
    except (OSError, ValueError):  # every error of the hub client; who opens the weights says what else is wrong
        return None
    return read_facts(file.parent)


def recorded(model: str, lora: str | None = None, revision: str | None = None) -> SamplingRecord | None:
    """The sampler of a LoRA (file, folder, run's folder or hub id), else of a model (folder, run's folder, or hub id at
    a revision); None without one.

    Raises UserError when a diffalign.json is damaged."""
    for source, at in ((lora, None), (model, revision)):
        facts = find_facts(source, at) if source else None
        if facts is not None and facts.sampling is not None:
            return facts.sampling
    return None
