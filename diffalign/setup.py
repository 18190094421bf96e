"""From a recipe to parts that are ready to use: device, model, cache, method, roles, context, trainer."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, InitProcessGroupKwargs, set_seed
from peft import LoraConfig
from torch import nn

from .console import Console
from .context import Context
from .data.cache import LatentCache, open_cache
from .data.curriculum import check_curriculum, curriculum_of
from .data.files import cache_root
from .data.rowfile import read_rows
from .data.rows import Report
from .data.rowtable import Rows, Stream
from .data.scores import check_scorer, score_rows, within_gap
from .data.source import Source, split_heldout
from .errors import UserError, nearest
from .families import Model, detect, load_model, pick_device, pick_dtype
from .families.quantise import check_quantize
from .methods import make_method
from .methods.base import Method
from .recipe import Recipe, TrainRecipe
from .reference import check_reference, reference_errors
from .rewards import check_rewards, load_rewards
from .roles import BASE, Roles
from .shards import check_parallel, make_mesh
from .start import start_student
from .students import check_students
from .trainer import Trainer, plan_slots


@dataclass
class Parts:
    """A run's parts. ``heldout`` is None where nothing is held out."""

    recipe: Recipe
    accelerator: Accelerator
    model: Model
    method: Method[Any]
    rows: Rows
    cache: LatentCache
    trainer: Trainer
    heldout: Source | None

    @cached_property
    def data_fingerprint(self) -> str:
        """Hash of what is trained on: the rows in order (id, prompt, pictures) and the cache's fingerprint."""
        digest = hashlib.sha256(self.cache.fingerprint.encode())
        self.cache.rows.update_hash(digest)
        return digest.hexdigest()[:16]


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """What computes: ``auto`` is bf16 on a GPU that has it (else fp16), fp32 (None) elsewhere."""
    if precision == "auto":
        return None if device.type != "cuda" else pick_dtype("auto", device)
    return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def start_processes(name: str) -> tuple[Accelerator, torch.device]:
    """The processes of this run and this one's device.

    Raises UserError for a device that is not there and for launch modes that would shard the networks unseen."""
    device = pick_device(name)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Accelerator(mixed_precision="no"), device
    # encoding and hashing can keep one process busy while the others wait
    patience = InitProcessGroupKwargs(timeout=timedelta(hours=6))
    accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision="no", kwargs_handlers=[patience])
    kind = accelerator.distributed_type
    if kind not in (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU):
        raise UserError(
            f"launch mode {kind.value} is not supported; launch plain processes (configs/accelerate), and set "
            "train.parallel=fsdp for shards"
        )
    return accelerator, accelerator.device


def set_determinism(recipe: TrainRecipe) -> None:
    """Bit-exact repeats on CUDA where asked for; TF32 for the fp32 parts otherwise."""
    if recipe.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    elif torch.cuda.is_available():
        torch.set_float32_matmul_precision("high")
    set_seed(recipe.seed % (1 << 32))


def lora_config(model: Model, recipe: Recipe) -> LoraConfig | None:
    """Adapter settings, or None for full copies."""
    if recipe.model.storage == "copies":
        return None
    lora = recipe.model.lora
    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.rank if lora.alpha is None else lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=model.lora_targets(lora.targets),
    )


def load_base(recipe: Recipe, device: torch.device) -> tuple[Model, torch.dtype]:
    """The base model, its U-Net not yet on the device, and the dtype of the frozen U-Net.

    Full copies are made from fp32 weights, before any rounding. Raises UserError for a model that is told its guidance:
    it can be sampled, and is no base."""
    dtype = pick_dtype(recipe.model.dtype, device)
    copies = recipe.model.storage == "copies"
    if detect(recipe.model)[0].unet.get("time_cond_proj_dim"):
        raise UserError(
            f"model '{recipe.model.path}' is guidance-distilled (time_cond_proj_dim); give the model it came from"
        )
    return load_model(recipe.model, device, torch.float32 if copies else dtype, place=False), dtype


def build_modules(method: Method[Any], model: Model, seed: int) -> dict[str, nn.Module]:
    """The method's own modules, their initial values a function of the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return method.build(model)


def check_groups(recipe: Recipe, method: Method[Any], world: int) -> None:
    """Raises UserError when batch or micro-batch would part rows that are compared with one another."""
    if method.group > 1 and recipe.train.batch < world * method.group:
        raise UserError(
            f"train.batch {recipe.train.batch} holds no {method.group} rows to compare for each of {world} processes; "
            f"set it to {world * method.group}"
        )
    for key in ("batch", "micro_batch"):
        size = getattr(recipe.train, key)
        if size is not None and size % method.group:
            raise UserError(
                f"train.{key} {size} is no multiple of the {method.group} rows that method '{recipe.method.name}' "
                f"compares with one another; set it to {math.ceil(size / method.group) * method.group}"
            )


def build_roles(model: Model, method: Method[Any], recipe: Recipe, dtype: torch.dtype) -> Roles:
    """The method's roles on the model's U-Net.

    Raises UserError for settings that do not go with a frozen U-Net, where the method trains parts beside it."""
    modules = {
        name: module.to(model.device) for name, module in build_modules(method, model, recipe.train.seed).items()
    }
    beside = all(role in modules for role in method.roles)
    for found, what in (
        (recipe.model.storage == "copies", "model.storage=copies"),
        (recipe.output.merged, "output.merged=true"),
    ):
        if beside and found:
            mend = "model.storage=adapters" if "storage" in what else "output.merged=false"
            raise UserError(
                f"{what} does not go with method '{recipe.method.name}', which leaves the U-Net as it is; set {mend}"
            )
    roles = Roles(
        model.unet,
        model.call_unet,
        [role for role in method.roles if role not in modules],
        lora_config(model, recipe),
        modules,
        checkpointing=recipe.model.gradient_checkpointing,
        reference=method.needs.reference,
        seed=recipe.train.seed,
    )
    if recipe.model.start is not None:
        start_student(roles, recipe)
    method.begin(roles)
    if recipe.model.storage == "copies" and method.needs.reference:
        roles.networks[BASE].to(dtype)
        if recipe.model.offload and model.device.type != "meta":
            roles.rest()
    return roles


def count_long_prompts(rows: Rows, model: Model) -> tuple[int, int]:
    """(prompts that the text encoder cuts, different prompts)."""
    cut = distinct = 0
    for texts in rows.distinct_prompts():
        cut += sum(n > 0 for n in model.token_overflow(texts))
        distinct += len(texts)
    return cut, distinct


def check_columns(method: Method[Any], name: str, count: int, values: Callable[[str], np.ndarray]) -> None:
    """Raises UserError when one of ``count`` rows has no value in a column that the method needs."""
    for column in method.needs.columns:
        absent = int(np.isnan(values(column)).sum())
        if absent:
            raise UserError(
                f"method '{name}' needs {' and '.join(method.needs.columns)} in every row; {absent} of {count} "
                f"rows have no {column}: write scores into the data with `diffalign pairs score`, or set data.scorer"
            )


def check_rows(method: Method[Any], recipe: Recipe, rows: Rows) -> None:
    """`fit_columns` of rows that are read and not encoded, where ``data.scorer`` is not to give the scores."""
    if recipe.data.scorer is None:
        training, _ = split_heldout(rows.groups, recipe.validate_.pairs, recipe.train.seed)
        absent = np.full(len(rows), math.nan)
        fit_columns(method, recipe, rows, training, lambda n: rows.values(n) if n in rows.columns else absent)


def fit_columns(
    method: Method[Any], recipe: Recipe, rows: Rows, training: np.ndarray, values: Callable[[str], np.ndarray]
) -> None:
    """Shows a method the columns that it needs, those of the training rows; of ranked lists all scores, with NaN where
    a list is shorter.

    Raises UserError when a row has no value in one of them, and when the method cannot learn from them."""
    check_columns(method, recipe.method.name, len(rows), values)
    names = rows.numbers if method.needs.batch == "ranked" else method.needs.columns
    try:
        method.fit({column: torch.from_numpy(values(column)[training]) for column in names})
    except UserError as error:
        raise UserError(f"'{recipe.data.path}': {error}") from error


def rows_for(recipe: Recipe, method: Method[Any]) -> tuple[Rows | Stream, Report]:
    """The rows of a recipe's data. Where ``data.scorer`` gives the scores, ``data.min_gap`` waits for them."""
    check_scorer(recipe.data)
    data = recipe.data.model_copy(update={"min_gap": None}) if recipe.data.scorer else recipe.data
    try:
        return read_rows(data, method.needs.batch)
    except UserError as error:
        reason = method.reason()
        raise UserError(f"{error}; {reason}") if reason else error from None


def apply_scorer(
    cache: LatentCache,
    recipe: Recipe,
    split: tuple[np.ndarray, list[int]],
    device: torch.device,
    say: Callable[[str], None],
    progress: Callable[[int, int], None] | None,
) -> tuple[np.ndarray, list[int]]:
    """Scores by ``data.scorer``, and the (training, held-out) rows whose gap is not below ``data.min_gap``.

    Raises UserError when no row for training is left."""
    score_rows(cache, device.type, say, progress)
    wide = within_gap(cache, recipe.data.min_gap)
    if not wide.all():
        say(f"{int((~wide).sum())} of {len(cache)} rows left out: their score gap is below data.min_gap")
    training, held = split
    if not wide[training].any():
        raise UserError(f"no row's score gap reaches data.min_gap {recipe.data.min_gap:g}; lower it")
    return training[wide[training]], [i for i in held if wide[i]]


def check_texts(method: Method[Any], name: str, rows: Rows) -> str:
    """What to say of rows without the texts that a method needs; "" where all have them.

    Raises UserError when no row has them."""
    said = []
    for text in method.needs.texts:
        if text not in rows.present:
            raise UserError(
                f"method '{name}' needs a caption for each picture and no row has '{text}'; make them with `diffalign "
                "pairs caption`, or set data.perturb=medium"
            )
        absent = sum(batch.column(text).null_count for batch in rows.batches())
        if absent:
            said.append(f"{absent} of {len(rows)} rows have no {text}: the prompt stands for both of their pictures")
    return "; ".join(said)


def check_rates(method: Method[Any], recipe: Recipe) -> None:
    """Raises UserError when a learning rate is given to a role that the method does not have."""
    for role in recipe.train.role_lr:
        if role not in method.roles:
            raise UserError(
                f"train.role_lr names no role of {recipe.method.name}: '{role}'{nearest(role, method.roles)}"
            )


def build(recipe: Recipe, say: Callable[[str], None], progress: Callable[[int, int], None] | None = None) -> Parts:
    """Everything a run needs, with the cache filled and the encoders off the device.

    Raises UserError for anything wrong with the model, the data or the machine."""
    accelerator, device = start_processes(recipe.train.device)
    set_determinism(recipe.train)
    method = make_method_of(recipe)
    remarks = [f"note: {note}" for note in method.notes()]  # said when nothing is refused: a refusal is one line
    check_rewards(method)
    check_rates(method, recipe)
    world = accelerator.num_processes
    check_parallel(recipe, method, world)
    check_quantize(recipe.model.quantize, recipe.model.storage)
    if recipe.train.batch < world:
        raise UserError(f"train.batch {recipe.train.batch} is less than the {world} processes; raise it")
    check_groups(recipe, method, world)
    if recipe.data.reference_errors:
        check_reference(recipe, method)
    with accelerator.main_process_first():  # the others read what the first one found out about the pictures
        rows, report = rows_for(recipe, method)
    if not isinstance(rows, Stream):
        remarks.append(report.summary())
        check_texts(method, recipe.method.name, rows)
        check_curriculum(rows, recipe.data)
        check_rows(method, recipe, rows)
    model, dtype = load_base(recipe, device)
    method.check(model.denoiser())
    check_students(method, recipe, model)
    remarks += [f"note: {note}" for note in method.warnings(model.denoiser())]
    for remark in remarks:
        say(remark)
    cache = open_cache(
        rows,
        model,
        recipe.data,
        cache_root(recipe.data),
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        barrier=accelerator.wait_for_everyone,
        progress=progress,
    )
    if isinstance(rows, Stream):
        say(report.summary())
    bare = check_texts(method, recipe.method.name, cache.rows)
    if bare:
        say(f"note: {bare}")
    cut, distinct = count_long_prompts(cache.rows, model)
    if cut:
        say(f"{cut} of {distinct} prompts are longer than the text encoder takes; they are cut")
    uncond = cache.uncond
    if recipe.data.cache:
        model.release_encoders()
    if recipe.train.parallel == "ddp":
        model.place_unet()
    training, held = split_heldout(cache.rows.groups, recipe.validate_.pairs, recipe.train.seed)
    if recipe.data.scorer:
        training, held = apply_scorer(cache, recipe, (training, held), device, say, progress)
    fit_columns(method, recipe, cache.rows, training, cache.values)  # of a stream, or with scores: known only now
    period = recipe.data.reference_errors
    drawn = recipe.train.batch * (plan_slots(method)[-1].fresh + 1)
    curriculum = curriculum_of(cache, training, recipe.data, drawn)
    source = Source(
        cache, training, recipe.train.seed, uncond, recipe.data.caption_dropout, period, method.group, curriculum
    )
    heldout = Source(cache, held, recipe.train.seed, uncond, group=method.group) if held else None
    method.users = tuple(cache.rows.users)
    if method.needs.counts:
        method.counts = cache.rows.prompt_counts()
    roles = build_roles(model, method, recipe, dtype)
    if recipe.data.cache:
        model.release_encoders()  # a method may have asked them
    if method.needs.decode:
        model.keep_vae(recipe.model.gradient_checkpointing)
    if recipe.train.parallel == "fsdp":  # from the processor's memory to the devices, block by block
        roles.shard(make_mesh(device, world))
    texts = [text for part in cache.rows.distinct_prompts() for text in part] if method.needs.reward else ()
    ctx = Context(
        roles,
        model.denoiser(),
        recipe.train.seed,
        device,
        uncond.to(device),
        autocast_dtype(recipe.train.precision, device),
        load_rewards(method, device, autocast_dtype(recipe.train.precision, device), texts),
        model.decode_with_gradient if method.needs.decode else None,
        latent_shape=(model.vae.config.latent_channels, *model.latent_size(cache.resolution, cache.resolution)),
    )
    if recipe.model.compile:
        from .families import compile_unet

        for network in {id(n): n for n in ctx.roles.networks.values()}.values():
            compile_unet(network)
    if type(method).prepare is not Method.prepare:
        made_by = {"method": recipe.method.name, "settings": method.config.model_dump_json(), **model.fingerprint()}
        made_by["compute"] = f"{ctx.autocast} over {recipe.model.dtype}, quantize {recipe.model.quantize}"
        cache.extend(made_by, lambda batch: method.prepare(ctx, batch.to(device)), recipe.data.encode_batch)
    if period:
        schedule = json.dumps(model.scheduler_config, sort_keys=True, default=str)
        by = {**model.fingerprint(), "schedule": schedule}
        source.reference = reference_errors(check_reference(recipe, method), ctx, source, recipe, by)
    trainer = Trainer(method, ctx, source, recipe.train, accelerator)
    return Parts(recipe, accelerator, model, method, cache.rows, cache, trainer, heldout)


def fill_cache(recipe: Recipe, out: Path | None, progress: bool = True) -> LatentCache:
    """Encode a recipe's rows ahead of time: into the shared cache, ``data.cache_dir``, or ``out``, a folder of its own.

    Raises UserError as ``build`` does."""
    accelerator, device = start_processes(recipe.train.device)
    console = Console(progress and accelerator.is_main_process)
    with accelerator.main_process_first():
        rows, report = rows_for(recipe, make_method_of(recipe))
    if not isinstance(rows, Stream):
        console.say(report.summary())
    model, _ = load_base(recipe, device)
    cache = open_cache(
        rows,
        model,
        recipe.data,
        out or cache_root(recipe.data),
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        barrier=accelerator.wait_for_everyone,
        progress=console.counting("encoding"),
        flat=out is not None,
    )
    if isinstance(rows, Stream):
        console.say(report.summary())
    score_rows(cache, device.type, console.say, console.counting("scoring"))
    return cache


def make_method_of(recipe: Recipe) -> Method[Any]:
    """The recipe's method with its settings."""
    return make_method(recipe.method.name, {k: v for k, v in recipe.method.model_dump().items() if k != "name"})


# settings that may differ between a checkpoint and the run that continues from it
FREE = (
    "name",
    "description",
    "output",
    "validate",
    *(f"train.{key}" for key in ("steps", "micro_batch", "device", "parallel", "log_every", "save_every", "keep")),
    *(f"train.{key}" for key in ("max_nonfinite", "guards")),
    *(f"data.{key}" for key in ("cache_dir", "encode_batch", "streaming")),
    *(f"model.{key}" for key in ("attention", "compile", "gradient_checkpointing", "offload")),
)
BOUND = ("validate.pairs",)  # decides which rows are trained on


def flat(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys and leaves of a nested mapping."""
    out: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, dict):
            out |= flat(value, f"{prefix}{key}.")
        else:
            out[prefix + key] = value
    return out


def check_same_recipe(now: Recipe, then: dict[str, Any], where: Path) -> None:
    """Raises UserError, naming the first key, when a checkpoint comes from a recipe that trains something else."""
    new, old = flat(now.dump()), flat(then)
    for key in sorted(new.keys() | old.keys()):
        free = key not in BOUND and any(key == name or key.startswith(name + ".") for name in FREE)
        if key == "train.steps" and now.train.schedule != "constant":
            free = False
        if not free and new.get(key) != old.get(key):
            shown = f"{key} was {json.dumps(old.get(key))}, now {json.dumps(new.get(key))}"
            raise UserError(
                f"checkpoint {where} is of another recipe: {shown}; set it back, or start afresh in another output.dir"
            )
