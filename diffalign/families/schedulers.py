"""diffusers schedulers by short name, made from a model's own scheduler config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import UserError, nearest

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
