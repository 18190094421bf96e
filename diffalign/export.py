"""What a run leaves for others: weights in plain diffusers layout, a model card, and diffalign.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment
from safetensors.torch import save_file

from .checkpoint import write_atomic
from .families import save_lora, save_merged
from .families.lora import find_lora
from .recipe import LoraFile
from .validate import averaged

if TYPE_CHECKING:
    from .run import Run
    from .setup import Parts
    from .trainer import Trainer

CARD = """---
library_name: diffusers
base_model: {{ base }}
tags:
- text-to-image
- diffalign
- {{ method }}
{%- if lora %}
- lora
{%- endif %}
---
# {{ name }}

{{ description }}

Trained with diffalign by **{{ method }}**: {{ paper.title }} (arXiv {{ paper.arxiv }}). {{ paper.implements }}.
{%- if paper.differs %} Differs from the authors' code: {{ paper.differs }}.{% endif %}

## Use

```python
from diffusers import StableDiffusionPipeline

{% if lora -%}
pipe = StableDiffusionPipeline.from_pretrained({{ opened }})
{%- for source, scale in fused %}
pipe.load_lora_weights({{ source }})
pipe.fuse_lora(lora_scale={{ scale }})
pipe.unload_lora_weights()
{%- endfor %}
pipe.load_lora_weights("PATH/OF/THIS/FOLDER")
{%- else -%}
pipe = StableDiffusionPipeline.from_pretrained("PATH/OF/THIS/FOLDER")
{%- endif %}
image = pipe({{ prompt }}, num_inference_steps={{ steps }}, guidance_scale={{ guidance }}).images[0]
```

The scheduler is the base model's ({{ scheduler }}).

## Training

| | |
|---|---|
{%- for key, value in table.items() %}
| {{ key }} | {{ value }} |
{%- endfor %}
{% if heldout %}
Held-out rows at the last step: {{ heldout }}.
{% endif %}
The whole recipe is in `diffalign.json`.
"""


def export_run(parts: Parts, trainer: Trainer, run: Run) -> Path:
    """Write ``run.model``: LoRA or whole pipeline of the student, other built roles, card and diffalign.json.

    With ``output.merged`` a LoRA run also writes ``merged/``, a whole pipeline with the LoRA folded in."""
    folder, recipe, roles = run.model, parts.recipe, trainer.roles
    folder.mkdir(parents=True, exist_ok=True)
    with averaged(trainer):
        if roles.lora is not None:
            state = adapter_state(roles.state_dict("student"), "student")
            save_lora(parts.model, state, roles.lora, folder)
            if recipe.output.merged:
                save_merged(parts.model, run.dir / "merged", lora=(state, roles.lora))
        else:
            save_merged(parts.model, folder, unet=roles.networks["student"])
        for name in roles.modules:
            save_file({k: v.contiguous() for k, v in roles.state_dict(name).items()}, folder / f"{name}.safetensors")
    facts: dict[str, Any] = {
        "format": 1,
        "base": recipe.model.path,
        "method": recipe.method.name,
        "step": run.step,
        "data": parts.data_fingerprint,
        "sampling": {
            "scheduler": parts.model.scheduler_config.get("_class_name"),
            "steps": recipe.validate_.steps,
            "guidance": recipe.validate_.guidance,
        },
        "recipe": recipe.dump(),
    }
    write_atomic(folder / "diffalign.json", json.dumps(facts, indent=1) + "\n")
    write_atomic(folder / "README.md", card(parts, run))
    return folder


def adapter_state(state: dict[str, Any], role: str) -> dict[str, Any]:
    """Adapter tensors under peft's names without the adapter's own: ``...lora_A.weight``."""
    return {name.replace(f".{role}.", "."): value for name, value in state.items()}


def local_base(parts: Parts) -> str | None:
    """Where the base lies, for a folder, a run or a built-in model; None for a hub id."""
    path = parts.recipe.model.path
    return str(parts.model.folder.path) if Path(path).expanduser().is_dir() or "/" not in path else None


def call_of(source: str, **options: str | None) -> str:
    """Arguments of a call as Python text, without those that are None."""
    return ", ".join([json.dumps(source), *(f"{k}={json.dumps(v)}" for k, v in options.items() if v is not None)])


def lora_call(lora: LoraFile) -> str:
    """Arguments of ``load_lora_weights`` for a LoRA that was fused into the base."""
    if Path(lora.path).expanduser().exists():
        return call_of(str(find_lora(lora.path, lora.weight_name)))
    return call_of(lora.path, weight_name=lora.weight_name)


def card(parts: Parts, run: Run) -> str:
    """The model card as Markdown."""
    recipe, lora = parts.recipe, parts.trainer.roles.lora is not None
    held: dict[str, float] = next((row for row in reversed(run.log) if row["kind"] == "validate"), {})
    table = {
        "steps": run.step,
        "batch": recipe.train.batch,
        "learning rate": recipe.train.lr,
        "schedule": f"{recipe.train.schedule}, {recipe.train.warmup} warm-up",
        "optimizer": recipe.train.optimizer,
        "seed": recipe.train.seed,
        "rows": len(parts.rows),
        **{f"method.{k}": v for k, v in parts.method.config.model_dump().items()},
    }
    if lora:
        spec = recipe.model.lora
        table |= {"LoRA rank": spec.rank, "LoRA alpha": spec.alpha or spec.rank, "LoRA targets": spec.targets}
    base = local_base(parts) or recipe.model.path
    environment = Environment(autoescape=False)  # Markdown, not HTML
    return environment.from_string(CARD).render(
        base=recipe.model.path,
        name=recipe.name,
        description=recipe.description,
        method=recipe.method.name,
        paper=parts.method.paper,
        lora=lora,
        opened=call_of(base, revision=recipe.model.revision, variant=recipe.model.variant),
        fused=[(lora_call(entry), entry.scale) for entry in recipe.model.loras],
        prompt=json.dumps(parts.rows[0].prompt),
        steps=recipe.validate_.steps,
        guidance=recipe.validate_.guidance,
        scheduler=parts.model.scheduler_config.get("_class_name"),
        table=table,
        heldout=", ".join(f"{k} {held[k]:.4g}" for k in ("loss", "accuracy", "margin") if k in held),
    )
