"""``train --plan``: phases, roles, parameters, steps, disk, memory and time, before anything is trained."""

from __future__ import annotations

import math
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from .data.batch import Cond
from .data.cache import cache_plan
from .data.curriculum import check_curriculum
from .data.files import cache_root
from .data.layout import CachePlan, entry_bytes
from .data.rowtable import Rows, Stream
from .data.store import free_bytes
from .errors import UserError
from .families import Model, ModelFolder, pick_device
from .families.folder import HUB_ID
from .families.guidance import add_embedding
from .families.known import SCHEDULE, Known, known_by, meta_network
from .families.quantise import check_quantize
from .memory import estimate
from .recipe import ModelRecipe, Recipe
from .reference import reference_note
from .rewards import check_rewards
from .setup import (
    autocast_dtype,
    build_roles,
    check_groups,
    check_rates,
    check_rows,
    check_texts,
    count_long_prompts,
    load_base,
    make_method_of,
    rows_for,
)
from .shards import check_parallel
from .simulate import META, CudaLike
from .students import check_students
from .trainer import plan_slots

if TYPE_CHECKING:
    from rich.console import Console

REACHED = 0.4  # share of the rate of large matrix products that a training step reaches (assumed)
ROOM = 0.95  # of a card's memory that a run may fill: a screen and other programs take some


@dataclass
class Plan:
    """What a recipe would do. Bytes are of one process; memory and time are estimates."""

    name: str
    method: str
    phases: list[dict[str, Any]]
    roles: dict[str, int]
    base_parameters: int
    parameters: dict[str, int]
    weights_known: bool
    data: str
    rows: int
    steps: int
    batch: int
    micro_batch: int
    accumulation: int
    epochs: float
    lr: str
    precision: str
    base_dtype: str
    device: str
    calls: dict[str, float]
    calls_per_step: float
    round: str
    cache_bytes: int
    cache_missing_bytes: int
    cache_free: int
    checkpoint_bytes: int
    memory: dict[str, Any]
    card_bytes: int
    fits: bool | None
    flops_per_step: float
    flops_per_second: float
    seconds: float
    long_prompts: int | None
    notes: list[str]

    def json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    def render(self, console: Console) -> None:
        """For a person."""
        from rich.table import Table

        table = Table("what", "value", title=f"{self.name}: {self.method}", show_header=False)
        timeline = " -> ".join(f"{p['name']} x{p['repeats']} (trains {', '.join(p['trains'])})" for p in self.phases)
        table.add_row("one step", timeline)
        for role, count in self.roles.items():
            table.add_row(f"role {role}", f"{count:,} trained parameters")
        table.add_row("base", f"{self.base_parameters:,} parameters in {self.base_dtype}, frozen")
        table.add_row("networks", ", ".join(f"{name} {count:,}" for name, count in self.parameters.items()))
        cut = "" if self.long_prompts is None else f"; {self.long_prompts} prompts are cut by the text encoder"
        table.add_row("rows", self.data + cut)
        table.add_row("steps", f"{self.steps} of {self.batch} rows = {self.epochs:.2f} epochs")
        table.add_row("micro-batches", f"{self.accumulation} of {self.micro_batch} on this process")
        table.add_row("learning rate", self.lr)
        table.add_row("compute", f"{self.device}, {self.precision}")
        by_role = ", ".join(f"{role} {count:g}" for role, count in self.calls.items())
        table.add_row("U-Net", f"{self.calls_per_step:g} forward images a step: {by_role}")
        if self.round:
            table.add_row("a round", self.round)
        table.add_row("cache", f"{size(self.cache_bytes)} ({size(self.cache_missing_bytes)} to write)")
        table.add_row("free disk", size(self.cache_free))
        table.add_row("checkpoint", size(self.checkpoint_bytes))
        for part, count in self.memory["parts"].items():
            table.add_row(f"memory: {part}", size(count))
        for phase, took in self.memory["phases"].items():
            share = f", {took['flops'] / self.flops_per_step:.0%} of a step's work" if self.flops_per_step else ""
            table.add_row(f"memory: activations, {phase}", f"{size(took['activations'])} in a micro-batch{share}")
        for activity, count in self.memory["activities"].items():
            table.add_row(f"peak: {activity}", size(count))
        card = f" of {size(self.card_bytes)}: {'fits' if self.fits else 'DOES NOT FIT'}" if self.card_bytes else ""
        table.add_row("peak of the run", f"{size(self.memory['peak'])}{card} (an estimate)")
        rate = f"{self.flops_per_step:.3g} operations a step at {REACHED * self.flops_per_second:.3g} a second"
        table.add_row(
            "time to train", f"{duration(self.seconds)} ({rate}, {REACHED:.0%} of the measured matrix product)"
        )
        for note in self.notes:
            table.add_row("note", note)
        console.print(table)


def size(count: int) -> str:
    """Bytes for people."""
    number = float(count)
    for unit in ("B", "KB", "MB", "GB"):
        if number < 1000 or unit == "GB":
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} TB"


def duration(seconds: float) -> str:
    """Seconds for people."""
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} seconds"


def make_plan(recipe: Recipe, world: int = 1, card: int = 0) -> Plan:
    """Read the model and the rows' index, count and simulate, and train nothing.

    A model that is not on this machine is planned from the known configs of its family; nothing is downloaded.

    Args:
        card: bytes of the GPU that is planned for; 0 takes the one that is here, if any. With a card the plan is for
            CUDA and bf16 whatever this machine has.

    Raises UserError for anything that training would refuse, and when the disk is too small for the cache."""
    method = make_method_of(recipe)
    device = torch.device("cuda") if card else pick_device(recipe.train.device)
    notes = check_plan(recipe)
    check_rates(method, recipe)
    found, report = rows_for(recipe, method)
    rows = found.gather() if isinstance(found, Stream) else found
    check_curriculum(rows, recipe.data)
    check_rows(method, recipe, rows)
    bare = check_texts(method, recipe.method.name, rows)
    notes += [bare] if bare else []
    known = None if is_here(recipe.model) else known_by(recipe.model.path, recipe.model.family)
    long_prompts = None
    if known is None:
        plain = recipe.model_copy(update={"model": recipe.model.model_copy(update={"quantize": "none"})})
        real, _ = load_base(plain, pick_device("cpu"))
        long_prompts = count_long_prompts(rows, real)[0]
        disk = cache_plan(rows, real, recipe.data, cache_root(recipe.data))
        model = meta_model(real)
    else:
        model = known_model(known, recipe.model.path, recipe.model.long_prompts)
        if recipe.model.guidance_embedding:
            add_embedding(model.unet, recipe.model.guidance_embedding)
        disk = known_cache(rows, model, recipe)
        notes.append(f"the weights of '{recipe.model.path}' are not on this machine: counted from the known configs")
    if recipe.data.cache:
        disk.check()
    if recipe.data.reference_errors:
        notes.append(reference_note(recipe, method, len(rows)))
    dtype = planned_dtype(recipe, device, bool(card))
    autocast = (
        torch.bfloat16 if card and recipe.train.precision == "auto" else autocast_dtype(recipe.train.precision, device)
    )
    method.check(model.denoiser())
    check_students(method, recipe, model)
    notes += method.notes() + method.warnings(model.denoiser())
    if method.needs.decode:
        model.keep_vae(recipe.model.gradient_checkpointing)
    networks = {"unet": model.unet, **dict(zip(encoder_names(model), model.encoders(), strict=True))}
    parameters = {name: sum(p.numel() for p in network.parameters()) for name, network in networks.items()}
    check_groups(recipe, method, world)
    method.users = tuple(rows.users)
    with torch.device(META):
        roles = build_roles(model, method, recipe, dtype)
    memory = estimate(model, method, roles, recipe, dtype, autocast, world, device.type == "cuda", len(rows.sides))
    if recipe.data.scorer:
        notes.append(f"scores by {recipe.data.scorer} come first: {len(rows):,} rows, their time is not counted")
    if method.needs.reward:
        notes.append(f"what the reward {', '.join(check_rewards(method))} takes of the memory is not counted")
    if not memory.whole:
        notes.append(f"activations are of one trained and one reference call: {recipe.method.name} looks at numbers")
    trained = {role: sum(p.numel() for p in roles.parameters(role)) for role in roles.names}
    slots = plan_slots(method)
    batch, share = recipe.train.batch, math.ceil(recipe.train.batch / world)
    micro = min(recipe.train.micro_batch or share, share)
    here = torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() and not card else card
    rate = matmul_rate(pick_device(recipe.train.device), autocast)
    if card and not torch.cuda.is_available():
        notes.append("the time is this machine's processor's, not the card's")
    states = sum(count for part, count in memory.parts.items() if "gradients" not in part and "base" not in part)
    return Plan(
        name=recipe.name,
        method=recipe.method.name + (f" (arXiv {method.paper.arxiv})" if method.paper.arxiv else ""),
        phases=[
            {"name": p.name, "trains": list(p.trains), "repeats": method.repeats(p), "batch": p.batch}
            for p in method.phases
        ],
        roles=trained,
        base_parameters=parameters["unet"],
        parameters=parameters,
        weights_known=known is None,
        data=report.summary(),
        rows=len(rows),
        steps=recipe.train.steps,
        batch=batch,
        micro_batch=micro,
        accumulation=math.ceil(share / micro),
        epochs=recipe.train.steps * (slots[-1].fresh + 1) * batch / len(rows),
        lr=lr_text(recipe),
        precision=str(autocast).removeprefix("torch.") if autocast else "float32",
        base_dtype=quantised_name(recipe, dtype),
        device=f"a card of {size(card)}" if card else str(device),
        calls={role: count * batch / share for role, count in memory.calls.items()},
        calls_per_step=sum(memory.calls.values()) * batch / share,
        round=memory.round.summary() if memory.round else "",
        cache_bytes=disk.bytes,
        cache_missing_bytes=disk.missing_bytes,
        cache_free=disk.free,
        checkpoint_bytes=states * (world if recipe.train.parallel == "fsdp" else 1),
        memory=memory.json(),
        card_bytes=here,
        fits=memory.peak <= ROOM * here if here else None,
        flops_per_step=memory.flops,
        flops_per_second=rate,
        seconds=recipe.train.steps * memory.flops / (REACHED * rate),
        long_prompts=long_prompts,
        notes=notes,
    )


def check_plan(recipe: Recipe) -> list[str]:
    """What training would refuse is refused; what only lacks on this machine is noted."""
    notes = []
    if recipe.model.quantize != "none":
        if find_spec("bitsandbytes") is None and recipe.model.storage != "copies":
            notes.append(
                "model.quantize needs bitsandbytes, which is not installed here: pip install 'diffalign[8bit]'"
            )
        else:
            check_quantize(recipe.model.quantize, recipe.model.storage)
    if recipe.train.optimizer == "adamw8bit" and find_spec("bitsandbytes") is None:
        notes.append("train.optimizer=adamw8bit needs bitsandbytes, which is not installed here")
    if recipe.train.parallel == "fsdp":
        check_parallel(recipe, make_method_of(recipe))
    return notes


def planned_dtype(recipe: Recipe, device: torch.device, elsewhere: bool) -> torch.dtype:
    """The number format of the frozen base; on a card that is not here ``auto`` is bf16."""
    from .families import pick_dtype

    return torch.bfloat16 if elsewhere and recipe.model.dtype == "auto" else pick_dtype(recipe.model.dtype, device)


def lr_text(recipe: Recipe) -> str:
    """The learning rate in words."""
    warmup = f", {recipe.train.warmup} warm-up steps" if recipe.train.warmup else ""
    return f"{recipe.train.lr:g}, {recipe.train.schedule}{warmup}; not scaled by batch or processes"


def quantised_name(recipe: Recipe, dtype: torch.dtype) -> str:
    """The base's number format in words."""
    name = str(dtype).removeprefix("torch.")
    return name if recipe.model.quantize == "none" else f"{recipe.model.quantize} (linear layers) and {name}"


def is_here(model: ModelRecipe) -> bool:
    """Whether a model is on this machine: a folder, a file, a built-in name, or a hub id in the local cache."""
    path = model.path
    if Path(path).expanduser().exists() or not HUB_ID.match(path) or Path(path).parent.is_dir():
        return True
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(path, "model_index.json", revision=model.revision)
    if isinstance(found, str):
        return True
    if known_by(path, model.family) is None:
        raise UserError(
            f"model '{path}' is not on this machine and --plan downloads nothing; set model.family=sd1, sd2 or sdxl to "
            "plan it from the family's configs"
        )
    return False


def encoder_names(model: Model) -> list[str]:
    """Names of ``Model.encoders``."""
    return ["vae", "text_encoder", "text_encoder_2"][: len(model.encoders())]


class MetaModel(Model):
    """A model without weights: what a plan asks of one. ``text``: conditioning of the shape that its encoders give."""

    family = "meta"

    def __init__(
        self, folder: ModelFolder, unet: nn.Module, encoders: tuple[nn.Module, ...], text: Cond | None = None
    ) -> None:
        self.folder, self.source, self._uncond = folder, folder.source, text
        self.unet, self.vae = unet.requires_grad_(False).eval(), encoders[0]
        self.scheduler_config = dict(folder.scheduler)
        self.device, self.dtype, self._encoders = META, torch.float32, encoders

    def encoders(self) -> tuple[nn.Module, ...]:
        """VAE first, then the text encoders."""
        return self._encoders

    def decode_with_gradient(self, latents: Tensor) -> Tensor:
        """As of any model, with the attention that a GPU has."""
        with CudaLike(None):
            images: Tensor = self.vae.decode(latents).sample
        return (images / 2 + 0.5).clamp(0, 1)

    def keep_vae(self, checkpointing: bool = False) -> None:
        """With ``checkpointing`` its decoder recomputes in the backward pass."""

        def run(module: nn.Module, *args: Any) -> Any:
            def contexts() -> tuple[Any, Any]:
                return nullcontext(), CudaLike(None)

            return torch.utils.checkpoint.checkpoint(module.__call__, *args, use_reentrant=False, context_fn=contexts)

        if checkpointing:
            self.vae.enable_gradient_checkpointing(run)


def meta_model(model: Model) -> MetaModel:
    """The same networks without memory."""
    with torch.device(META):
        unet, vae = (type(part).from_config(part.config) for part in (model.unet, model.vae))
        texts = [type(part)(part.config) for part in model.encoders()[1:]]
    return MetaModel(model.folder, unet, (vae, *texts))


def known_model(known: Known, source: str, tokens: int | None = None) -> MetaModel:
    """A family's base model from its known configs; ``tokens``: its places of text, where they are not its own."""
    schedule = SCHEDULE | {"prediction_type": known.prediction}
    folder = ModelFolder(source, Path(source), {}, known.unet, schedule)
    names = [name for name in known.networks if name != "unet"]
    added = {"text_embeds": torch.zeros(1, known.pooled)} if known.pooled else {}
    text = Cond(torch.zeros(1, tokens or known.tokens, known.unet["cross_attention_dim"]), added)
    return MetaModel(folder, meta_network(known), tuple(meta_network(known, name) for name in names), text)


def known_cache(rows: Rows, model: Model, recipe: Recipe) -> CachePlan:
    """What the cache of these rows takes, by shapes; nothing of it is there yet."""
    root = cache_root(recipe.data)
    pictures = sum(len(row.images) for row in rows) * (2 if recipe.data.flip else 1)
    prompts = len({text for row in rows for text in row.prompts.values()}) + 2
    picture, prompt = entry_bytes(model, recipe.data)
    count = pictures * picture + prompts * prompt
    return CachePlan(root, pictures, prompts, count, count, free_bytes(root))


def matmul_rate(device: torch.device, dtype: torch.dtype | None, seconds: float = 0.2) -> float:
    """Floating-point operations a second of large matrix products on this device, measured."""
    side = 4096 if device.type == "cuda" else 512
    a = torch.randn(side, side, device=device, dtype=dtype if device.type == "cuda" else None)
    rounds, spent = 1, 0.0
    while spent < seconds:  # the first rounds warm up
        rounds *= 2
        started = time.perf_counter()
        for _ in range(rounds):
            torch.mm(a, a)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        spent = time.perf_counter() - started
    return 2.0 * side**3 * rounds / spent
