"""Recipes: typed YAML with dotted overrides. One file says everything a run does (DESIGN 6). Imports no torch."""

from __future__ import annotations

import json
from importlib import resources
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from .errors import UserError, nearest

if TYPE_CHECKING:
    from omegaconf import DictConfig

Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Momentum = Annotated[float, Field(ge=0, lt=1)]


# What the YAML and OmegaConf libraries raise besides their own errors.
MALFORMED = (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError)


class Section(BaseModel):
    """Base of every recipe section: unknown keys are refused, values are checked again on assignment."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True, allow_inf_nan=False, protected_namespaces=())

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        kind = cls.model_fields[str(info.field_name)].annotation
        if isinstance(value, bool) and kind is not bool and bool not in get_args(kind):
            raise ValueError("true and false are no value here")
        return value


class LoraRecipe(Section):
    """Adapters of the trained roles. ``alpha: null`` means alpha = rank (scale 1)."""

    rank: Positive = 64
    alpha: Annotated[float, Field(gt=0)] | None = None
    targets: Literal["attention", "all"] | list[str] = "attention"
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0


class LoraFile(Section):
    """An existing LoRA that is fused into the base before training starts."""

    path: str
    scale: float = 1.0
    weight_name: str | None = None


class ModelRecipe(Section):
    """Which weights, and how they are held. ``long_prompts``: places of text that prompts are encoded to by segments
    (LongAlign's 240), so that none is cut at the encoder's 77; null: as the model's own pipeline does. ``loras`` become
    a part of the base; ``start`` is a LoRA (file, folder or run) that the student alone begins as.
    ``guidance_embedding``: width of a fresh embedding by which the student is told its guidance (LCM's 256)."""

    path: str
    family: Literal["auto", "sd1", "sd2", "sdxl"] = "auto"
    config: str | None = None
    vae: str | None = None
    vae_dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    long_prompts: Annotated[int, Field(ge=2)] | None = None
    guidance_embedding: Annotated[int, Field(ge=4, le=4096)] | None = None
    revision: str | None = None
    variant: str | None = None
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    quantize: Literal["none", "8bit", "4bit"] = "none"
    offload: bool = False
    storage: Literal["adapters", "copies"] = "adapters"
    lora: LoraRecipe = Field(default_factory=LoraRecipe)
    loras: list[LoraFile] = Field(default_factory=list)
    start: str | None = None
    attention: Literal["auto", "sdpa", "xformers", "flash"] = "auto"
    gradient_checkpointing: bool = False
    channels_last: bool = False
    compile: bool = False


class CurriculumRecipe(Section):
    """Pairs of a large score gap first: the widest of ``chunks`` equal parts for ``steps`` steps, then the first two,
    and so on up to all; ``top`` leaves out all pairs but those of the widest gaps."""

    chunks: Positive = 6
    steps: Positive = 500
    top: Positive | None = None


class DataRecipe(Section):
    """Where the pairs are and how they become latents."""

    path: str
    format: Literal["auto", "folder", "parquet", "datasets", "webdataset"] = "auto"
    split: str = "train"
    streaming: bool = False
    resolution: Positive | None = None
    buckets: bool | list[tuple[Positive, Positive]] = False
    crop: Literal["center", "random"] = "center"
    flip: bool = False
    alpha: Literal["white", "black", "drop"] = "white"
    ties: Literal["skip", "keep", "random"] = "skip"
    duplicates: Literal["skip", "keep"] = "skip"
    near_duplicates: Annotated[int, Field(ge=0, le=32)] | None = None
    scorer: str | None = None
    min_gap: float | None = None
    rewards: list[str] = Field(default_factory=list)
    max_pairs: Positive | None = None
    shuffle_labels: bool = False
    perturb: Literal["weak", "medium", "strong"] | None = None
    strict: bool = False
    caption_dropout: Fraction = 0.0
    cache: bool = True
    cache_dir: str | None = None
    latents: Literal["fp32", "fp16"] = "fp32"
    posterior: Literal["mean", "sample"] = "mean"
    encode_batch: Positive = 8
    reference_errors: Positive | None = None
    curriculum: CurriculumRecipe | None = None


Policy = Literal["off", "warn", "stop"]


class GuardsRecipe(Section):
    """What a run does when its numbers go wrong: ``off``, ``warn`` (once, in the log and the report) or ``stop``."""

    winner: Policy = "warn"
    sigmoid: Policy = "warn"
    pictures: Policy = "warn"
    gradient: Policy = "warn"
    rounds: Policy = "warn"
    kept: Policy = "warn"
    hacking: Policy = "warn"


class TrainRecipe(Section):
    """The loop. ``batch`` is the number of pairs of one optimiser step over all processes and micro-batches.

    ``period``: steps after which a linear or cosine schedule starts again; null: it spans the run."""

    steps: Positive = 1000
    batch: Positive = 16
    micro_batch: Positive | None = None
    lr: Annotated[float, Field(gt=0)] = 1e-5
    role_lr: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    period: Positive | None = None
    warmup: Annotated[int, Field(ge=0)] = 0
    optimizer: Literal["adamw", "adafactor", "adamw8bit"] = "adamw"
    betas: tuple[Momentum, Momentum] = (0.9, 0.999)
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 1e-2
    max_grad_norm: Annotated[float, Field(gt=0)] | None = 1.0
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    seed: Annotated[int, Field(ge=0)] = 0
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    log_every: Positive = 10
    save_every: Positive = 500
    keep: Positive = 2
    max_nonfinite: Positive = 10
    guards: GuardsRecipe = Field(default_factory=GuardsRecipe)
    deterministic: bool = False
    parallel: Literal["ddp", "fsdp"] = "ddp"


class ValidateRecipe(Section):
    """Held-out pairs with fixed (t, noise), and sample grids from fixed prompts and seeds."""

    every: Positive = 100
    pairs: Annotated[int, Field(ge=0)] = 64
    draws: Positive = 4
    prompts: list[str] | str | None = None
    images: Positive = 8
    per_prompt: Positive = 2
    steps: Positive = 20
    guidance: Annotated[float, Field(ge=0)] = 7.5
    seed: Annotated[int, Field(ge=0)] = 1234
    keep_best: bool = True


class OutputRecipe(Section):
    """The run's folder and who is told about it."""

    dir: str = "runs/{name}"
    trackers: list[Literal["tensorboard", "wandb", "trackio"]] | Literal["auto"] = "auto"
    merged: bool = False
    weights: Literal["last", "best"] = "last"


class MethodRecipe(BaseModel):
    """The method's name; its own settings are checked by the Config class that stands beside the method."""

    model_config = ConfigDict(extra="allow")
    name: str


class Recipe(Section):
    """Everything a run does."""

    name: str = "run"
    description: str = ""
    model: ModelRecipe
    method: MethodRecipe
    data: DataRecipe
    train: TrainRecipe = Field(default_factory=TrainRecipe)
    validate_: ValidateRecipe = Field(default_factory=ValidateRecipe, alias="validate")
    output: OutputRecipe = Field(default_factory=OutputRecipe)

    model_config = ConfigDict(populate_by_name=True)  # the rest as in every section

    @model_validator(mode="after")
    def _divides(self) -> Recipe:
        micro = self.train.micro_batch
        if micro is not None and micro > self.train.batch:
            raise ValueError(f"train.micro_batch {micro} is larger than train.batch {self.train.batch}")
        return self

    def output_dir(self) -> Path:
        """The run's folder, with ``{name}`` filled in."""
        return Path(self.output.dir.replace("{name}", self.name.replace("/", "-")))

    def dump(self) -> dict[str, Any]:
        """Plain data, as it stands in a YAML file."""
        return self.model_dump(mode="json", by_alias=True)


def builtin_recipes() -> list[str]:
    """Names of the recipes that ship with the package, such as ``sd15/dpo``."""
    root = resources.files("diffalign.configs")
    return sorted(
        f"{folder.name}/{file.name[:-5]}"
        for folder in root.iterdir()
        if folder.is_dir() and folder.name not in {"accelerate", "__pycache__"}
        for file in folder.iterdir()
        if file.name.endswith(".yaml")
    )


def read_yaml(source: str) -> DictConfig:
    """The mapping behind a recipe's name or file.

    Raises UserError when there is no such file or recipe, or when it is not a YAML mapping."""
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    if source.endswith((".yaml", ".yml")):
        if not Path(source).is_file():
            raise UserError(f"recipe file '{source}' does not exist; check the path or see `diffalign recipes`")
        text = _read_text(source)
    elif source in builtin_recipes():
        text = resources.files("diffalign.configs").joinpath(f"{source}.yaml").read_text()
    else:
        raise UserError(f"unknown recipe '{source}'{nearest(source, builtin_recipes())}")
    try:
        data = OmegaConf.load(StringIO(text))
    # OSError: a lone scalar; the others: values that YAML's types cannot make, lists in lists without end
    except (YAMLError, OmegaConfBaseException, OSError, *MALFORMED) as error:
        where = " ".join(str(error).split())
        raise UserError(f"recipe '{source}' is not valid YAML: {where[:300]}") from error
    if not isinstance(data, DictConfig):
        raise UserError(f"recipe '{source}' holds no mapping; a recipe has the keys model, method, data, train")
    return data


def _read_text(source: str) -> str:
    try:
        return Path(source).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"recipe file '{source}' cannot be read ({reason}); give a UTF-8 YAML file") from error


def parse_override(text: str) -> DictConfig:
    """``a.b=value`` as a nested mapping; the value is read as YAML (``1e-5`` is a number)."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    key, separator, _ = text.partition("=")
    if not separator or not key.strip(". "):
        raise UserError(f"override '{text}' is not of the form key.sub=value, such as train.steps=200")
    try:
        return OmegaConf.from_dotlist([text])
    except (YAMLError, OmegaConfBaseException, *MALFORMED) as error:
        raise UserError(f"override '{text}': the value is not valid YAML; quote it") from error


def describe_recipe(name: str) -> str:
    """A built-in recipe's description, without reading the rest of it."""
    text = resources.files("diffalign.configs").joinpath(f"{name}.yaml").read_text()
    line = next((row for row in text.splitlines() if row.startswith("description:")), "")
    return line.partition(":")[2].strip()


def data_recipe(path: str, overrides: list[str]) -> DataRecipe:
    """A data section alone, from its path and ``key=value`` texts.

    Raises UserError for an unknown key or a bad value."""
    from omegaconf import OmegaConf

    data: Any = OmegaConf.to_container(OmegaConf.merge({"path": path}, *[parse_override(text) for text in overrides]))
    try:
        return DataRecipe.model_validate(data)
    except ValidationError as error:
        raise explain(error, "the data options", known_keys(DataRecipe)) from error


def known_keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Every dotted key of a recipe section, for hints."""
    keys: list[str] = []
    for name, field in model.model_fields.items():
        key = prefix + (field.alias or name)
        keys.append(key)
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            keys += known_keys(kind, key + ".")
    return keys


def _key(loc: tuple[int | str, ...]) -> str:
    """The dotted key of a fault, without the names that pydantic gives to the members of a union."""
    return ".".join(str(p) for p in loc if isinstance(p, int) or not ("[" in p or p in {"str", "float", "int"}))


def _hint(where: str, keys: list[str]) -> str:
    """The nearest key: one of the same name in another section, else a similar one, else those beside it."""
    parent, _, last = where.rpartition(".")
    for key in keys:
        if key.rpartition(".")[2] == last:
            return f"; did you mean '{key}'?"
    close = nearest(where, keys)
    return close if "did you mean" in close else nearest(where, [k for k in keys if k.rpartition(".")[0] == parent])


def explain(error: ValidationError, source: str, keys: list[str], prefix: str = "") -> UserError:
    """The first fault of a failed validation as one line."""
    faults = error.errors()
    fault, where = faults[0], prefix + _key(faults[0]["loc"])
    others = len({_key(f["loc"]) for f in faults}) - 1
    more = f" ({others} more)" if others else ""
    if fault["type"] == "extra_forbidden":
        return UserError(f"unknown key '{where}' in {source}{_hint(where, keys)}{more}")
    if fault["type"] == "missing" and isinstance(fault["loc"][-1], str):
        return UserError(f"{source} lacks '{where}'; set it, for example {where}=...{more}")
    given = json.dumps(fault.get("input"), default=str)
    message = fault["msg"].removeprefix("Value error, ")
    where = f"'{where}' in {source}" if where else source
    shown = f", got {given}" if len(given) < 80 else ""
    return UserError(f"{where}: {message[0].lower()}{message[1:]}{shown}{more}")


def load_recipe(source: str | Path | Recipe, overrides: list[str] | None = None, **values: Any) -> Recipe:
    """A recipe by built-in name, file or object, with overrides.

    Args:
        source: ``"sd15/dpo"``, a YAML file, or a Recipe.
        overrides: ``["train.steps=200", ...]`` as on the command line.
        values: the same for notebooks: ``train={"steps": 200}``, or a bare field of ``train``, ``method`` or
            ``data`` when exactly one of the sections has it: ``steps=200``.

    Raises:
        UserError: unknown recipe, key, method, or a value of the wrong type or range.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from .methods import method_config

    if isinstance(source, Recipe):
        merged, label = OmegaConf.create(source.dump()), f"recipe '{source.name}'"
    else:
        merged, label = read_yaml(str(source)), f"recipe '{source}'"
        merged.setdefault("name", Path(source).stem if str(source).endswith((".yaml", ".yml")) else str(source))
    changes = [parse_override(text) for text in overrides or []]
    for key, value in values.items():
        nested: Any = value
        for part in reversed(key.split(".") if "." in key else _place(key)):
            nested = {part: nested}
        changes.append(OmegaConf.create(nested))
    try:
        data: Any = OmegaConf.to_container(OmegaConf.merge(merged, *changes), resolve=True)
    except (OmegaConfBaseException, *MALFORMED) as error:
        raise UserError(f"{label} cannot be merged with its overrides: {' '.join(str(error).split())}") from error
    keys = known_keys(Recipe)
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as error:
        raise explain(error, label, keys) from error
    config = method_config(recipe.method.name)
    options = {k: v for k, v in recipe.method.model_dump().items() if k != "name"}
    try:
        settings = config.model_validate(options)
    except ValidationError as error:
        raise explain(error, label, [*("method." + k for k in known_keys(config)), *keys], "method.") from error
    # defaults are written out, so that a later change of one cannot alter what a saved recipe means
    recipe.method = MethodRecipe(name=recipe.method.name, **settings.model_dump(mode="json"))
    return recipe


def _place(key: str) -> list[str]:
    """The section a bare keyword belongs to."""
    if key in Recipe.model_fields or key == "validate":
        return [key]
    homes = [
        name
        for name, section in (("train", TrainRecipe), ("data", DataRecipe), ("model", ModelRecipe))
        if key in section.model_fields
    ]
    if len(homes) == 1:
        return [homes[0], key]
    if homes:
        raise UserError(f"'{key}' is a key of {' and '.join(homes)}; write {homes[0]}={{'{key}': ...}}")
    return ["method", key]
