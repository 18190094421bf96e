"""Whether a method's few-step sampler goes with its model and the students that a recipe brings."""

from __future__ import annotations

from typing import Any

from .errors import UserError
from .facts import RENOISING, SamplingRecord, recorded
from .families import Model
from .families.guidance import require_embedding
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
    check_told(recipe, model, record, begun)
    for lora in recipe.model.loras if record is not None else ():
        made = recorded(lora.path)
        if made is not None:
            made.check_base(model.scheduler_config, lora.path)
        if made is not None and record is not None and record.steps > made.steps:
            raise UserError(
                f"method '{recipe.method.name}' trains {record.steps} steps, but the student '{lora.path}' was made "
                f"for {made.summary()}; give the method its timesteps"
            )
    if method.samples:
        check_sampled(method, recipe, model, record)
    dropout = recipe.model.lora.dropout if recipe.model.storage == "adapters" else 0.0
    if method.online and dropout > 0:
        raise UserError(
            f"model.lora.dropout={dropout:g} does not go with method '{recipe.method.name}', which compares what the "
            "student says of a sample with what it said while sampling; set model.lora.dropout=0"
        )


def check_told(recipe: Recipe, model: Model, record: SamplingRecord | None, begun: SamplingRecord | None) -> None:
    """That there is a guidance embedding where the student is told its guidance, and nowhere else: with an embedding
    diffusers' pipelines leave the second branch out. ``begun``: the record of ``model.start``.

    Raises UserError where the one is without the other, or a student that is told its guidance would be a base."""
    told = record is not None and record.told is not None
    for lora in recipe.model.loras:
        if (made := recorded(lora.path)) is not None and made.told:
            raise UserError(
                f"the student '{lora.path}' is told its guidance and is no base to train on; give it as model.start, "
                "or take one that is not told it"
            )
    if begun is not None and begun.told and not told:
        raise UserError(
            f"model.start '{recipe.model.start}' is told its guidance, and method '{recipe.method.name}' tells none "
            "with these settings; with lcm set method.tell_guidance=true and model.guidance_embedding, else take "
            "another start"
        )
    if told:
        require_embedding(model.unet, f"method '{recipe.method.name}', which tells the student its guidance,")
    elif recipe.model.guidance_embedding:
        raise UserError(
            f"model.guidance_embedding is for a student that is told its guidance, and method '{recipe.method.name}' "
            "tells none; set method.tell_guidance=true (lcm, scm) or method.guidance_range (lora_guidance), or leave "
            "it out"
        )


def check_sampled(method: Method[Any], recipe: Recipe, model: Model, record: SamplingRecord | None) -> None:
    """That a method which samples its model does so as that was made to be: ``record`` is its few-step sampler.

    Raises UserError for a few-step student that would be sampled in many steps, at other times, by another kind of step
    or from another first noise, for a many-step model in few steps, and for guidance of a student that takes none."""
    places = [recipe.model.path, *(lora.path for lora in recipe.model.loras), recipe.model.start]
    found = {place: made for place in places if place is not None and (made := recorded(place)) is not None}
    name = recipe.method.name
    if record is None:
        for place, made in found.items():
            few = "timesteps" in type(method.config).model_fields
            mend = "set method.timesteps to its times and method.guidance=1" if few else "take a many-step model"
            said = f"method '{name}' samples in many steps, but the student '{place}' was made for {made.summary()}"
            raise UserError(f"{said}; {mend}")
        return
    if not found and model.scheduler_config.get("_class_name") in MANY_STEP:
        raise UserError(
            f"method.timesteps samples in {record.steps} steps, but '{recipe.model.path}' is a many-step model "
            f"({model.scheduler_config['_class_name']}); give a few-step student by model.loras or model.start, or "
            "leave method.timesteps out and set method.steps"
        )
    for place, made in found.items():
        if record.guided and not made.guided:
            raise UserError(
                f"method.guidance={record.guidance:g} guides the student '{place}', which takes no guidance; set "
                "method.guidance=1"
            )
        odd = sorted(set(record.timesteps or ()) - set(made.timesteps or record.timesteps or ()), reverse=True)
        if odd:
            raise UserError(
                f"method.timesteps has {odd}, times that the student '{place}' was not made for ({made.summary()}); "
                f"set method.timesteps to its times"
            )
        if (record.scheduler in RENOISING) != (made.scheduler in RENOISING):
            other = "renoise" if made.scheduler in RENOISING else "ddim"
            raise UserError(
                f"the student '{place}' was made for {made.summary()}, whose steps are not those of method.sampler; "
                f"set method.sampler={other}"
            )
        if abs(record.scale / made.scale - 1) > 1e-3:
            raise UserError(
                f"the student '{place}' starts from noise times {made.scale:.6g}, not {record.scale:g}; set "
                f"method.scale={made.scale:.6g}"
            )
