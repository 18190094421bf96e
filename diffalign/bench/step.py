"""What one training step costs (``diffalign bench step``): the loop as it is, the same step done naively, and the bare
U-Net calls of a step. The three take turns in one process on the same rows, so that ratios mean something on a busy
machine too.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import UserError, nearest
from ..families.random_sd1 import write_random_pairs, write_random_sd1
from ..recipe import Recipe
from ..setup import Parts, build
from ..trainer import Trainer
from .naive import NaiveTrainer, make_naive
from .probes import PARTS, Call, Clock, held_bytes, marked, record_calls, replay, step_bytes

if TYPE_CHECKING:
    from rich.console import Console

# name -> (divisor of SD1.5's widths, side of the latents)
UNETS = {"random-3m": (16, 8), "random-50m": (4, 16), "sd15-random": (1, 64)}
WARMUP = 2


@dataclass
class Ratio:
    """Median and quartiles over the rounds."""

    median: float
    low: float
    high: float

    @staticmethod
    def of(over: Sequence[float], under: Sequence[float], minus: float = 0) -> Ratio:
        """Of each round's own pair of numbers."""
        ratios = [a / b - minus for a, b in zip(over, under, strict=True)]
        low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
        return Ratio(round(median, 4), round(low, 4), round(high, 4))


@dataclass
class Side:
    """One way to do the step. ``calls``: rows of each U-Net call by role. Seconds are medians; ``parts`` are of
    other steps, with a wait for the device at each seam. Memory in bytes: ``held`` between steps, ``peak`` in all."""

    calls: dict[str, list[int]]
    parts: dict[str, float] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    rows_per_second: float = 0.0


@dataclass
class StepReport:
    """What ``measure_step`` found. ``speedup`` = naive / ours; ``overhead`` = ours / bare - 1 by the clock, and
    ``overhead_cpu`` by this process's own processor seconds (CPU only), which other programs do not disturb;
    ``optimiser_share`` is the part of ours that is the optimiser's. ``agreement``: largest difference between the two
    ways on one batch, relative to the largest value, of the loss and of each error it is made of."""

    recipe: str
    unet: str
    device: str
    settings: dict[str, Any]
    parameters: dict[str, int]
    ours: Side
    naive: Side
    bare_seconds: float
    speedup: Ratio
    memory_ratio: float
    overhead: Ratio
    overhead_cpu: Ratio | None
    optimiser_share: float
    agreement: dict[str, float]

    def json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    def render(self, console: Console) -> None:
        """A table and the ratios."""
        from rich.table import Table

        table = Table(title=f"one step of {self.recipe} on {self.device}, U-Net {self.unet}")
        for name in ("", "ours", "naive", "bare calls"):
            table.add_column(name, justify="right" if name else "left")
        both = (self.ours, self.naive)
        table.add_row("seconds a step", *(f"{side.seconds:.3f}" for side in both), f"{self.bare_seconds:.3f}")
        for part in PARTS:
            table.add_row(f"  {part}", *(f"{side.parts[part]:.3f}" for side in both), "")
        table.add_row("rows a second", *(f"{side.rows_per_second:.2f}" for side in both), "")
        for role in self.ours.calls:
            shown = [f"{len(side.calls[role])} of {max(side.calls[role])}" for side in both]
            table.add_row(f"U-Net calls, {role}", *shown, "")
        for name in self.ours.memory:
            table.add_row(f"memory, {name} (MiB)", *(f"{side.memory[name] / 2**20:.1f}" for side in both), "")
        console.print(table)
        console.print("weights: " + ", ".join(f"{name} {n / 1e6:.2f} M" for name, n in self.parameters.items()))
        console.print(" ".join(f"{key}={value}" for key, value in self.settings.items()))
        console.print(
            f"naive takes {_shown(self.speedup)} times as long, {self.memory_ratio:.2f} times the memory; "
            f"largest relative difference {max(self.agreement.values()):.1e}"
        )
        cpu = f", by processor time {_percent(self.overhead_cpu)}" if self.overhead_cpu else ""
        share = f"the optimiser is {100 * self.optimiser_share:.1f} % of the step"
        console.print(f"overhead over the bare calls {_percent(self.overhead)}{cpu}; {share}")


def _shown(ratio: Ratio) -> str:
    return f"{ratio.median:.2f} ({ratio.low:.2f} to {ratio.high:.2f})"


def _percent(ratio: Ratio) -> str:
    return f"{100 * ratio.median:.1f} % ({100 * ratio.low:.1f} to {100 * ratio.high:.1f})"


# ---- the measurement ------------------------------------------------------------------------------------------------


def measure_step(recipe: Recipe, steps: int = 20, unet: str = "recipe") -> StepReport:
    """Measure ``steps`` training steps of a recipe after warm-up, beside the naive step and the bare U-Net calls.

    Args:
        recipe: what is trained; everything is written to a temporary folder and removed.
        unet: ``recipe`` takes the recipe's own weights and rows; ``random-50m`` a model of SD1.5's make at a quarter of
            its widths, ``sd15-random`` at full width (2 GB of temporary files), with random weights and pictures.
            Their picture sizes are 128 and 512 unless the recipe says otherwise.

    Raises:
        UserError: an unknown ``unet``, or anything wrong with the recipe's model, data or device.
    """
    if unet != "recipe" and unet not in UNETS:
        raise UserError(f"unknown --unet '{unet}'{nearest(unet, ['recipe', *UNETS])}")
    with tempfile.TemporaryDirectory(prefix="diffalign-bench-") as folder:
        parts = build(bench_recipe(recipe, unet, Path(folder)), lambda text: None)
        naive = make_naive(parts)
        try:
            return measure(parts, naive, steps, unet)
        finally:
            parts.trainer.close()
            naive.close()


def bench_recipe(recipe: Recipe, unet: str, folder: Path) -> Recipe:
    """The recipe on few rows, with its cache and, where asked for, random weights and pictures in ``folder``."""
    recipe = recipe.model_copy(deep=True)
    rows = 2 * recipe.train.batch + 64
    recipe.data.cache_dir = str(folder / "cache")
    recipe.data.max_pairs = min(recipe.data.max_pairs or rows, rows)
    if unet != "recipe":
        divisor, size = UNETS[unet]
        model, data = recipe.model, recipe.data
        model.path, model.revision, model.variant = str(write_random_sd1(folder / "model", divisor, size)), None, None
        model.loras, model.family, data.format, data.split = [], "auto", "auto", "train"
        data.path = str(write_random_pairs(folder / "pairs", min(rows, 128), data.resolution or 8 * size))
    return recipe


def agreement(ours: Trainer, naive: NaiveTrainer) -> dict[str, float]:
    """Largest relative differences on the next step's first micro-batch, without training on it."""
    naive.decode()
    found = []
    for trainer in (ours, naive):
        batch = trainer.batches(trainer.step * trainer.fresh)[0]
        trainer.ctx.phase, trainer.ctx.repeat = trainer.slots[0].phase.name, 0
        with torch.no_grad():
            loss = trainer.method.loss(trainer.ctx, batch, trainer.slots[0].phase)
        found.append({"loss": loss.values} | {k: v for k, v in loss.metrics.items() if k.endswith("_error")})
    one, other = found
    return {k: float((one[k] - other[k]).abs().max() / one[k].abs().max().clamp_min(1e-12)) for k in one}


def take_turns(
    ours: Trainer, naive: NaiveTrainer, calls: Sequence[Call], clock: Clock, steps: int
) -> tuple[list[list[float]], list[list[float]]]:
    """(seconds, processor seconds) of [ours, naive, bare] over ``steps`` steps after warm-up; the order changes."""
    ways: list[Callable[[], None]] = [ours.train_step, naive.train_step, lambda: replay(naive, calls)]
    trained = [parameter for role in ours.roles.names for parameter in ours.roles.parameters(role)]
    spent: list[list[tuple[float, float]]] = [[], [], []]
    for number in range(WARMUP + steps):
        for turn in range(3):
            way = (number + turn) % 3
            naive.decode()
            clock.start()
            ways[way]()
            spent[way].append(clock.stop())
            for parameter in trained:  # the bare calls leave gradients
                parameter.grad = None
    seconds, cpu = ([[pair[k] for pair in way[WARMUP:]] for way in spent] for k in (0, 1))
    return seconds, cpu


def split_step(trainer: Trainer, naive: NaiveTrainer, clock: Clock) -> dict[str, float]:
    """Seconds of one step by part."""
    naive.decode()
    with marked(trainer, clock):
        trainer.train_step()
    return clock.parts


def weigh(side: Side, trainer: Trainer, parts: Parts) -> None:
    """What a way holds between steps and needs in one."""
    roles = trainer.roles
    networks = [*roles.networks.values(), *roles.modules.values()]
    if isinstance(trainer, NaiveTrainer):
        networks += parts.model.encoders()
        trainer.decode()
    held = held_bytes(networks, trainer)
    more = step_bytes(parts.model.device, trainer.train_step)
    side.memory = {"held": held} | {name: held + value for name, value in more.items()}


def measure(parts: Parts, naive: NaiveTrainer, steps: int, unet: str) -> StepReport:
    """Record, compare, then let the three take turns."""
    ours, model, recipe = parts.trainer, parts.model, parts.recipe
    naive.decode()
    recorded = [record_calls(ours), record_calls(naive)]
    calls = recorded[0]
    agrees = agreement(ours, naive)
    clock = Clock(model.device)
    seconds, cpu = take_turns(ours, naive, calls, clock, steps)
    splits = [[split_step(trainer, naive, clock) for trainer in (ours, naive)] for _ in range(max(2, steps // 4))]
    sides = []
    for way, trainer in enumerate((ours, naive)):
        made = recorded[way]
        side = Side({role: [c.rows for c in made if c.role == role] for role in sorted({c.role for c in made})})
        side.seconds = statistics.median(seconds[way])
        side.rows_per_second = ours.fresh * recipe.train.batch / side.seconds
        side.parts = {part: statistics.median(split[way][part] for split in splits) for part in PARTS}
        weigh(side, trainer, parts)
        sides.append(side)
    on_gpu = model.device.type == "cuda"
    return StepReport(
        recipe=recipe.name,
        unet=unet,
        device=torch.cuda.get_device_name() if on_gpu else f"{model.device.type}, {torch.get_num_threads()} threads",
        settings={
            "steps": steps,
            "batch": recipe.train.batch,
            "micro_batch": ours.micro,
            "latents": "x".join(map(str, calls[0].args[0].shape[1:])),
            "storage": recipe.model.storage,
            "precision": str(ours.ctx.autocast or torch.float32).removeprefix("torch."),
            "base": str(model.dtype).removeprefix("torch."),
            "checkpointing": recipe.model.gradient_checkpointing,
        },
        parameters=count_parameters(parts),
        ours=sides[0],
        naive=sides[1],
        bare_seconds=statistics.median(seconds[2]),
        speedup=Ratio.of(seconds[1], seconds[0]),
        memory_ratio=round(sides[1].memory["peak"] / sides[0].memory["peak"], 3),
        overhead=Ratio.of(seconds[0], seconds[2], minus=1),
        overhead_cpu=None if on_gpu else Ratio.of(cpu[0], cpu[2], minus=1),
        optimiser_share=round(sides[0].parts["optimiser"] / sum(sides[0].parts.values()), 4),
        agreement=agrees,
    )


def count_parameters(parts: Parts) -> dict[str, int]:
    """Weights of the model's networks without adapters, and what is trained."""
    model, roles = parts.model, parts.trainer.roles
    networks = {"unet": model.unet, "vae": model.vae, "text_encoder": model.text_encoder}
    counts = {k: sum(p.numel() for n, p in m.named_parameters() if "lora_" not in n) for k, m in networks.items()}
    return counts | {"trained": sum(p.numel() for role in roles.names for p in roles.parameters(role))}
