"""The unit of budgets: U-Net work, counted for real.

One unit is one picture through the U-Net forward; a backward pass through that call counts two more, whichever
gradients it makes. A call that is recomputed in the backward pass (checkpoints) counts again, as it costs again.
Encoders, scorers and the VAE are not in it: they show in the seconds.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ..trainer import Trainer
from .probes import clear_peak, resident_peak

BACKWARD = 2  # units of a backward pass, beside 1 of its forward


@dataclass
class Spent:
    """What a trainer's steps spend, each ``Counter`` by role: forward calls, pictures in them, and pictures that a
    gradient came back through. ``seconds`` are of the steps alone, ``cpu`` this process's processor seconds in them,
    which other programs do not disturb; ``peak`` is the largest resident set since the first step began, in bytes."""

    trainer: Trainer
    calls: Counter[str] = field(default_factory=Counter)
    forward: Counter[str] = field(default_factory=Counter)
    backward: Counter[str] = field(default_factory=Counter)
    steps: int = 0
    seconds: float = 0.0
    cpu: float = 0.0
    running: bool = False
    role: str = ""  # of the call under way

    def __post_init__(self) -> None:
        roles, step = self.trainer.roles, self.trainer.train_step
        for network in {id(n): n for n in roles.networks.values()}.values():
            network.register_forward_pre_hook(self._called)
            # its output lies on every path from features or predictions back to what is trained
            (getattr(network, "mid_block", None) or network).register_forward_hook(self._passed)

        def timed() -> None:
            if not self.steps:
                clear_peak()
            self.running, began, worked = True, time.perf_counter(), time.process_time()
            step()
            self.seconds += time.perf_counter() - began
            self.cpu += time.process_time() - worked
            self.running = False
            self.steps += 1

        self.trainer.train_step = timed  # type: ignore[method-assign]

    def _role(self, module: nn.Module) -> str:
        roles = self.trainer.roles
        names = [name for name, network in roles.networks.items() if network is module]
        return names[0] if len(names) == 1 else roles.current

    def _called(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if self.running:
            self.role = self._role(module)
            self.calls[self.role] += 1
            self.forward[self.role] += len(args[0])

    def _passed(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        found = output[0] if isinstance(output, tuple) else output
        if self.running and isinstance(found, Tensor) and found.requires_grad:
            role, rows = self.role, len(found)

            def back(gradient: Tensor) -> None:
                self.backward[role] += rows

            found.register_hook(back)

    @property
    def units(self) -> int:
        """All units so far."""
        return sum(self.forward.values()) + BACKWARD * sum(self.backward.values())

    @property
    def peak(self) -> int:
        """Bytes, see the class."""
        return resident_peak()

    def per_step(self) -> dict[str, dict[str, float]]:
        """By role: forward calls a step, pictures forward and pictures backward."""
        named = {"calls": self.calls, "forward": self.forward, "backward": self.backward}
        return {
            role: {name: round(counter[role] / max(1, self.steps), 2) for name, counter in named.items()}
            for role in sorted(self.calls)
        }
