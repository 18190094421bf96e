"""``train --plan``: phases, roles, parameters, steps, disk, and a memory estimate, before anything is trained."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from .data.cache import cache_plan
from .data.files import cache_root
from .families import pick_device
from .recipe import Recipe
from .setup import autocast_dtype, build_roles, load_base, make_method_of, read_rows
from .trainer import plan_slots

if TYPE_CHECKING:
    from rich.console import Console

OPTIMIZER_BYTES = {"adamw": 8, "adamw8bit": 2, "adafactor": 0}  # a parameter; Adafactor keeps rows and columns only


@dataclass
class Plan:
    """What a recipe would do. Bytes are of one process; ``memory_estimate`` leaves activations out and says so."""

    name: str
    method: str
    phases: list[dict[str, Any]]
    roles: dict[str, int]
    base_parameters: int
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
    calls_per_step: float
    cache_bytes: int
    cache_missing_bytes: int
    cache_free: int
    checkpoint_bytes: int
    memory_estimate: dict[str, int]
    long_prompts: int

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
        table.add_row("rows", f"{self.data}; {self.long_prompts} prompts are cut by the text encoder")
        table.add_row("steps", f"{self.steps} of {self.batch} rows = {self.epochs:.2f} epochs")
        table.add_row("micro-batches", f"{self.accumulation} of {self.micro_batch} on this process")
        table.add_row("learning rate", self.lr)
        table.add_row("compute", f"{self.device}, {self.precision}")
        table.add_row("U-Net", f"{self.calls_per_step:g} forward images a step")
        table.add_row("cache", f"{size(self.cache_bytes)} ({size(self.cache_missing_bytes)} to write)")
        table.add_row("free disk", size(self.cache_free))
        table.add_row("checkpoint", size(self.checkpoint_bytes))
        for part, count in self.memory_estimate.items():
            table.add_row(f"memory: {part}", size(count))
        table.add_row("memory: activations", "not estimated; grow with micro_batch and resolution")
        console.print(table)


def size(count: int) -> str:
    """Bytes for people."""
    number = float(count)
    for unit in ("B", "KB", "MB", "GB"):
        if number < 1000 or unit == "GB":
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} TB"


def make_plan(recipe: Recipe, world: int = 1) -> Plan:
    """Load the model and the rows' index, count, and train nothing.

    Raises UserError for anything that training would refuse, and when the disk is too small for the cache."""
    method = make_method_of(recipe)
    device = pick_device(recipe.train.device)
    rows, report = read_rows(recipe.data, method.needs.batch)
    model, dtype = load_base(recipe, device)
    long_prompts = sum(n > 0 for n in model.token_overflow([row.prompt for row in rows]))
    disk = cache_plan(rows, model, recipe.data, cache_root(recipe.data))
    if recipe.data.cache:
        disk.check()
    base = sum(p.numel() for p in model.unet.parameters())
    copies = recipe.model.storage == "copies"
    roles = build_roles(model, method, recipe, dtype)
    trained = {role: sum(p.numel() for p in roles.parameters(role)) for role in roles.names}
    total = sum(trained.values())
    ema = 4 * total if recipe.train.ema else 0
    state = OPTIMIZER_BYTES[recipe.train.optimizer] * total
    slots = plan_slots(method)
    batch = recipe.train.batch
    images = 2 * batch if method.needs.batch == "pair" else batch
    calls = images * len(slots) * (2 if method.needs.reference else 1)
    micro = min(recipe.train.micro_batch or batch, batch)
    warmup = f", {recipe.train.warmup} warm-up steps" if recipe.train.warmup else ""
    holds_base = method.needs.reference or not copies
    autocast = autocast_dtype(recipe.train.precision, device)
    return Plan(
        name=recipe.name,
        method=f"{recipe.method.name} (arXiv {method.paper.arxiv})",
        phases=[
            {"name": p.name, "trains": list(p.trains), "repeats": method.repeats(p), "batch": p.batch}
            for p in method.phases
        ],
        roles=trained,
        base_parameters=base,
        data=report.summary(),
        rows=len(rows),
        steps=recipe.train.steps,
        batch=batch,
        micro_batch=micro,
        accumulation=math.ceil(math.ceil(batch / world) / micro),
        epochs=recipe.train.steps * (slots[-1].fresh + 1) * batch / len(rows),
        lr=f"{recipe.train.lr:g}, {recipe.train.schedule}{warmup}; not scaled by batch or processes",
        precision=str(autocast).removeprefix("torch.") if autocast else "float32",
        base_dtype=str(dtype).removeprefix("torch."),
        device=str(device),
        calls_per_step=calls,
        cache_bytes=disk.bytes,
        cache_missing_bytes=disk.missing_bytes,
        cache_free=disk.free,
        checkpoint_bytes=4 * total + state + ema,
        memory_estimate={
            "base (frozen)": base * dtype.itemsize if holds_base else 0,
            "trained weights, fp32": 4 * total,
            "gradients, fp32": 4 * total,
            "optimiser": state,
            "EMA": ema,
        },
        long_prompts=long_prompts,
    )
