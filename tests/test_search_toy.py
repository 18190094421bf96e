"""Searches where everything has a closed form: Gaussian data under the exact network, rewards linear in the sample."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from gauss import DENOISER, level, posterior
from torch import Tensor

from diffalign.errors import RunError, UserError
from diffalign.keyed import normal
from diffalign.pipelines.searches import beam, tree
from diffalign.pipelines.searches.core import Draw, Found, Search, States, Task, World, drive
from diffalign.pipelines.searches.options import Beam, BestOfN, Greedy, SearchOptions, Tree, parse_search
from diffalign.pipelines.searches.run import least_calls, search
from diffalign.rollouts.policy import Policy, few_steps

MEAN, STD = 0.5, 0.8
TIMES = (999, 666, 333)


class Toy(World):
    """Samples of N(0.5, 0.8^2), one number each; a picture is the number, its reward ``slope`` times it."""

    def __init__(self, rows: int = 1, seed: int = 0, eta: float = 1.0, slope: float = 1.0, price: int = 1) -> None:
        policy = Policy(*few_steps(TIMES), eta=eta)
        keys = [(seed, f"p{row}") for row in range(rows)]
        super().__init__(keys, DENOISER, policy, (1, 1, 1), torch.device("cpu"), price)
        self.slope, self.batches = slope, []  # type: float, list[int]
        self.stop_at: int | None = None

    def network(self, x: Tensor, t: Tensor, rows: Sequence[int]) -> Tensor:
        self.batches.append(len(x))
        if self.stop_at is not None and sum(self.batches) > self.stop_at:
            raise KeyboardInterrupt
        alpha, sigma = level(t)
        return DENOISER.target_from_xt(posterior(x, alpha, sigma, MEAN, STD**2), x, t)

    def decode(self, latents: Tensor) -> list[Any]:
        return latents.flatten().tolist()

    def score(self, pictures: Sequence[Any], rows: Sequence[int], t: Sequence[int]) -> list[float]:
        return [self.slope * value for value in pictures]

    def draw(self, rows: Sequence[int], draws: Sequence[int]) -> list[Any]:
        found = []
        for row, draw in zip(rows, draws, strict=True):
            states = Task(self, row, 0).start([draw])
            for k in range(len(self.policy)):
                states.output = self.network(states.x, self.times(self.policy.times[k], 1), [row])
                states = Task(self, row, 0).step(states)
            found += self.decode(states.x)
        return found


def chain(mean: float = 0.0, var: float = 1.0) -> tuple[float, float]:
    """Mean and variance of the pictures that the toy's steps make, by propagation of its Gaussian."""
    for k, t in enumerate(TIMES):
        zero, one = (torch.full((1, 1, 1, 1), value, dtype=torch.float64) for value in (0.0, 1.0))
        at = torch.tensor([t])
        s = torch.tensor([[*TIMES[1:], -1][k]])
        means = []
        for x in (zero, one):
            output = DENOISER.target_from_xt(posterior(x, *level(at, torch.float64), MEAN, STD**2), x, at)
            step = Policy(*few_steps(TIMES)).step(DENOISER, output, x, at, s)
            means.append(float(step.mean))
        slope = means[1] - means[0]
        mean, var = means[0] + slope * mean, slope**2 * var + float(step.std) ** 2
    return mean, var


def run(world: World, how: SearchOptions, budget: int, **options: Any) -> list[Found]:
    return search(world, how, budget, **options)


ALL = [BestOfN(), Beam(beams=2, children=2), Beam(beams=2, children=3, lookahead=2), Greedy(children=3), Tree()]
NAMES = [how.text() for how in ALL]


def test_soft_values() -> None:
    """Between mean and maximum, which its limits are; a constant stays."""
    values = [0.3, 1.7, -0.4]
    assert tree.soft_value(values, 1e6) == pytest.approx(np.mean(values), abs=1e-5)
    assert tree.soft_value(values, 1e-4) == pytest.approx(max(values), abs=1e-3)
    assert tree.soft_value(values, 0.0) == max(values)
    assert tree.soft_value([2.5] * 4, 0.7) == pytest.approx(2.5)
    assert np.mean(values) < tree.soft_value(values, 0.7) < max(values)
    assert tree.soft_value(values, 0.7) == pytest.approx(0.7 * math.log(np.mean(np.exp(np.array(values) / 0.7))))


def grown(world: Toy, how: Tree, budget: int) -> tree.Node:
    """The tree itself."""
    roots: list[tree.Node] = []

    def start(task: Task, options: Any) -> Search:
        roots.append((yield from tree.grow(task, options)))

    drive(world, start, how, budget)
    return roots[0]


def test_the_tree_draws_from_the_tilted_distribution() -> None:
    """p(x) exp(r(x) / T) of a Gaussian and a linear reward is a Gaussian again, moved by slope V / T; the root's value
    is T log E exp(r / T)."""
    slope, temperature = 2.0, 1.0
    mean, var = chain()
    root = grown(Toy(slope=slope), Tree(mode="sample", temperature=temperature, widening=2.0, growth=0.6), 900)
    ends = tree.leaves(root, temperature)
    x = np.array([node.reward for node, _ in ends]) / slope
    weights = np.array([weight for _, weight in ends])
    assert weights.sum() == pytest.approx(1)
    moved = slope * var / temperature
    assert moved > 0.8 * var**0.5  # far away from the model's own mean
    assert weights @ x == pytest.approx(mean + moved, abs=0.12)
    assert weights @ (x - weights @ x) ** 2 == pytest.approx(var, rel=0.35)
    assert root.value == pytest.approx(
        slope * mean + slope**2 * var / (2 * temperature), abs=0.15
    )  # untilted 0.36 less


def test_a_constant_reward_is_every_value_and_a_hot_tree_samples_the_model() -> None:
    flat = grown(Toy(slope=0.0), Tree(mode="sample", temperature=1.0), 200)
    assert all(node.value == 0.0 for node in tree.every(flat) if node.children or node.reward is not None)
    hot = grown(Toy(), Tree(mode="sample", temperature=1e4, widening=2.0, growth=0.6), 500)
    ends = tree.leaves(hot, 1e4)
    assert sum(w * float(node.reward or 0) for node, w in ends) == pytest.approx(chain()[0], abs=0.12)


def test_a_tree_is_a_tree() -> None:
    """A branch costs the steps below it alone: outputs are as many as states that are no pictures; no two agree."""
    world = Toy()
    root = grown(world, Tree(), 60)
    nodes = [node for node in tree.every(root) if node.states is not None]
    inner = [node for node in nodes if node.reward is None]
    assert sum(world.batches) == len(inner) <= 60
    assert all(node.states is not None and node.states.output is not None for node in inner)
    names = [(node.states.k, *node.states.names) for node in nodes if node.states]
    assert len(set(names)) == len(names)
    values = [float(node.states.x) for node in nodes if node.states]
    assert len(set(values)) == len(values)
    assert any(len(node.children) > 1 for node in inner), "nothing branched below the root"
    assert all(len(node.children) <= 1 for node in inner if node.states and node.states.k == 2)
    leaves = [node for node in nodes if node.reward is not None]
    assert root.visits >= len(leaves) > 20


def test_a_tree_that_hardly_widens_spends_its_budget_all_the_same() -> None:
    """By its visits alone a second child would come after 10^10 walks, which cost no calls."""
    (found,) = run(Toy(), Tree(widening=0.1, growth=0.1), 30)
    assert found.calls > 27 and found.finished > 10


@pytest.mark.parametrize("how", ALL, ids=NAMES)
def test_a_larger_budget_begins_as_a_smaller_one(how: SearchOptions) -> None:
    """So the best only rises, and no budget is passed; what was spent is what the network saw."""
    world = Toy(price=2)
    least, before = least_calls(world, how), None
    with pytest.raises(UserError, match=f"budget {least - 1}: .* takes {least} U-Net calls"):
        run(world, how, least - 1)
    for budget in (least, least + 7, 2 * least + 3, 5 * least, 9 * least):
        world = Toy(price=2)
        (found,) = run(world, how, budget)
        assert found.calls == 2 * sum(world.batches) <= budget
        assert budget - found.calls < least
        assert found.reward == pytest.approx(found.picture) and found.finished > 0
        assert found.trace[-1] == (found.calls, found.reward) and not found.interrupted
        assert [best for _, best in found.trace] == sorted(best for _, best in found.trace)
        assert found.decodes == found.scores >= found.finished
        if before is not None:
            assert found.reward >= before.reward
            assert found.trace[: len(before.trace)] == before.trace
        before = found


@pytest.mark.parametrize("how", ALL, ids=NAMES)
def test_company_and_batches_do_not_matter(how: SearchOptions) -> None:
    """Three prompts at once in batches of two sizes, or one alone: the same; another seed is another search."""
    together = run(Toy(rows=3), how, 36, batch=64)
    for a, b in zip(together, run(Toy(rows=3), how, 36, batch=2), strict=True):
        assert a.reward == pytest.approx(b.reward, rel=1e-5)
        assert (a.calls, a.decodes, a.finished) == (b.calls, b.decodes, b.finished)
    world = Toy(rows=1)
    world.keys = [(0, "p2")]
    assert run(world, how, 36)[0].reward == pytest.approx(together[2].reward, rel=1e-5)
    assert len({found.reward for found in together}) == 3
    assert run(Toy(seed=1), how, 36)[0].reward != together[0].reward


def test_many_prompts_are_served_together() -> None:
    world = Toy(rows=8)
    run(world, Tree(), 40, batch=8)
    assert np.mean(world.batches) > 6


def test_one_beam_of_one_child_is_the_sampler_and_k_1_is_independent_chains() -> None:
    """And without a judgement on the way a beam search is best-of-N."""
    world = Toy()
    draws = [world.draw([0], [n])[0] for n in range(4)]
    assert run(Toy(), Beam(beams=1, children=1), 3)[0].picture == pytest.approx(draws[0])
    assert run(Toy(), Beam(beams=4, children=1), 12)[0].picture == pytest.approx(max(draws))
    assert run(Toy(), BestOfN(), 12)[0].picture == pytest.approx(max(draws))
    passes = Seen()  # each from noise of its own
    run(passes, Beam(beams=2, children=1), 12)
    assert torch.cat([x for x, _ in passes.judged_at]).flatten().tolist() == pytest.approx(draws)
    # children that nobody judges before the end: a fork at the last step but one
    (late,) = run(Toy(), Beam(beams=2, children=3, start=1), least_calls(Toy(), Beam(beams=2, children=3, start=1)))
    assert late.finished == 6 and late.decodes == 6


def test_children_stand_together_and_have_paths_of_their_own() -> None:
    x = torch.arange(3.0).view(3, 1, 1, 1)
    states = States(x, 1, ["0", "1", "2"], -x)
    forked = states.fork(2)
    assert forked.names == ["0.0", "0.1", "1.0", "1.1", "2.0", "2.1"] and states.names == ["0", "1", "2"]
    assert forked.x.flatten().tolist() == [0, 0, 1, 1, 2, 2] and forked.k == 1
    assert forked.output is not None and torch.equal(forked.output, -forked.x) and states.fork(1) is states


def test_first_noises_are_the_samplers_times_the_scale_and_the_first_of_equals_stays() -> None:
    world = Toy(rows=2, slope=0.0)
    first = [normal((1, 1, 1), 0, "sample", "p1", draw) for draw in (3, 5)]
    world.policy = replace(world.policy, scale=0.5)
    assert torch.equal(Task(world, 1, 0).start([3, 5]).x, 0.5 * torch.stack(first))
    assert run(world, BestOfN(), 12)[1].picture == world.draw([1], [0])[0]


class Seen(Toy):
    """Keeps what the network is asked and what is judged on the way: (x, t) each."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[Tensor, int]] = []
        self.judged_at: list[tuple[Tensor, int]] = []

    def network(self, x: Tensor, t: Tensor, rows: Sequence[int]) -> Tensor:
        self.asked.append((x, int(t[0])))
        return super().network(x, t, rows)

    def score(self, pictures: Sequence[Any], rows: Sequence[int], t: Sequence[int]) -> list[float]:
        self.judged_at.append((torch.tensor(pictures).view(-1, 1, 1, 1), t[0]))
        return super().score(pictures, rows, t)


def test_children_are_judged_by_what_noiseless_steps_make_of_them() -> None:
    """At once by x0 of their own time; with a look ahead by x0 where one DDIM step leads. Then as finished pictures."""
    for ahead in (1, 2):
        world = Seen()
        how = Beam(beams=1, children=2, lookahead=ahead)
        (found,) = run(world, how, least_calls(world, how))
        assert [t for _, t in world.asked] == [999, 666, *[333] * ahead]
        assert [t for _, t in world.judged_at] == [TIMES[ahead], 0] and found.finished == 2
        (children, time), (x, at) = world.asked[1], world.asked[ahead]
        x0 = posterior(children, *level(time), MEAN, STD**2)
        if ahead == 2:
            (alpha, sigma), (to_alpha, to_sigma) = level(time), level(at)
            torch.testing.assert_close(x, to_alpha * x0 + to_sigma * (children - alpha * x0) / sigma)
        torch.testing.assert_close(world.judged_at[0][0], posterior(x, *level(at), MEAN, STD**2), rtol=1e-4, atol=1e-5)
        best = int(world.judged_at[0][0].argmax())
        step = world.policy.step  # the child that goes on is the better one, with the output that judged it
        output = DENOISER.target_from_xt(x0, children, torch.tensor([time] * 2))[best : best + 1]
        s = torch.tensor([333])
        mean = step(DENOISER, output, children[best : best + 1], torch.tensor([time]), s).mean
        spread = float(world.policy.stds(DENOISER)[1])
        names = [f"0.{best}.{i}" for i in range(2)]
        noise = torch.stack([normal((1, 1, 1), 0, "search", "p0", "step-1", name) for name in names])
        torch.testing.assert_close(world.asked[-1][0], mean + spread * noise, rtol=1e-4, atol=1e-5)


def test_a_beam_forks_and_is_judged_every_so_many_steps() -> None:
    """Judged on arriving, before the next fork; not before the last step."""
    world, how = Toy(), Beam(beams=2, children=3, start=1, every=3)
    world.policy = Policy(*few_steps(range(990, 0, -99)))
    steps = range(len(world.policy))
    assert [k for k in steps if beam.forks(world, how, k)] == [1, 4, 7]
    assert [k for k in steps if beam.judges(world, how, k)] == [4, 7]
    assert beam.outputs(world, how) == 2 * 2 + 6 * 3 + 6 * 3 + 6 * 2


def test_a_look_ahead_goes_evenly_through_what_is_left() -> None:
    world = Toy()
    world.policy = Policy(*few_steps(range(990, 0, -99)))
    ways = {(k, ahead): beam.way(world, Beam(lookahead=ahead), k) for k, ahead in ((1, 1), (1, 3), (4, 4), (8, 5))}
    assert ways == {(1, 1): [1], (1, 3): [1, 4, 7], (4, 4): [4, 5, 7, 8], (8, 5): [8, 9]}


def test_a_greedy_search_is_a_beam_of_one() -> None:
    greedy, one = Greedy(children=3, every=2), Beam(beams=1, children=3, every=2)
    assert run(Toy(), greedy, 50)[0] == run(Toy(), one, 50)[0]


def mean_reward(how: SearchOptions, budget: int, world: Callable[[], Toy]) -> float:
    return float(np.mean([found.reward for found in run(world(), how, budget, batch=64)]))


def test_searches_beat_best_of_n_at_equal_calls() -> None:
    """Where guesses of the clean sample are exact and branches cheap; 24 prompts of keyed noise."""
    plain = mean_reward(BestOfN(), 36, lambda: Toy(rows=24))
    mean, var = chain()
    assert plain == pytest.approx(mean + 1.63 * var**0.5, abs=0.2)  # the largest of 12 of a Gaussian
    for how in (Beam(beams=3, children=4), Greedy(children=12), Tree()):
        assert mean_reward(how, 36, lambda: Toy(rows=24)) > plain + 0.1


def test_a_reward_turned_over_is_minimised() -> None:
    for how in ALL:
        assert run(Toy(slope=-1.0), how, 80)[0].picture < chain()[0] < run(Toy(), how, 80)[0].picture


@pytest.mark.parametrize("how", ALL[1:], ids=NAMES[1:])
def test_an_interrupt_returns_the_best_so_far(how: SearchOptions) -> None:
    whole = run(Toy(), how, 200)[0]
    world = Toy()
    world.stop_at = 100
    (found,) = run(world, how, 200)
    assert found.interrupted and 0 < found.finished < whole.finished and found.calls <= 100
    assert found.trace == whole.trace[: len(found.trace)]
    world = Toy()
    world.stop_at = 1
    (nothing,) = run(world, how, 200)
    assert nothing.interrupted and nothing.picture is None and nothing.reward == -math.inf


def test_a_finished_prompt_is_not_interrupted() -> None:
    def start(task: Task, options: Any) -> Search:
        for draw in range(1 + 9 * task.row):
            task.offer((yield Draw([draw])))

    world = Toy(rows=2)
    world.stop_at = 9
    first, second = drive(world, start, BestOfN(), 100)
    assert not first.interrupted and second.interrupted and (first.finished, second.finished) == (1, 2)


def test_what_cannot_be_searched_is_refused() -> None:
    for how in ALL[1:]:
        with pytest.raises(UserError, match="needs steps that add noise"):
            run(Toy(eta=0.0), how, 500)
    assert run(Toy(eta=0.0), BestOfN(), 50)[0].finished == 16
    with pytest.raises(UserError, match="start=2 leaves no step to fork at"):
        run(Toy(), Greedy(start=2), 500)

    class Odd(Toy):
        def score(self, pictures: Sequence[Any], rows: Sequence[int], t: Sequence[int]) -> list[float]:
            return [math.nan] * len(pictures)

    with pytest.raises(RunError, match="prompt 'p0' is not finite"):
        run(Odd(), BestOfN(), 50)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("bem", "unknown search 'bem'; did you mean 'beam'"),
        ("beam:beam=2", "search 'beam' has no setting 'beam'; did you mean 'beams'"),
        ("beam:beams", "'beams' has no value; write beams=VALUE"),
        ("beam:beams=0", "beams 0: Input should be greater than or equal to 1"),
        ("beam:beams=two", "beams two: Input should be a valid integer"),
        ("tree:mode=sample", "give its temperature"),
        ("best-of-n:n=4", "search 'best-of-n' has no setting 'n'"),
    ],
)
def test_wrong_searches_are_one_line(text: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        parse_search(text)


def test_searches_as_text() -> None:
    for text in ("best-of-n", "beam", "beam:beams=4,lookahead=2", "tree:mode=sample,temperature=0.5", "greedy:every=4"):
        assert parse_search(text).text() == text
