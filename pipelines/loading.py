"""Opens what is to be sampled as a plain diffusers pipeline: a base, a base with a LoRA, or a run's folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import UserError
from ..facts import SamplingRecord
from ..families import detect
from ..families.base import DTYPE, load_part
from ..families.extras import Extra, find_extra
from ..families.folder import ModelFolder, fetch, hash_file
from ..families.lora import find_lora, fuse_loras, load_lora
from ..families.schedulers import make_scheduler, recorded_scheduler
from ..recipe import ModelRecipe, read_yaml
from .extras import apply_extra, split_user

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

ADAPTER = "lora"


@dataclass
class Opened:
    """A pipeline on its device, what it was made from, and the parts beside its U-Net."""

    pipeline: DiffusionPipeline
    family: str
    source: str
    lora: str | None
    hashes: dict[str, str]
    extra: Extra | None = None


def resolve(model: str, lora: str | None, revision: str | None, variant: str | None) -> tuple[ModelRecipe, str | None]:
    """The base and the LoRA that ``model`` stands for. A run's folder with a LoRA in ``model/`` stands for both:
    the base of its recipe and, when no other is asked for, that LoRA."""
    run = Path(split_user(model)[0]).expanduser()
    recipe_file = run / "recipe.yaml"
    if not recipe_file.is_file() or not (run / "model").is_dir() or (run / "model" / "model_index.json").is_file():
        return ModelRecipe(path=model, revision=revision, variant=variant), lora
    from omegaconf import OmegaConf

    base = OmegaConf.to_container(read_yaml(str(recipe_file)).get("model", {}))
    if not isinstance(base, dict) or "path" not in base:
        raise UserError(
            f"run '{model}' has a recipe.yaml without model.path; give the base as the model and --lora {model}"
        )
    names = ("path", "family", "config", "vae", "revision", "variant", "loras")
    kept = {name: base[name] for name in names if base.get(name)}
    return ModelRecipe.model_validate(kept), lora or model


def long_prompts_of(model: str, lora: str | None) -> int | None:
    """Places of text that a run was trained with where its prompts were encoded by segments; ``model`` or ``lora`` is
    its folder."""
    from omegaconf import OmegaConf

    for place in filter(None, (lora, model)):
        file = Path(split_user(place)[0]).expanduser() / "recipe.yaml"
        if file.is_file():
            found = OmegaConf.to_container(read_yaml(str(file)).get("model", {}))
            if isinstance(found, dict) and found.get("long_prompts"):
                return int(found["long_prompts"])
    return None


def open_pipeline(
    model: str,
    lora: str | None,
    lora_scale: float,
    scheduler: str,
    device: torch.device,
    dtype: torch.dtype,
    revision: str | None = None,
    variant: str | None = None,
    record: SamplingRecord | None = None,
) -> Opened:
    """A plain diffusers pipeline, ready to call.

    Args:
        model: folder, built-in name, hub id, or a run's folder.
        lora: a LoRA file, its folder or a run's folder; stays an adapter with weight ``lora_scale``. Soft tokens and
            the like are found there too; ``RUN#USER`` chooses a user of a PPD run.
        scheduler: short name (`families.schedulers`).
        record: a few-step model's own scheduler, in the place of ``scheduler``.

    Raises:
        UserError: no such model or LoRA, damaged or unfitting weights.
    """
    recipe, lora = resolve(model, lora, revision, variant)
    extra = find_extra(split_user(lora)[0]) if lora else None
    file = find_lora(lora) if lora and extra is None else None
    folder, family = detect(recipe)
    fetch(folder, recipe.revision)
    pipeline = _from_pretrained(folder, dtype)
    hashes = {name: folder.fingerprint(name) for name in used(folder)}
    if recipe.loras:
        hashes["loras"] = " ".join(fuse_loras(pipeline, recipe.loras))
    if file:
        if record:
            record.check_base(folder.scheduler, str(lora))
        load_lora(pipeline, file, ADAPTER)
        pipeline.set_adapters([ADAPTER], [lora_scale])
        hashes["lora"] = hash_file(file)
    pipeline.scheduler = recorded_scheduler(record) if record else make_scheduler(scheduler, folder.scheduler)
    pipeline.set_progress_bar_config(disable=True)
    pipeline = pipeline.to(device)
    parts = apply_extra(pipeline, lora, scale=lora_scale) if lora and extra else None
    if lora and extra:
        hashes["lora"] = f"{hash_file(extra)} {split_user(lora)[1] or ''}".strip()
    return Opened(pipeline, family, recipe.path, str(lora) if lora else None, hashes, parts)


def used(folder: ModelFolder) -> list[str]:
    """Components that sampling loads."""
    left_out = {"safety_checker", "feature_extractor", "image_encoder"}
    return [name for name in folder.components() if name not in left_out and folder.part(name).is_dir()]


def _from_pretrained(folder: ModelFolder, dtype: torch.dtype) -> DiffusionPipeline:
    from diffusers import AutoencoderKL, DiffusionPipeline
    from diffusers.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled
    from transformers.utils import logging as transformers_logging

    # each component is asked, so that a missing or torn one is named
    weights = [folder.weights(c) for c in used(folder) if (folder.part(c) / "config.json").is_file()]
    safe = all(found.safetensors for found in weights)
    options: dict[str, Any] = {}
    if "safety_checker" in folder.index:
        options |= {"safety_checker": None, "requires_safety_checker": False}
    if folder.index.get("_class_name") == "StableDiffusionXLPipeline":
        options["add_watermarker"] = False  # where its package is installed it would change pixels
    if "vae" in folder.replaced:
        options["vae"] = load_part(AutoencoderKL, folder, "vae", dtype)
    bars = is_progress_bar_enabled(), transformers_logging.is_progress_bar_enabled()
    disable_progress_bar()
    transformers_logging.disable_progress_bar()
    try:
        return DiffusionPipeline.from_pretrained(
            str(folder.path),
            **{DTYPE: dtype},
            variant=folder.variant,
            use_safetensors=True if safe else None,
            local_files_only=True,
            **options,
        )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"model '{folder.source}' cannot be loaded: {reason}") from error
    finally:
        if bars[0]:
            enable_progress_bar()
        if bars[1]:
            transformers_logging.enable_progress_bar()
