"""What a step is measured with: recorded U-Net calls, clocks at the seams of the trainer's step, memory."""

from __future__ import annotations

import ctypes
import gc
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..data.batch import Batch
from ..methods.base import Loss
from ..trainer import Slot, Trainer
from .naive import NaiveRoles, NaiveTrainer

PARTS = ("data", "forward", "backward", "optimiser")


@dataclass
class Call:
    """One forward of a U-Net: who called, with what, and whether a graph was built."""

    role: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    graph: bool

    @property
    def rows(self) -> int:
        """Samples in the call."""
        return len(self.args[0])


def record_calls(trainer: Trainer) -> list[Call]:
    """One training step, watched by a hook on every network."""
    roles, calls = trainer.roles, []
    shared = roles.ours if isinstance(roles, NaiveRoles) else roles

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        names = [name for name, network in roles.networks.items() if network is module]
        role = names[0] if len(names) == 1 else shared.current
        calls.append(Call(role, (args[0].detach(), *args[1:]), kwargs, torch.is_grad_enabled()))

    networks = {id(network): network for network in roles.networks.values()}.values()
    handles = [network.register_forward_pre_hook(hook, with_kwargs=True) for network in networks]
    try:
        trainer.train_step()
    finally:
        for handle in handles:
            handle.remove()
    return calls


def replay(naive: NaiveTrainer, calls: Sequence[Call]) -> None:
    """The recorded forwards and a backward for each graph, in plain torch; the reference without adapter layers."""
    roles = naive.roles
    for call in calls:
        roles.activate(call.role)
        with naive.ctx.casting(), torch.set_grad_enabled(call.graph):
            output = roles.networks[call.role](*call.args, **call.kwargs).sample
        if call.graph:
            output.float().square().mean().backward()


# ---- clocks ---------------------------------------------------------------------------------------------------------


class Clock:
    """Seconds of a step by part: ``mark`` books what has passed since the last one. Each waits for the device."""

    def __init__(self, device: torch.device) -> None:
        self.sync: Callable[[], None] = getattr(torch, device.type).synchronize
        self.parts: dict[str, float] = {}
        self.start()

    def start(self) -> None:
        """Begin a step."""
        self.sync()
        self.parts = dict.fromkeys(PARTS, 0.0)
        self.last, self.cpu = time.perf_counter(), time.process_time()

    def mark(self, part: str) -> None:
        """What has run since the last mark belongs to ``part``."""
        self.sync()
        now = time.perf_counter()
        self.parts[part] += now - self.last
        self.last = now

    def stop(self) -> tuple[float, float]:
        """Seconds since ``start`` or the last mark: by the clock, and of this process's processors since ``start``."""
        self.sync()
        return time.perf_counter() - self.last, time.process_time() - self.cpu


@contextmanager
def marked(trainer: Trainer, clock: Clock) -> Iterator[None]:
    """The trainer with marks at the seams of its own step."""
    batches, update, average, loss = trainer.batches, trainer.update, trainer._average, trainer.method.loss
    begun = "forward"

    def marked_batches(draw: int) -> list[Batch]:
        clock.mark("optimiser")
        found = batches(draw)
        clock.mark("data")
        return found

    def marked_update(slot: Slot, parts: list[Batch]) -> None:
        nonlocal begun
        begun = "forward"
        update(slot, parts)
        clock.mark("optimiser")

    def marked_loss(*args: Any) -> Loss:
        nonlocal begun
        clock.mark(begun)
        found: Loss = loss(*args)
        clock.mark("forward")
        begun = "backward"
        return found

    def marked_average(*args: Any) -> None:
        clock.mark("backward")
        average(*args)

    clock.start()
    changes = {"batches": marked_batches, "update": marked_update, "_average": marked_average}
    places: list[tuple[object, str, Any]] = [(trainer, name, function) for name, function in changes.items()]
    places.append((trainer.method, "loss", marked_loss))
    before = [vars(owner).get(name) for owner, name, _ in places]
    for owner, name, function in places:
        setattr(owner, name, function)
    try:
        yield
    finally:
        for (owner, name, _), own in zip(places, before, strict=True):
            delattr(owner, name) if own is None else setattr(owner, name, own)
        clock.mark("optimiser")


# ---- memory ---------------------------------------------------------------------------------------------------------


def held_bytes(networks: Sequence[nn.Module], trainer: Trainer) -> int:
    """Bytes that stay between steps: networks, optimiser states, averages; each tensor once."""
    tensors = [tensor for network in networks for tensor in (*network.parameters(), *network.buffers())]
    for optimizer in trainer.optimizers.values():
        tensors += [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    tensors += [tensor for ema in trainer.ema.values() for tensor in ema.shadow]
    return sum({tensor.data_ptr(): tensor.numel() * tensor.element_size() for tensor in tensors}.values())


def step_bytes(device: torch.device, step: Callable[[], None]) -> dict[str, int]:
    """What a step needs beyond what is there at its start: ``peak``, and on CUDA ``reserved`` by the allocator.

    On the CPU it is the rise of the resident set, with the allocator's free pages given back first where the system can
    (Linux with glibc); elsewhere the rise of the process's high-water mark, which only a first large step moves."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return {
            "peak": torch.cuda.max_memory_allocated() - before,
            "reserved": torch.cuda.max_memory_reserved() - before,
        }
    before = clear_peak()
    step()
    return {"peak": max(0, resident_peak() - before)}


def clear_peak() -> int:
    """The allocator's free pages go back where the system can do that, and the high-water mark of the resident set
    starts anew; returns the bytes that are resident. Elsewhere than on Linux: the mark so far, which stays."""
    gc.collect()
    reset = Path("/proc/self/clear_refs")
    if sys.platform == "linux" and os.access(reset, os.W_OK):
        libc = ctypes.CDLL(None)
        if hasattr(libc, "malloc_trim"):
            libc.malloc_trim(0)
        reset.write_text("5")
        return _resident("VmRSS")
    return resident_peak()


def resident_peak() -> int:
    """The high-water mark of the resident set, in bytes."""
    if sys.platform == "linux" and Path("/proc/self/status").exists():
        return _resident("VmHWM")
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _resident(name: str) -> int:
    """A line of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))
