"""Starts a search by its options."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ...errors import UserError
from . import beam, best_of_n, tree
from .core import Found, Start, Task, World, drive
from .options import Beam, BestOfN, Greedy, SearchOptions, Tree

STARTS: dict[type[SearchOptions], tuple[Start, Callable[[Task, Any], int]]] = {
    BestOfN: (best_of_n.search, best_of_n.least),
    Beam: (beam.search, beam.least),
    Greedy: (beam.greedy, beam.least_greedy),
    Tree: (tree.search, tree.least),
}


def least_calls(world: World, how: SearchOptions) -> int:
    """Calls that a search needs for its first picture."""
    return STARTS[type(how)][1](Task(world, 0, 0), how)


def search(
    world: World,
    how: SearchOptions,
    budget: int,
    batch: int = 8,
    on_calls: Callable[[int], None] = lambda calls: None,
) -> list[Found]:
    """See `core.drive`. Raises UserError for a search that cannot work in this world: steps without noise, a fork that
    never comes, a budget that holds no picture."""
    check(world, how, budget)
    return drive(world, STARTS[type(how)][0], how, budget, batch, on_calls)


def check(world: World, how: SearchOptions, budget: int) -> None:
    """Raises UserError as `search`."""
    steps = len(world.policy)
    if how.noisy and all(world.still(k) for k in range(steps)):
        raise UserError(
            f"search '{how.name}' needs steps that add noise, and these add none (eta 0, one step, or a student's "
            "own sampler): all children of a sample would be the same; take best-of-n"
        )
    start = getattr(how, "start", 0)
    if start >= steps - 1 > 0:
        raise UserError(
            f"search '{how.name}': start={start} leaves no step to fork at; {steps} steps end at {steps - 1}"
        )
    needed = least_calls(world, how)
    if budget < needed:
        first = "one pass" if isinstance(how, Beam | Greedy) else "one picture"
        raise UserError(
            f"budget {budget}: '{how.text()}' takes {needed} U-Net calls for {first} at {steps} steps (a guided step "
            "counts two); raise the budget or take fewer steps"
        )
