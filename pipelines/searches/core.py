"""What the searches share: samples under way, what a prompt has spent, and the driver that serves many prompts at once.

Costs are counted in *calls*: one picture through the U-Net once. A step under guidance sends each picture through it
twice, with and without the prompt, and counts as two. A budget is so many calls a prompt.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ...denoiser import Denoiser
from ...errors import RunError, UserError
from ...keyed import normal
from ...rollouts.policy import Policy
from .options import SearchOptions

Key = tuple[int, str]  # of a prompt's draws: seed, and id
MADE = "sample"  # first noises are those of `diffalign sample`


@dataclass
class States:
    """N samples of one prompt before step ``k`` (the number of steps: finished): latents ``x`` (N, C, h, w), fp32, and
    ``names`` (N,), the paths that key what they draw. ``output`` (N, C, h, w) is the network's, where it was asked."""

    x: Tensor
    k: int
    names: list[str]
    output: Tensor | None = None

    def __len__(self) -> int:
        return len(self.names)

    def take(self, index: Sequence[int]) -> States:
        """These samples, in this order."""
        kept = list(index)
        output = None if self.output is None else self.output[kept]
        return States(self.x[kept], self.k, [self.names[i] for i in kept], output)

    def fork(self, count: int) -> States:
        """Each sample ``count`` times, with what is known of it and a path of its own; one child is no fork."""
        if count == 1:
            return self
        found = self.take([i for i in range(len(self)) for _ in range(count)])
        return replace(found, names=[f"{name}.{i % count}" for i, name in enumerate(found.names)])


@dataclass(frozen=True)
class Outputs:
    """Asks for the network's outputs of some states; they are written into them, the answer is None."""

    states: States

    def __len__(self) -> int:
        return len(self.states)


@dataclass(frozen=True)
class Judge:
    """Asks for pictures of clean ``latents`` (N, C, h, w) and their rewards; ``t`` is the time of the samples that
    these are guesses for, 0 where they are finished. The answer: `Judged`."""

    latents: Tensor
    t: int = 0

    def __len__(self) -> int:
        return len(self.latents)


@dataclass(frozen=True)
class Draw:
    """Asks for finished pictures by the ordinary sampler, numbered by ``draws``, and their rewards. The answer:
    `Judged`."""

    draws: Sequence[int]

    def __len__(self) -> int:
        return len(self.draws)


Request = Outputs | Judge | Draw


@dataclass(frozen=True)
class Judged:
    """Rewards (N,) and pictures (N,)."""

    rewards: list[float]
    pictures: list[Any]


@dataclass
class Found:
    """What a search of one prompt found, and what it took.

    ``picture`` is the best finished one (None: nothing was finished) and ``reward`` its score. ``calls`` of the U-Net,
    see the module; ``decodes`` and ``scores``: pictures through the VAE and the scorer; ``finished`` pictures in all.
    ``trace``: (calls, best reward) whenever pictures were finished. ``interrupted``: stopped before it was done."""

    picture: Any = None
    reward: float = -math.inf
    calls: int = 0
    decodes: int = 0
    scores: int = 0
    finished: int = 0
    trace: list[tuple[int, float]] = field(default_factory=list)
    interrupted: bool = False

    def json(self) -> dict[str, Any]:
        """Numbers alone, as plain data."""
        counts = {"calls": self.calls, "decodes": self.decodes, "scores": self.scores, "finished": self.finished}
        return {"reward": self.reward, **counts, "trace": self.trace}


@dataclass
class Task:
    """A prompt's search under way: ``row`` is its number in the world, ``together`` how many pictures it had best ask
    for at a time."""

    world: World
    row: int
    budget: int
    together: int = 1
    found: Found = field(default_factory=Found)

    def affords(self, outputs: int) -> bool:
        """Whether so many network outputs are within the budget."""
        return self.found.calls + outputs * self.world.price <= self.budget

    def start(self, draws: Sequence[int]) -> States:
        """First noises number ``draws``: those of the ordinary sampler, times the policy's scale."""
        noise = [normal(self.world.shape, *self.key(MADE), draw) for draw in draws]
        x = self.world.policy.scale * torch.stack(noise).to(self.world.device)
        return States(x, 0, [str(draw) for draw in draws])

    def step(self, states: States) -> States:
        """One step on; noise is keyed by step and path. A step that adds none draws none."""
        assert states.output is not None
        world, k = self.world, states.k
        t, s = (world.times(steps[k], len(states)) for steps in (world.policy.times, world.policy.ends))
        noise = None
        if not world.still(k):
            drawn = [normal(world.shape, *self.key("search"), f"step-{k}", name) for name in states.names]
            noise = torch.stack(drawn).to(world.device)
        x = world.policy.step(world.denoiser, states.output, states.x, t, s, noise).sample
        return States(x, k + 1, list(states.names))

    def key(self, tag: str) -> tuple[int, str, str]:
        """Of this prompt's draws."""
        seed, name = self.world.keys[self.row]
        return seed, tag, name

    def offer(self, judged: Judged, calls: int | None = None) -> None:
        """Finished pictures, after so many calls (None: all made so far); the first of the best stays."""
        found = self.found
        for reward, picture in zip(judged.rewards, judged.pictures, strict=True):
            found.finished += 1
            if reward > found.reward:
                found.reward, found.picture = reward, picture
        found.trace.append((found.calls if calls is None else calls, found.reward))


Search = Generator[Request, Any, None]


class World(ABC):
    """What is sampled: P prompts of one model, and a reward.

    Args:
        keys: seed and id of each prompt (P,), which key its draws.
        denoiser, policy: how samples go from noise to x0.
        shape: (C, h, w) of the latents.
        device: of the latents.
        price: calls of one network output: 2 under guidance, else 1.
    """

    def __init__(
        self,
        keys: Sequence[Key],
        denoiser: Denoiser,
        policy: Policy,
        shape: tuple[int, ...],
        device: torch.device,
        price: int = 1,
    ) -> None:
        self.keys, self.denoiser, self.policy, self.shape = list(keys), denoiser, policy, shape
        self.device, self.price = device, price

    @abstractmethod
    def network(self, x: Tensor, t: Tensor, rows: Sequence[int]) -> Tensor:
        """The network's own prediction (N, C, h, w), guided, at ``x`` and times (N,), of the prompts ``rows`` (N,)."""

    @abstractmethod
    def decode(self, latents: Tensor) -> list[Any]:
        """Pictures of clean latents."""

    @abstractmethod
    def score(self, pictures: Sequence[Any], rows: Sequence[int], t: Sequence[int]) -> list[float]:
        """Rewards; ``t`` (N,): 0, or the time of the sample that a picture is a guess for."""

    @abstractmethod
    def draw(self, rows: Sequence[int], draws: Sequence[int]) -> list[Any]:
        """Pictures by the ordinary sampler: of each row (N,), its draw of that number."""

    @property
    def draw_price(self) -> int:
        """Calls of one picture by `draw`."""
        return self.price * len(self.policy)

    def still(self, k: int) -> bool:
        """Whether step ``k`` adds no noise."""
        return self.policy.ends[k] < 0 or (self.policy.kernel != "renoise" and self.policy.eta == 0)

    def times(self, time: int, count: int) -> Tensor:
        """A time as a batch of ``count``, int64."""
        return torch.full((count,), time, dtype=torch.int64, device=self.device)

    def clean(self, states: States) -> Tensor:
        """What the network takes the clean latents for (N, C, h, w)."""
        assert states.output is not None
        return self.denoiser.to_x0(states.output, states.x, self.times(self.policy.times[states.k], len(states)))

    def judged(self, pictures: list[Any], rows: Sequence[int], t: Sequence[int]) -> Judged:
        """With their rewards. Raises RunError for one that is not finite: nothing can be ranked by it."""
        rewards = [float(value) for value in self.score(pictures, rows, t)]
        if len(rewards) != len(pictures):
            raise UserError(f"the reward gave {len(rewards)} numbers for {len(pictures)} pictures; give one a picture")
        odd = next((row for row, value in zip(rows, rewards, strict=True) if not math.isfinite(value)), None)
        if odd is not None:
            raise RunError(f"the reward of a picture of prompt '{self.keys[odd][1]}' is not finite; nothing is ranked")
        return Judged(rewards, pictures)


Start = Callable[[Task, Any], Search]


@torch.no_grad()
def drive(
    world: World,
    start: Start,
    options: SearchOptions,
    budget: int,
    batch: int = 8,
    on_calls: Callable[[int], None] = lambda calls: None,
) -> list[Found]:
    """Searches all prompts of ``world`` at once, each with ``budget`` calls; results in order.

    All that the searches ask for at a time is served in batches of ``batch``, the kind that most wait for first; since
    every draw is keyed, neither the batch nor the other prompts change a result, but for rounding. By Ctrl-C the best
    so far is returned. ``on_calls`` is told of calls as they are made.
    """
    tasks = [Task(world, row, budget, max(1, batch // len(world.keys))) for row in range(len(world.keys))]
    searches = [start(task, options) for task in tasks]
    waiting: dict[int, Request] = {}
    done: set[int] = set()
    replies: dict[int, Any] = dict.fromkeys(range(len(tasks)))
    try:
        while replies or waiting:
            for row, reply in replies.items():
                try:
                    waiting[row] = searches[row].send(reply)
                except StopIteration:
                    done.add(row)
            replies = {}
            if not waiting:
                break
            kinds = [Outputs, Judge, Draw]
            wanted = max(kinds, key=lambda kind: sum(len(r) for r in waiting.values() if isinstance(r, kind)))
            some = {row: request for row, request in waiting.items() if isinstance(request, wanted)}
            before = sum(task.found.calls for task in tasks)
            replies = serve(world, tasks, some, batch)
            waiting = {row: request for row, request in waiting.items() if row not in some}
            on_calls(sum(task.found.calls for task in tasks) - before)
    except KeyboardInterrupt:
        for task in tasks:
            task.found.interrupted = task.row not in done
    finally:
        for search in searches:
            search.close()
    return [task.found for task in tasks]


def serve(world: World, tasks: Sequence[Task], asked: dict[int, Any], batch: int) -> dict[int, Any]:
    """Replies to requests of one kind, by row; what they cost is written down before they are sent."""
    rows = [row for row, request in asked.items() for _ in range(len(request))]
    first = next(iter(asked.values()))
    spans = [slice(i, min(i + batch, len(rows))) for i in range(0, len(rows), batch)]
    if isinstance(first, Outputs):
        x = torch.cat([request.states.x for request in asked.values()])
        steps = [request.states.k for request in asked.values() for _ in range(len(request))]
        t = torch.tensor([world.policy.times[k] for k in steps]).to(world.device)
        output = torch.cat([world.network(x[span], t[span], rows[span]) for span in spans])
        for (row, request), part in zip(asked.items(), output.split([len(r) for r in asked.values()]), strict=True):
            request.states.output = part
            tasks[row].found.calls += world.price * len(request)
        return dict.fromkeys(asked)
    if isinstance(first, Judge):
        latents = torch.cat([request.latents for request in asked.values()])
        times = [request.t for request in asked.values() for _ in range(len(request))]
        parts = [world.judged(world.decode(latents[span]), rows[span], times[span]) for span in spans]
    else:
        draws = [draw for request in asked.values() for draw in request.draws]
        parts = [
            world.judged(world.draw(rows[span], draws[span]), rows[span], [0] * (span.stop - span.start))
            for span in spans
        ]
    rewards = [value for part in parts for value in part.rewards]
    pictures = [picture for part in parts for picture in part.pictures]
    replies: dict[int, Any] = {}
    at = 0
    for row, request in asked.items():
        found, end = tasks[row].found, at + len(request)
        replies[row] = Judged(rewards[at:end], pictures[at:end])
        found.calls += world.draw_price * len(request) if isinstance(request, Draw) else 0
        found.decodes += len(request)
        found.scores += len(request)
        at = end
    return replies
