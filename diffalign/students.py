"""Whether a method's few-step sampler goes with its model and the students that a recipe brings."""

from __future__ import annotations

from typing import Any

from .errors import UserError
from .facts import SamplingRecord, recorded
from .families import Model
from .methods.base import Method
from .recipe import Recipe

MANY_STEP = ("PNDMScheduler", "DDIMScheduler", "DDPMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler")


def check_students(method: Method[Any], recipe: Recipe, model: Model) -> None:
    """That the method's times lie in the model's schedule, and are of a student that ``model.loras`` brings.

    Raises UserError when they do not, or when they have more steps than the student was made for."""
    record = method.sampling(model.scheduler_config)
    begun = recorded(recipe.model.start) if recipe.model.start is not None else None
    if begun is not None:
        begun.check_base(model.scheduler_config, str(recipe.model.start))
    for lora in recipe.model.loras if record is not None else ():
        made = recorded(lora.path)
        if made is not None:
            made.check_base(model.scheduler_config, lora.path)
        if made is not None and record is not None and record.steps > made.steps:
            raise UserError(
                f"method '{recipe.method.name}' trains {record.steps} steps, but the student '{lora.path}' was made "
                f"for {made.summary()}; give the method its timesteps"
            )
    if method.online:
        check_sampled(recipe, model, record)


def check_sampled(recipe: Recipe, model: Model, record: SamplingRecord | None) -> None:
    """That an online method samples its model as that was made to be: ``record`` is the method's few-step sampler.

    Raises UserError for a few-step student that would be sampled in many steps, and the reverse, and for guidance of a
    student that takes none."""
    places = [recipe.model.path, *(lora.path for lora in recipe.model.loras), recipe.model.start]
    found = {place: made for place in places if place is not None and (made := recorded(place)) is not None}
    if record is None:
        for place, made in found.items():
            raise UserError(
                f"method '{recipe.method.name}' samples in many steps, but the student '{place}' was made for "
                f"{made.summary()}; set method.timesteps to its times and method.guidance=1"
            )
    elif not found and model.scheduler_config.get("_class_name") in MANY_STEP:
        raise UserError(
            f"method.timesteps samples in {record.steps} steps, but '{recipe.model.path}' is a many-step model "
            f"({model.scheduler_config['_class_name']}); give a few-step student by model.loras or model.start, or "
            "leave method.timesteps out and set method.steps"
        )
    for place, made in found.items():
        if record is not None and record.guided and not made.guided:
            raise UserError(
                f"method.guidance={record.guidance:g} guides the student '{place}', which takes no guidance; set "
                "method.guidance=1"
            )
