"""Latent beam search with lookahead (Oshima et al., arXiv 2501.19252), and with one beam SPO's resampling by the best.

A pass takes ``beams`` samples from noise to pictures. Children of a sample share its network output and differ by the
noise of one step; they are judged by what the rest of the way would make of them without noise, and the best go on. A
child's output, which its judgement needs, also makes its next step.

Ours: a pass is followed by another from new noise while the budget holds a whole one, so that a larger budget begins
with what a smaller one does and is never worse; the last step adds no noise.
"""

from __future__ import annotations

from collections.abc import Generator
from itertools import count
from typing import Any

from .core import Judge, Judged, Outputs, Request, Search, States, Task, World
from .options import Beam, Greedy


def forks(world: World, how: Beam, k: int) -> bool:
    """Whether samples have children at step ``k``: every ``every`` steps, where noise is added and a judgement comes
    before the end."""
    here = k >= how.start and (k - how.start) % how.every == 0
    return how.beams * how.children > 1 and here and not world.still(k)


def judges(world: World, how: Beam, k: int) -> bool:
    """Whether siblings are judged on arriving at step ``k``. Not before the last step: it adds no noise, so that what
    would be judged is what is finished."""
    since = k - how.start
    return how.children > 1 and since > 0 and since % how.every == 0 and k < len(world.policy) - 1


def outputs(world: World, how: Beam) -> int:
    """Network outputs of a pass."""
    alive, total = how.beams, 0
    for k in range(len(world.policy)):
        total += alive
        if judges(world, how, k):
            total += alive * (len(way(world, how, k)) - 1)
            alive = how.beams
        if forks(world, how, k):
            alive *= how.children
    return total


def way(world: World, how: Beam, k: int) -> list[int]:
    """The steps of the look ahead from step ``k``: evenly among those that are left, the next one first."""
    left = len(world.policy) - k
    steps = min(how.lookahead, left)
    return [k + i * left // steps for i in range(steps)]


def least(task: Task, how: Beam) -> int:
    """Calls of a pass."""
    return outputs(task.world, how) * task.world.price


def search(task: Task, how: Beam) -> Search:
    """Passes from new noise while the budget holds them."""
    needed = outputs(task.world, how)
    for number in count():
        if not task.affords(needed):
            return
        yield from beam_pass(task, how, range(number * how.beams, (number + 1) * how.beams))


def beam_pass(task: Task, how: Beam, draws: range) -> Search:
    """From first noises number ``draws`` to finished pictures."""
    world, states = task.world, task.start(draws)
    for k in range(len(world.policy)):
        yield Outputs(states)
        if judges(world, how, k):
            ahead = yield from look_ahead(task, how, states)
            rewards = (yield Judge(world.clean(ahead), world.policy.times[ahead.k])).rewards
            best = sorted(range(len(states)), key=lambda i: -rewards[i])[: how.beams]
            states = states.take(sorted(best))
        states = task.step(states.fork(how.children if forks(world, how, k) else 1))
    judged: Judged = yield Judge(states.x)
    task.offer(judged)


def look_ahead(task: Task, how: Beam, states: States) -> Generator[Request, Any, States]:
    """Where noiseless steps lead, before the last of ``lookahead``."""
    world, path = task.world, way(task.world, how, states.k)
    for goal in path[1:]:
        assert states.output is not None
        t, s = (world.times(world.policy.times[k], len(states)) for k in (states.k, goal))
        states = States(world.denoiser.ddim_step(states.output, states.x, t, s).sample, goal, states.names)
        yield Outputs(states)
    return states


def greedy(task: Task, how: Greedy) -> Search:
    """One beam."""
    return search(task, how.beam())


def least_greedy(task: Task, how: Greedy) -> int:
    """Calls of a pass."""
    return least(task, how.beam())
