"""The parts of a tree search by hand: who is walked to, who may branch, what is handed up, what is drawn."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from test_search_toy import Seen, Toy, run

from diffalign.pipelines.searches import tree
from diffalign.pipelines.searches.core import Task
from diffalign.pipelines.searches.options import Tree
from diffalign.pipelines.searches.tree import Node


def leaf(reward: float, visits: int = 1) -> Node:
    return Node(visits=visits, value=reward, reward=reward)


def task_of(world: Toy | None = None) -> Task:
    return Task(world or Toy(), 0, 0)


def test_a_search_walks_to_the_highest_value_and_its_bonus() -> None:
    """0.5 + c s sqrt(log 5 / 3) against 0.3 + c s sqrt(log 5 / 1): 1.23 and 1.57 where c s is 1."""
    root = Node(children=[leaf(0.5, 3), leaf(0.3, 1)], visits=4)
    for exploration, spread, chosen in ((0.0, 1.0, 0), (1.0, 1.0, 1), (1.0, 0.1, 0), (0.1, 1.0, 0), (10.0, 0.1, 1)):
        path = tree.descend(task_of(), Tree(exploration=exploration), root, 1.0, spread)
        assert path == [root, root.children[chosen]], (exploration, spread)


def test_a_sampling_tree_walks_by_softmax() -> None:
    root, how = Node(children=[leaf(0.5), leaf(0.3)]), Tree(mode="sample", temperature=0.1, widening=1e-3, growth=0.1)
    taken = []
    for root.visits in range(1, 401):
        taken.append(tree.descend(task_of(), how, root, 0.1, 0.0)[-1] is root.children[0])
    assert np.mean(taken) == pytest.approx(1 / (1 + math.exp(-2)), abs=0.04)


def test_who_may_branch() -> None:
    """ceil(widening visits ** growth), one at least; never before the last step, which adds no noise."""
    world, how = Toy(), Tree(widening=2.0, growth=0.5)
    task = task_of(world)
    assert [tree.room(task, how, Node(visits=visits)) for visits in (0, 1, 2, 9)] == [1, 2, 3, 6]
    assert tree.room(task, how, Node(visits=9), more=2) == 8
    states = task.start([0])
    for k, room in enumerate((6, 6, 1)):
        states.k = k
        assert tree.room(task, how, Node(states, visits=9), more=0) == room
    assert tree.room(task, how, Node(states, visits=9), more=2) == 1


def test_values_are_handed_up() -> None:
    """Along the path from its end, and everywhere where the temperature is a new one."""
    for whole in (False, True):
        a, b = Node(children=[leaf(1.0, 0), leaf(0.2)], visits=1), Node(children=[leaf(0.7)], visits=1)
        root = Node(children=[a, b], visits=2)
        tree.back_up([root, a, a.children[0]], 0.5, whole)
        assert [node.visits for node in (root, a, a.children[0], b, b.children[0])] == [3, 2, 1, 1, 1]
        assert a.value == pytest.approx(tree.soft_value([1.0, 0.2], 0.5)) and a.children[0].value == 1.0
        assert b.value == (0.7 if whole else 0.0)
        assert root.value == pytest.approx(tree.soft_value([a.value, b.value], 0.5))


def test_chances_of_leaves_are_products() -> None:
    ends = [leaf(0.5), leaf(0.1), leaf(0.2)]
    a = Node(children=ends[:2], value=0.4)
    found = {id(node): chance for node, chance in tree.leaves(Node(children=[a, ends[2]]), 0.1)}
    first = 1 / (1 + math.exp(-2))  # 0.4 against 0.2
    inner = 1 / (1 + math.exp(-4))
    expected = [first * inner, first * (1 - inner), 1 - first]
    assert [found[id(end)] for end in ends] == pytest.approx(expected)


def test_a_search_measures_by_the_spread_so_far(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the finished pictures' rewards: the bonus by it, the temperature by half of it."""
    world, plain, steps = Seen(), tree.descend, []

    def descend(task: Task, how: Tree, root: Node, temperature: float, spread: float, more: int = 0) -> Any:
        rewards = [float(x) for x, _ in world.judged_at]
        steps.append((temperature, spread, float(np.std(rewards)) if rewards else 0.0))
        return plain(task, how, root, temperature, spread, more)

    monkeypatch.setattr(tree, "descend", descend)
    run(world, Tree(), 20)
    assert len(steps) > 8 and steps[-1][2] > 0
    for temperature, spread, expected in steps:
        assert (temperature, spread) == pytest.approx((expected / 2, expected), rel=1e-4)


def test_a_sampling_tree_draws_and_does_not_take_the_likeliest(monkeypatch: pytest.MonkeyPatch) -> None:
    """In proportion to the chances, by a key of the prompt."""
    ends: list[tuple[np.ndarray, np.ndarray]] = []
    plain = tree.leaves

    def leaves(root: Node, temperature: float) -> Any:
        found = plain(root, temperature)
        ends.append((np.array([node.reward for node, _ in found]), np.array([chance for _, chance in found])))
        return found

    monkeypatch.setattr(tree, "leaves", leaves)
    how = Tree(mode="sample", temperature=1e4)
    found = run(Toy(rows=60), how, 9)
    drawn = np.array([one.reward for one in found])
    hits = [bool(np.isclose(rewards[chances.argmax()], drawn).any()) for rewards, chances in ends]
    share = np.mean([chances.max() for _, chances in ends])
    assert len(hits) == 60 and share < 0.8
    assert np.mean(hits) == pytest.approx(share, abs=0.17)


def test_a_branch_costs_the_steps_below_it_alone() -> None:
    """A budget that holds just one more branch is spent on it."""
    spent = [calls for calls, _ in run(Toy(), Tree(), 40)[0].trace]
    cheap = [after for before, after in pairwise(spent) if after - before < 3]
    assert cheap and run(Toy(), Tree(), cheap[0])[0].calls == cheap[0]
