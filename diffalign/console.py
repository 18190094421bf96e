"""What a run prints: one live line on a terminal, plain lines at intervals elsewhere. Everything goes to stderr."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console as Rich
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

SHOWN = ("loss", "accuracy", "margin", "chosen_error", "rejected_error", "chosen_gain", "rows_per_second", "skipped")
LINE_EVERY = 15.0  # seconds between lines where there is no terminal


def numbers(values: Mapping[str, float]) -> str:
    """The numbers worth a line."""
    return "  ".join(f"{name} {values[name]:.4g}" for name in SHOWN if name in values)


class Console:
    """Progress of one process; ``quiet`` silences all but rank 0."""

    def __init__(self, shown: bool = True) -> None:
        self.shown = shown
        self.rich = Rich(stderr=True, highlight=False)
        self._last = 0.0

    def quiet(self, quiet: bool) -> None:
        """Say nothing from now on."""
        self.shown = self.shown and not quiet

    def say(self, text: str) -> None:
        """One line."""
        if self.shown:
            self.rich.print(text, markup=False, soft_wrap=True)

    def counting(self, label: str) -> Callable[[int, int], None]:
        """A function (done, total) that shows how far a piece of work is, at intervals."""

        def show(done: int, total: int) -> None:
            now = time.monotonic()
            if now - self._last > LINE_EVERY or done == total:
                self._last = now
                self.say(f"{label}: {done} of {total}")

        return show

    def validated(self, step: int, values: Mapping[str, float]) -> None:
        """Held-out numbers."""
        self.say(f"held-out at step {step}: {numbers(values)}")

    @contextmanager
    def tracking(self, start: int, total: int) -> Iterator[Callable[[int, Mapping[str, float] | None], None]]:
        """Gives a function (step, values or None) that moves the bar, or prints lines where there is no terminal."""
        if not self.shown or not self.rich.is_terminal:
            began = time.monotonic()

            def line(step: int, values: Mapping[str, float] | None) -> None:
                now = time.monotonic()
                if values is not None and (now - self._last > LINE_EVERY or step == total):
                    self._last = now
                    left = (now - began) / max(1, step - start) * (total - step)
                    self.say(f"step {step} of {total}  {numbers(values)}  {left:.0f} s left")

            yield line
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[numbers]}"),
        )
        with Progress(*columns, console=self.rich) as bar:
            task: TaskID = bar.add_task("training", total=total, completed=start, numbers="")

            def live(step: int, values: Mapping[str, float] | None) -> None:
                if values is None:
                    bar.update(task, completed=step)
                else:
                    bar.update(task, completed=step, numbers=numbers(values))

            yield live
