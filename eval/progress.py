"""One progress display: a bar on a terminal, a line every half minute elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

INTERVAL = 30.0


@contextmanager
def progress_bar(label: str, total: int, unit: str = "images", enabled: bool = True) -> Iterator[Callable[[int], None]]:
    """``with progress_bar("scoring", n) as advance: ... advance(k)``. Writes to stderr."""
    if not enabled or total == 0:
        yield lambda n: None
        return
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn(label),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task(label, total=total, rate="")
            began = time.monotonic()

            def move(n: int) -> None:
                done = bar.tasks[0].completed + n
                rate = done / max(time.monotonic() - began, 1e-9)
                bar.update(task, advance=n, rate=f"{rate:.1f} {unit}/s")

            yield move
        return
    began = last = time.monotonic()
    done = 0

    def note(n: int) -> None:
        nonlocal done, last
        done += n
        now = time.monotonic()
        if now - last >= INTERVAL:
            last = now
            rate = done / (now - began)
            left = (total - done) / max(rate, 1e-9)
            print(f"{label}: {done}/{total} {unit}, {rate:.1f}/s, {left:.0f} s left", file=sys.stderr, flush=True)

    yield note
