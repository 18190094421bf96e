"""What `diffalign export` is given: a run, a role of its last checkpoint, a LoRA, or a whole model."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft import LoraConfig
from torch import Tensor, nn

from .checkpoint import checkpoint_dirs, load_checkpoint
from .errors import UserError, nearest
from .export import adapter_state
from .facts import Facts, read_facts
from .families.extras import find_extra
from .families.folder import open_folder
from .families.lora import LoraWeights, find_lora, read_lora
from .families.save import save_lora
from .recipe import ModelRecipe, read_yaml

# settings of a run's model that say which weights it stands on, not how they were held in training
WEIGHTS = ("path", "family", "revision", "variant", "vae", "loras")
EMA = "ema"


@dataclass(frozen=True)
class Source:
    """What is exported.

    A LoRA has a ``base`` and either a ``file`` or an ``adapter`` from a checkpoint; a whole model is ``model``, or the
    ``base`` with the weights ``network`` of a checkpoint in its U-Net. ``extra`` is a file of parts beside the U-Net of
    ``base``. ``run`` is the run's folder, where it is one."""

    name: str
    facts: Facts
    base: ModelRecipe | None = None
    file: Path | None = None
    adapter: LoraWeights | None = None
    model: ModelRecipe | None = None
    network: dict[str, Tensor] | None = field(default=None, repr=False)
    run: Path | None = None
    extra: Path | None = None

    @property
    def is_lora(self) -> bool:
        """Whether it is a LoRA rather than a whole model."""
        return self.file is not None or self.adapter is not None

    @property
    def stem(self) -> str:
        """A file's name for it."""
        name = self.facts.name if self.facts.name != "model" else Path(self.name).expanduser().resolve().stem
        return re.sub(r"[^\w.-]+", "-", name).strip("-.") or "model"

    def lora(self, unet: nn.Module) -> LoraWeights:
        """The LoRA, held against the base's U-Net (on the meta device it is enough)."""
        if self.adapter is not None:
            return self.adapter
        assert self.file is not None
        return read_lora(self.file, unet)

    @contextmanager
    def lora_file(self, unet: Callable[[], nn.Module]) -> Iterator[Path | None]:
        """The LoRA as a file that fits the base's U-Net; None for a whole model. One from a checkpoint for a while."""
        if self.file is not None:
            read_lora(self.file, unet())
        if self.adapter is None:
            yield self.file
            return
        with tempfile.TemporaryDirectory() as folder:
            yield save_lora(self.adapter.state, self.adapter.config, Path(folder))

    def load_network(self, unet: nn.Module) -> None:
        """The checkpoint's weights in the place of the U-Net's own, without a second copy.

        Raises UserError when they are of another network."""
        assert self.network is not None
        try:
            unet.load_state_dict(self.network, assign=True)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:160]
            raise UserError(f"the checkpoint of '{self.name}' is of another network: {reason}") from error


def find_source(
    model: str, base: str | None, role: str | None, revision: str | None = None, variant: str | None = None
) -> Source:
    """What ``model`` stands for.

    Raises UserError when there is no such thing, it is damaged, or its base is not known."""
    place = Path(model).expanduser()
    given = ModelRecipe(path=base, revision=revision, variant=variant) if base else None
    if (place / "recipe.yaml").is_file():
        return _run(place, model, given, role)
    if role:
        raise UserError(f"--role names a network of a run's checkpoint, and '{model}' is no run's folder")
    if given is None and not place.is_file() and (not place.is_dir() or (place / "model_index.json").is_file()):
        open_folder(model, revision, variant)
        facts = read_facts(place) if place.is_dir() else None
        return Source(
            model, facts or Facts(kind="pipeline"), model=ModelRecipe(path=model, revision=revision, variant=variant)
        )
    extra = find_extra(place)
    file = extra or find_lora(model)
    facts = read_facts(file.parent) or Facts()
    if extra:
        return Source(model, facts, given or _known_base(facts, model), extra=extra)
    return Source(model, facts, given or _known_base(facts, model), file)


def _known_base(facts: Facts, name: str) -> ModelRecipe:
    """The base that a LoRA's diffalign.json names."""
    settings = {key: value for key, value in (facts.recipe.get("model") or {}).items() if key in WEIGHTS and value}
    if not facts.base:
        raise UserError(f"'{name}' does not say which model it is for; give it with --base MODEL")
    recipe = _weights_of({**settings, "path": facts.base}, name)
    try:
        open_folder(recipe.path, recipe.revision, recipe.variant)
    except UserError as error:
        raise UserError(f"the base of '{name}' is not here: {error} (or give it with --base MODEL)") from error
    return recipe


def _weights_of(settings: dict[str, Any], where: str) -> ModelRecipe:
    known = {key: settings[key] for key in WEIGHTS if key in ModelRecipe.model_fields and settings.get(key)}
    if not isinstance(known.get("path"), str):
        raise UserError(f"'{where}' has no model.path in its recipe.yaml; give the base with --base MODEL")
    try:
        return ModelRecipe.model_validate(known)
    except ValueError as error:
        raise UserError(f"the recipe of '{where}' is damaged; restore its recipe.yaml, or give --base MODEL") from error


def _run(place: Path, name: str, given: ModelRecipe | None, role: str | None) -> Source:
    from omegaconf import OmegaConf

    recipe: Any = OmegaConf.to_container(read_yaml(str(place / "recipe.yaml")))
    settings = recipe.get("model") if isinstance(recipe.get("model"), dict) else {}
    base = given or _weights_of(settings, name)
    folder = place / "model"
    title = recipe.get("name") if isinstance(recipe.get("name"), str) else None
    facts = read_facts(folder) or Facts(name=title or place.name, base=base.path, recipe=recipe)
    if role:
        return _from_checkpoint(place, name, base, facts, role)
    if (folder / "model_index.json").is_file():
        whole = ModelRecipe(path=str(folder))
        open_folder(whole.path)
        return Source(name, facts, model=whole, run=place)
    if not folder.is_dir() or not any(folder.glob("*.safetensors")):
        kept = checkpoint_dirs(place / "checkpoints")
        hint = f"give --role student to export {kept[-1].name}" if kept else "it has no checkpoint yet"
        raise UserError(f"run '{name}' has no model/ yet: go on with its training, or {hint}")
    if extra := find_extra(folder):
        return Source(name, facts, base, run=place, extra=extra)
    return Source(name, facts, base, find_lora(str(folder)), run=place)


def _from_checkpoint(place: Path, name: str, base: ModelRecipe, facts: Facts, role: str) -> Source:
    """A role of the newest checkpoint: its live weights, or the student's average."""
    kept = checkpoint_dirs(place / "checkpoints")
    if not kept:
        raise UserError(f"run '{name}' has no checkpoint, so no roles to choose from; leave --role out")
    state, about = load_checkpoint(kept[-1])
    try:
        roles, averages = state["roles"], state["ema"]
        known = [*roles, *([EMA] if "student" in averages else [])]
        if role not in known:
            raise UserError(f"run '{name}' has no role '{role}'{nearest(role, known)}")
        owner = "student" if role == EMA else role
        tensors: dict[str, Tensor] = dict(roles[owner])
        if role == EMA:
            tensors = dict(zip(tensors, averages[owner]["shadow"], strict=True))
        model = about["recipe"]["model"]
        lora = model["lora"]
        step = int(about["step"])
        adapters = model["storage"] == "adapters"
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"'{kept[-1]}' is no checkpoint of a training run; leave --role out") from error
    facts = facts.model_copy(update={"step": step, "heldout": {}})
    mark = f".{owner}."
    if adapters and all(".lora_" in key and mark in key for key in tensors):
        state = adapter_state(tensors, owner)
        layers = sorted({key.partition(".lora_")[0] for key in state})
        config = LoraConfig(r=lora["rank"], lora_alpha=lora["alpha"] or lora["rank"], target_modules=layers)
        return Source(name, facts, base, adapter=LoraWeights(state, config), run=place)
    if adapters:
        raise UserError(f"role '{role}' of run '{name}' is no LoRA or network; leave --role out to export model/")
    return Source(name, facts, base, network=tensors, run=place)
