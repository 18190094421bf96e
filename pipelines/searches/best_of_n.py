"""Best-of-N: independent pictures by the ordinary sampler, the best one kept. Its distribution is at most
log N - (N - 1) / N nats from the model's."""

from __future__ import annotations

from .core import Draw, Judged, Search, Task
from .options import BestOfN


def least(task: Task, how: BestOfN) -> int:
    """Calls of the first picture."""
    return task.world.draw_price


def search(task: Task, how: BestOfN) -> Search:
    """Draws 0, 1, ... as the budget holds them: a larger budget sees the same first ones."""
    total, done = task.budget // task.world.draw_price, 0
    while done < total:
        count = min(task.together, total - done)
        judged: Judged = yield Draw(range(done, done + count))
        for reward, picture in zip(judged.rewards, judged.pictures, strict=True):
            done += 1
            task.offer(Judged([reward], [picture]), done * task.world.draw_price)
