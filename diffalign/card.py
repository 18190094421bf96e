"""The model card: what was trained and how, and code that loads it. Made from the facts beside the weights alone."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Literal

from jinja2 import Environment

from .facts import Facts
from .families.folder import HUB_ID
from .families.lora import find_lora

HERE = "PATH/OF/THIS/FOLDER"
PIPELINES = {"sdxl": "StableDiffusionXLPipeline"}  # every other family: StableDiffusionPipeline


Form = Literal["lora", "pipeline", "kohya", "extra", "scorer"]


@dataclass(frozen=True)
class Place:
    """Where the weights lie for the reader of the card: a path or hub id, and the file's name of a kohya LoRA.

    ``shared``: the reader has other folders than this machine, so paths are not shown."""

    path: str = HERE
    weights: str = "pytorch_lora_weights.safetensors"
    shared: bool = False

    def shown(self, path: str) -> str:
        """A model's path, or where its reader shall put it."""
        return f"PATH/OF/{Path(path).name}" if self.shared and not is_hub_id(path) else path


def call_of(source: str, **options: str | None) -> str:
    """Arguments of a call as Python text, without those that are None."""
    return ", ".join([json.dumps(source), *(f"{k}={json.dumps(v)}" for k, v in options.items() if v is not None)])


def local_path(model: str) -> str:
    """Where the weights of a built-in model or of a full run lie; any other model as it was given."""
    asset = Path(str(resources.files("diffalign.assets").joinpath(model)))
    for place in (asset, Path(model).expanduser() / "model"):
        if (place / "model_index.json").is_file() and not (Path(model) / "model_index.json").is_file():
            return str(place)
    return model


def opener(path: str) -> str:
    """The class method that opens a model: of a folder or hub id, or of a single file."""
    return "from_single_file" if path.endswith((".safetensors", ".ckpt")) else "from_pretrained"


def lora_call(path: str, weight_name: str | None) -> str:
    """Arguments of ``load_lora_weights`` for a LoRA that was fused into the base."""
    if Path(path).expanduser().exists():
        return call_of(str(find_lora(path, weight_name)))
    return call_of(path, weight_name=weight_name)


def training_table(facts: Facts, place: Place) -> dict[str, object]:
    """The settings worth a row."""
    recipe = facts.recipe
    train, method, model = (recipe.get(name) or {} for name in ("train", "method", "model"))
    if not train or not method:
        return {}
    table: dict[str, object] = {
        "steps": facts.step,
        "batch": train.get("batch"),
        "learning rate": train.get("lr"),
        "schedule": f"{train.get('schedule')}, {train.get('warmup')} warm-up",
        "optimizer": train.get("optimizer"),
        "seed": train.get("seed"),
        "rows": facts.rows,
        **{f"method.{k}": v for k, v in method.items() if k != "name"},
    }
    lora = model.get("lora") if model.get("storage") == "adapters" and facts.kind in ("lora", "pipeline") else None
    if model.get("start"):
        table["student starts from"] = place.shown(model["start"])
    if lora:
        alpha = lora.get("alpha") or lora.get("rank")
        table |= {"LoRA rank": lora.get("rank"), "LoRA alpha": alpha, "LoRA targets": lora.get("targets")}
    return {key: value for key, value in table.items() if value is not None or key.startswith("method.")}


def card(facts: Facts, form: Form, place: Place | None = None) -> str:
    """The model card as Markdown. ``form`` is what the folder holds: a diffusers LoRA, a pipeline, a kohya LoRA, parts
    beside the U-Net, or a scorer."""
    place = place or Place()
    model = facts.recipe.get("model") or {}
    base = place.shown(facts.base or "THE/BASE") if place.shared or not facts.base else local_path(facts.base)
    loras = [{**entry, "path": place.shown(entry["path"])} for entry in model.get("loras") or []]
    vae = place.shown(model["vae"]) if model.get("vae") else None
    pipeline = PIPELINES.get(facts.family or "", "StableDiffusionPipeline")
    lora = form != "pipeline"
    validate = facts.recipe.get("validate") or {}
    record = facts.sampling
    plain = {"num_inference_steps": validate.get("steps", 25), "guidance_scale": validate.get("guidance", 7.5)}
    options = record.call() if record else plain
    imports = {pipeline, *(["AutoencoderKL"] if lora and vae else []), *([record.scheduler] if lora and record else [])}
    template = resources.files("diffalign").joinpath("card.md.j2").read_text(encoding="utf-8")
    environment = Environment(autoescape=False)  # Markdown, not HTML
    return environment.from_string(template).render(
        facts=facts,
        form=form,
        lora=lora,
        place=place.path,
        weights=place.weights,
        hub_base=facts.base if facts.base and is_hub_id(facts.base) else None,
        base_name=facts.base if facts.base and is_hub_id(facts.base) else "the base model",
        pipeline=pipeline,
        imports=", ".join(sorted(imports)),
        opener=opener(base),
        opened=call_of(base, revision=model.get("revision"), variant=model.get("variant")),
        vae=json.dumps(vae) if vae else None,
        vae_opener=opener(vae or ""),
        fused=[(lora_call(entry["path"], entry.get("weight_name")), entry.get("scale", 1.0)) for entry in loras],
        fused_names=", ".join(f"`{Path(entry['path']).name}` at {entry.get('scale', 1.0)}" for entry in loras),
        record=record,
        told=model.get("guidance_embedding") if lora and record and record.told else None,
        prompt=json.dumps(facts.prompt or "a photo"),
        options=", ".join(f"{key}={value}" for key, value in options.items()),
        table=training_table(facts, place),
        heldout=", ".join(f"{key} {value:.4g}" for key, value in facts.heldout.items()),
    )


def is_hub_id(text: str) -> bool:
    """Whether a model was named by a hub id, not by a path."""
    return bool(HUB_ID.match(text)) and not Path(text).expanduser().exists() and not Path(text).parent.is_dir()
