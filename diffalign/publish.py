"""`diffalign export`: a run or model in the layout that other tools load, written whole or not at all."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import UNet2DConditionModel
from safetensors import SafetensorError
from safetensors.torch import save_file

from .card import HERE, Form, Place, card
from .checkpoint import write_atomic
from .errors import RunError, UserError
from .export import save_scheduler
from .facts import FACTS, Facts, read_facts
from .families import detect, load_model
from .families.device import DTYPES
from .families.extras import NAME as EXTRA
from .families.extras import load_extra, save_extra
from .families.folder import HUB_ID, ModelFolder
from .families.kohya import kohya_metadata, to_kohya
from .families.lora import NAME
from .families.save import save_lora, save_merged
from .recipe import LoraFile
from .sources import Source, find_source

Format = Literal["diffusers", "kohya", "merged"]
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Exported:
    """What was written: the folder, the file or folder to load in it, and the number of bytes."""

    folder: Path
    weights: Path
    format: Format
    bytes: int


def export_model(
    model: str,
    format: Format,
    out: Path | None = None,
    *,
    dtype: str | None = None,
    base: str | None = None,
    role: str | None = None,
    revision: str | None = None,
    variant: str | None = None,
    repo: str | None = None,
) -> Exported:
    """Writes a run or model for other tools, with a model card and diffalign.json.

    Args:
        model: a run's folder, a LoRA (file or folder), or a model (folder, built-in name, hub id).
        format: ``diffusers`` (a LoRA stays a LoRA, a model a pipeline folder; soft tokens and user attention stay what
            they are, for `pipelines.extras`), ``kohya`` (LoRA for ComfyUI, A1111, Forge) or ``merged`` (a whole
            pipeline, the LoRA folded in).
        out: the folder to write; default ``export/FORMAT`` in the run's folder. An earlier export there is replaced.
        dtype: fp32, fp16 or bf16; default: a LoRA as it is stored, a pipeline in fp32.
        base: the model under a LoRA; default the one it was trained on.
        role: a network from the run's last checkpoint: ``student``, ``ema`` (its average) or another role; default what
            the run left in ``model/``.
        repo: the hub repository that the card speaks of; default the folder.

    Raises:
        UserError: no such model or role, a damaged file, a format that cannot hold it, an ``out`` with other files.
        RunError: the disk is full; nothing is left of the export, and an earlier one stays.
    """
    if format not in {"diffusers", "kohya", "merged"}:
        raise UserError(f"unknown format '{format}'; known: diffusers, kohya, merged")
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"unknown dtype '{dtype}'; known: {', '.join(DTYPES)}")
    source = find_source(model, base, role, revision, variant)
    if source.extra is not None and format != "diffusers":
        raise UserError(
            f"'{model}' is no LoRA: its soft tokens or user attention stand beside the U-Net, and {format} cannot hold "
            "them; use --format diffusers"
        )
    if format == "kohya" and not source.is_lora and source.extra is None:
        raise UserError(
            f"'{model}' is a whole model, and kohya's format holds LoRAs; use --format merged, or train a LoRA "
            "(model.storage=adapters)"
        )
    folder = _out_folder(source, out, format)
    place = Place(repo or HERE, shared=True)
    number = DTYPES[dtype] if dtype else None
    with _whole_or_nothing(folder, format) as partial:
        if source.extra is not None:
            weights = _extra(source, source.extra, partial, number, place)
        elif source.is_lora and format != "merged":
            weights = _lora(source, format, partial, number, place)
        else:
            weights = _pipeline(source, format, partial, number or torch.float32, place)
    found = folder / weights
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return Exported(folder, found, format, size)


def _lora(source: Source, format: Format, folder: Path, dtype: torch.dtype | None, place: Place) -> str:
    assert source.base is not None
    opened, family = detect(source.base)
    unet = meta_unet(opened)
    lora = source.lora(unet)
    if lora.others:
        raise UserError(
            f"'{source.name}' also changes {' and '.join(lora.others)}, and only U-Net LoRAs are exported as a LoRA; "
            "use --format merged"
        )
    facts = replace_facts(source, "lora", format, family, opened)
    if format == "diffusers":
        entries = {k: v for k, v in lora.header.items() if k not in {"format", "lora_adapter_metadata"}}
        save_lora(lora.state, lora.config, folder, entries, dtype)
        place = replace(place, weights=NAME)
    else:
        name = f"{source.stem}.safetensors"
        prediction = str(opened.scheduler.get("prediction_type", "epsilon"))
        side = int(opened.unet.get("sample_size") or 64) * 8
        tensors = to_kohya(lora, family, dict(unet.config), dtype)
        save_file(tensors, folder / name, kohya_metadata(lora, family, prediction, side, source.stem))
        place = replace(place, weights=name)
    save_scheduler(facts.sampling, folder)
    _describe(facts, "kohya" if format == "kohya" else "lora", folder, place)
    return place.weights


def _extra(source: Source, file: Path, folder: Path, dtype: torch.dtype | None, place: Place) -> str:
    """Soft tokens or user attention, with a card that says how to load them."""
    assert source.base is not None
    opened, family = detect(source.base)
    save_extra(load_extra(file, meta_unet(opened)), folder, dtype)
    _describe(replace_facts(source, "extra", "diffusers", family, opened), "extra", folder, place)
    return EXTRA


def _pipeline(source: Source, format: Format, folder: Path, dtype: torch.dtype, place: Place) -> str:
    base = source.base or source.model
    assert base is not None
    with source.lora_file(lambda: meta_unet(detect(base)[0])) as file:
        loras = [*base.loras, LoraFile(path=str(file))] if file else base.loras
        model = load_model(base.model_copy(update={"loras": loras}), CPU, torch.float32)
    facts = replace_facts(source, "pipeline", format, model.family, model.folder)
    if source.network is not None:
        source.load_network(model.unet)
    save_merged(model, folder, dtype=dtype, record=facts.sampling)
    _describe(facts, "pipeline", folder, place)
    return "."


def _describe(facts: Facts, form: Form, folder: Path, place: Place) -> None:
    write_atomic(folder / FACTS, facts.text())
    write_atomic(folder / "README.md", card(facts, form, place))


def replace_facts(
    source: Source, kind: Literal["lora", "pipeline", "extra"], format: Format, family: str, folder: ModelFolder
) -> Facts:
    """The facts of an export: those of its source, without paths of this machine."""
    known = source.facts
    scheduler = known.scheduler or folder.scheduler.get("_class_name")
    name = known.name if known.name != "model" else source.stem
    changes = {"kind": kind, "export": format, "family": family, "scheduler": scheduler, "name": name, "format": 2}
    base = source.base.path if source.base and kind != "pipeline" else known.base
    recipe = without_paths(known.recipe)
    return known.model_copy(update={**changes, "base": shareable(base), "recipe": recipe})


def shareable(path: str | None) -> str | None:
    """A hub id or built-in name as it is; of a path its last part, so that no export tells where a home lies."""
    if path is None or (HUB_ID.match(path) and not Path(path).exists()) or "/" not in path:
        return path
    return Path(path).name


def without_paths(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe whose local paths are cut to their last part."""
    found = {name: dict(value) if isinstance(value, dict) else value for name, value in recipe.items()}
    for section, key in (
        ("model", "path"),
        ("model", "vae"),
        ("model", "start"),
        ("method", "path"),
        ("data", "path"),
        ("data", "cache_dir"),
        ("output", "dir"),
    ):
        part = found.get(section)
        if isinstance(part, dict) and isinstance(part.get(key), str):
            part[key] = shareable(part[key])
    model = found.get("model")
    if isinstance(model, dict) and model.get("loras"):
        model["loras"] = [{**entry, "path": shareable(entry["path"])} for entry in model["loras"]]
    return found


def meta_unet(folder: ModelFolder) -> UNet2DConditionModel:
    """A model's U-Net without memory: names and shapes."""
    with torch.device("meta"):
        return UNet2DConditionModel.from_config(folder.unet)


# ---- the folder -----------------------------------------------------------------------------------------------------


def _out_folder(source: Source, out: Path | None, format: Format) -> Path:
    if out is None:
        if source.run is None:
            raise UserError(f"'{source.name}' is no run's folder; say where to write with --out DIR")
        out = source.run / "export" / format
    return out.expanduser()


@contextmanager
def _whole_or_nothing(out: Path, format: Format) -> Iterator[Path]:
    """A folder to write to; takes the place of ``out`` when all went well. An earlier export stays until then.

    Raises UserError when ``out`` holds anything else, RunError when the disk is full."""
    hidden = [out.with_name(f".{out.name}.{what}") for what in ("partial", "old")]
    partial, old = hidden
    try:
        if old.exists() and not out.exists():
            os.replace(old, out)  # killed between the two renames below
        _check_out(out, format)
        for path in hidden:
            shutil.rmtree(path, ignore_errors=True)
        partial.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"folder '{out}' cannot be written ({error.strerror}); choose another --out") from error
    try:
        yield partial
        for file in partial.rglob("*"):
            _sync(file)
        if out.exists():
            os.replace(out, old)
        os.replace(partial, out)
    except (OSError, SafetensorError) as error:
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)
        reason = "the disk is full" if full else " ".join(str(error).split())[:200]
        raise RunError(
            f"export to '{out}' failed: {reason}; nothing of it was kept, the source is untouched"
        ) from error
    finally:
        for path in hidden:
            shutil.rmtree(path, ignore_errors=True)


def _check_out(out: Path, format: Format) -> None:
    if not out.exists():
        return
    if not out.is_dir():
        raise UserError(f"'{out}' is a file; give a folder with --out")
    facts = read_facts(out)
    if any(out.iterdir()) and (facts is None or facts.export is None):
        raise UserError(f"'{out}' holds other files, which an export would replace; choose another --out")
    if facts is not None and facts.export not in {None, format}:
        raise UserError(f"'{out}' holds an export as {facts.export}; choose another --out for {format}")


def _sync(path: Path) -> None:
    if path.is_file():
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
