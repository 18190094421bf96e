"""What a run leaves for others: weights in plain diffusers layout, a model card, and diffalign.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors.torch import save_file
from torch import nn

from .card import card
from .checkpoint import write_atomic
from .eval.spm import StepAware
from .facts import FACTS, Facts, SamplingRecord
from .families import load_model, save_lora, save_merged
from .families.extras import save_extra
from .recipe import ModelRecipe
from .validate import averaged

if TYPE_CHECKING:
    from .roles import Roles
    from .run import Run
    from .setup import Parts
    from .trainer import Trainer


def export_run(parts: Parts, trainer: Trainer, run: Run) -> Path:
    """Write ``run.model``: LoRA, parts beside the U-Net or whole pipeline of the student, other built roles, card and
    diffalign.json; where no student but a scorer is trained, that scorer.

    With ``output.merged`` a LoRA run also writes ``merged/``, a whole pipeline with the LoRA folded in. A few-step
    student's scheduler goes along."""
    folder, recipe, roles = run.model, parts.recipe, trainer.roles
    record = parts.method.sampling(parts.model.scheduler_config)
    if "student" not in roles.names:
        return export_scorer(parts, trainer, run)
    with averaged(trainer):
        whole = roles.whole("student", keep=trainer.rank == 0)
        if whole is None:  # this process only came along because the network is sharded
            return folder
        folder.mkdir(parents=True, exist_ok=True)
        if "student" in roles.extras:
            save_extra(roles.extras["student"], folder)
        elif roles.lora is not None:
            state = adapter_state(roles.state_dict("student"), "student")
            save_lora(state, roles.lora, folder)
            if recipe.output.merged:
                unet = original_unet(recipe.model) if recipe.model.quantize != "none" else None
                save_merged(parts.model, run.dir / "merged", unet=unet, lora=(state, roles.lora), record=record)
        else:
            save_merged(parts.model, folder, unet=whole, record=record)
        for name in roles.modules.keys() - roles.extras.keys():
            save_file({k: v.contiguous() for k, v in roles.state_dict(name).items()}, folder / f"{name}.safetensors")
    facts = facts_of(parts, run, record)
    if facts.kind == "lora":
        save_scheduler(record, folder)
    write_atomic(folder / FACTS, facts.text())
    write_atomic(folder / "README.md", card(facts, facts.kind))
    return folder


def export_scorer(parts: Parts, trainer: Trainer, run: Run) -> Path:
    """Write ``run.model`` of a run whose only trained role is a preference model: what ``--scorers spm=RUN`` takes."""
    (model,) = trainer.roles.modules.values()
    assert isinstance(model, StepAware)
    with averaged(trainer):
        model.save(run.model)
    facts = facts_of(parts, run, None)
    write_atomic(run.model / FACTS, facts.text())
    write_atomic(run.model / "README.md", card(facts, "scorer"))
    return run.model


def original_unet(recipe: ModelRecipe) -> nn.Module:
    """The base's U-Net as its files have it, fused LoRAs included: what a quantised one cannot give back."""
    plain = recipe.model_copy(update={"quantize": "none"})
    return load_model(plain, torch.device("cpu"), torch.float32).unet


def facts_of(parts: Parts, run: Run, record: SamplingRecord | None) -> Facts:
    """What a run knows of its weights."""
    recipe, paper, roles = parts.recipe, parts.method.paper, parts.trainer.roles
    held: dict[str, Any] = next((row for row in reversed(run.log) if row["kind"] == "validate"), {})
    return Facts(
        name=recipe.name,
        description=recipe.description,
        kind=kind_of(roles),
        family=parts.model.family,
        base=recipe.model.path,
        method=recipe.method.name,
        paper={"title": paper.title, "arxiv": paper.arxiv, "implements": paper.implements, "differs": paper.differs},
        step=run.step,
        rows=len(parts.rows),
        prompt=parts.rows[0].prompt,
        heldout={name: held[name] for name in ("loss", "accuracy", "margin") if name in held},
        data=parts.data_fingerprint,
        scheduler=parts.model.scheduler_config.get("_class_name"),
        sampling=record,
        recipe=recipe.dump(),
    )


def kind_of(roles: Roles) -> Literal["lora", "pipeline", "extra", "scorer"]:
    """What a run's ``model/`` is."""
    if "student" not in roles.names:
        return "scorer"
    return "extra" if roles.extras else "lora" if roles.lora is not None else "pipeline"


def save_scheduler(record: SamplingRecord | None, folder: Path) -> None:
    """``scheduler/scheduler_config.json`` beside a few-step LoRA; plain diffusers reads it by its subfolder."""
    if record is not None:
        (folder / "scheduler").mkdir(exist_ok=True)
        text = json.dumps(record.scheduler_config(), indent=2) + "\n"
        write_atomic(folder / "scheduler" / "scheduler_config.json", text)


def adapter_state(state: dict[str, Any], role: str) -> dict[str, Any]:
    """Adapter tensors under peft's names without the adapter's own: ``...lora_A.weight``."""
    return {name.replace(f".{role}.", "."): value for name, value in state.items()}
