"""This process among those that a launcher (torchrun, accelerate) started to share the work."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Ranks:
    """``barrier`` waits for all; ``total`` adds a number up over all. Alone they do nothing."""

    rank: int = 0
    world: int = 1
    barrier: Callable[[], None] = lambda: None
    total: Callable[[int], int] = lambda number: number

    @property
    def main(self) -> bool:
        """Whether this process merges and prints."""
        return self.rank == 0


def join_ranks(device: str = "auto") -> Ranks:
    """Meet the other processes; ``device`` cpu keeps them off the GPUs. Alone without a launcher."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Ranks()
    import torch
    from accelerate import PartialState
    from accelerate.utils import gather_object

    state = PartialState(cpu=device == "cpu" or not torch.cuda.is_available())
    return Ranks(state.process_index, state.num_processes, state.wait_for_everyone, lambda n: sum(gather_object([n])))
