"""Diffusion Tree Sampling and Search (Jain et al., arXiv 2506.20701): pictures that share their early steps.

A node is a sample before a step; the root stands for the choice of the first noise. Each round walks down from the root
by the values of the children, adds a child where a node may have one more, goes on from it to a finished picture whose
states all join the tree, and hands its reward up: the value of a node is the soft maximum
T log mean_children exp(value / T), T the temperature, and a finished picture's is its reward. Values of noisy samples
are thus learned from finished pictures alone. A node's network output is kept, so that a branch costs the steps below
it only.

``sample`` (DTS) takes children in proportion to exp(value / T); with ever more rounds pictures drawn so have the
model's distribution times exp(reward / T). ``search`` (DTS*) takes the child of the highest value plus UCT's bonus.

Ours, since no code of the authors could be read: how many children a node may have (progressive widening by its
visits, and by one more where a small tree has been walked in vain for long), the bonus in units of the spread of the
rewards so far, which is also what the temperature of a search is measured by unless it is given, and that nothing
branches at the last step, which adds no noise.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ...keyed import generator
from .core import Found, Judge, Judged, Outputs, Request, Search, States, Task
from .options import Tree

STALL = 100  # walks in a row that only see finished pictures again: then every node may have one more child


@dataclass(eq=False)
class Node:
    """One sample before its step, or a finished one, which has a ``reward``; the root has no sample."""

    states: States | None = None
    children: list[Node] = field(default_factory=list)
    visits: int = 0
    value: float = 0.0
    reward: float | None = None


def soft_value(values: Sequence[float], temperature: float) -> float:
    """T log mean exp(values / T): between their mean (T to infinity) and their maximum (T to 0)."""
    top = max(values)
    if temperature <= 0:
        return top
    return top + temperature * math.log(sum(math.exp((v - top) / temperature) for v in values) / len(values))


def shares(values: Sequence[float], temperature: float) -> np.ndarray:
    """In proportion to exp(values / T), summing to 1: (N,) fp64."""
    scaled = np.asarray(values, np.float64) / temperature
    found = np.exp(scaled - scaled.max())
    return found / found.sum()


def least(task: Task, how: Tree) -> int:
    """Calls of the first picture."""
    return task.world.price * len(task.world.policy)


def search(task: Task, how: Tree) -> Search:
    """Rounds while the budget holds the next one; a larger budget begins with the same ones."""
    root = yield from grow(task, how)
    if how.mode == "sample":
        yield from sampled(task, how, root)


def grow(task: Task, how: Tree) -> Generator[Request, Any, Node]:
    """The tree that the budget holds."""
    root, rewards, idle = Node(), [], 0  # type: Node, list[float], int
    while True:
        spread = float(np.std(rewards)) if rewards else 0.0
        temperature = spread / 2 if how.temperature is None else how.temperature
        path = descend(task, how, root, temperature, spread, idle // STALL)
        node, idle = path[-1], idle + 1
        if node.reward is None:
            idle = 0
            steps = len(task.world.policy)
            if not task.affords(steps - (0 if node.states is None else node.states.k + 1)):
                return root
            branch = yield from roll_out(task, node)
            path += branch
            rewards.append(path[-1].value)
        back_up(path, temperature, whole=how.temperature is None)


def descend(task: Task, how: Tree, root: Node, temperature: float, spread: float, more: int = 0) -> list[Node]:
    """From the root to a node that gets a child, or to a finished picture, which is only visited again."""
    path, node = [root], root
    while node.reward is None and len(node.children) >= room(task, how, node, more):
        values = [child.value for child in node.children]
        if how.mode == "sample":
            rng = generator(*task.key("search-tree"), root.visits, len(path))
            chosen = int(rng.choice(len(values), p=shares(values, temperature)))
        else:
            bonus = how.exploration * spread
            total = math.log(1 + node.visits)
            ranks = [c.value + bonus * math.sqrt(total / c.visits) for c in node.children]
            chosen = int(np.argmax(ranks))
        node = node.children[chosen]
        path.append(node)
    return path


def room(task: Task, how: Tree, node: Node, more: int = 0) -> int:
    """How many children a node may have: ``more`` than its visits allow, where it branches at all."""
    if node.states is not None and task.world.still(node.states.k):
        return 1
    return max(1, math.ceil(how.widening * node.visits**how.growth)) + more


def roll_out(task: Task, node: Node) -> Generator[Request, Any, list[Node]]:
    """A new child of ``node`` and everything below it, down to a finished picture, whose reward is its value."""
    found: list[Node] = []
    while True:
        place = len(node.children)
        states = task.start([place]) if node.states is None else task.step(named(node.states, place))
        child = Node(states)
        node.children.append(child)
        found.append(child)
        node = child
        if states.k == len(task.world.policy):
            break
        yield Outputs(states)
    judged: Judged = yield Judge(states.x)
    task.offer(judged)
    node.reward = node.value = judged.rewards[0]
    return found


def named(states: States, place: int) -> States:
    """The same sample under the name of its child number ``place``."""
    return States(states.x, states.k, [f"{states.names[0]}.{place}"], states.output)


def back_up(path: Sequence[Node], temperature: float, whole: bool) -> None:
    """Counts the visit and renews the values on the path; of the ``whole`` tree where the temperature has changed."""
    for node in path:
        node.visits += 1
    for node in every(path[0]) if whole else reversed(path):
        if node.reward is None:
            node.value = soft_value([child.value for child in node.children], temperature)


def every(root: Node) -> list[Node]:
    """All nodes, children before their parents."""
    found = [root]
    for node in found:
        found += node.children
    return found[::-1]


def leaves(root: Node, temperature: float) -> list[tuple[Node, float]]:
    """Finished pictures and the chances that a walk down in proportion to exp(value / T) ends on them; they sum to
    1."""
    found: list[tuple[Node, float]] = []
    inside = [(root, 1.0)]
    while inside:
        node, chance = inside.pop()
        if node.reward is not None:
            found.append((node, chance))
        elif node.children:
            share = shares([child.value for child in node.children], temperature)
            inside += [(child, chance * float(p)) for child, p in zip(node.children, share, strict=True)]
    return found


def sampled(task: Task, how: Tree, root: Node) -> Search:
    """One picture drawn from the tree in the place of the best; it is decoded and scored once more."""
    assert how.temperature is not None
    ends = leaves(root, how.temperature)
    chances = np.array([chance for _, chance in ends])
    rng = generator(*task.key("search-drawn"))
    node = ends[int(rng.choice(len(ends), p=chances / chances.sum()))][0]
    assert node.states is not None
    judged: Judged = yield Judge(node.states.x)
    found: Found = task.found
    found.reward, found.picture = judged.rewards[0], judged.pictures[0]
