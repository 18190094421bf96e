"""diffusers schedulers by short name, made from a model's own scheduler config."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from ..errors import UserError, nearest
from ..facts import SamplingRecord

CLASSES = {
    "ddim": "DDIMScheduler",
    "euler": "EulerDiscreteScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
    "lcm": "LCMScheduler",
}


def scheduler_names() -> list[str]:
    """Short names; ``default`` is the model's own scheduler."""
    return ["default", *CLASSES]


def check_scheduler(name: str) -> None:
    """UserError when the short name is unknown."""
    if name not in scheduler_names():
        raise UserError(f"unknown scheduler '{name}'{nearest(name, scheduler_names())}")


def make_scheduler(name: str, config: Mapping[str, Any]) -> Any:
    """The scheduler ``name`` with the model's noise schedule, prediction type and time offset.

    x0 is never clipped: ``DDIMScheduler`` would by default, and latents are not bounded by 1."""
    import diffusers

    check_scheduler(name)
    wanted = str(config.get("_class_name", "DDIMScheduler")) if name == "default" else CLASSES[name]
    kind = getattr(diffusers, wanted, None)
    if kind is None:
        raise UserError(f"this model's scheduler '{wanted}' is unknown to diffusers; choose one with --scheduler ddim")
    plain = {key: value for key, value in config.items() if key != "_class_name"}
    options = {"clip_sample": False} if "clip_sample" in kind().config else {}
    return kind.from_config(plain, **options)


def recorded_scheduler(record: SamplingRecord) -> Any:
    """The scheduler that a few-step model carries; it scales the first noise as recorded.

    Raises UserError when diffusers lacks it, or it cannot take the recorded times."""
    made = make_scheduler("default", record.scheduler_config())
    if record.timesteps is not None and "timesteps" not in inspect.signature(made.set_timesteps).parameters:
        raise UserError(
            f"the model's record asks {record.scheduler} for given timesteps, which it cannot take; "
            "set --scheduler and --steps by hand"
        )
    if record.scale != 1:
        made.init_noise_sigma = made.init_noise_sigma * record.scale  # what pipelines multiply given latents by
    return made
