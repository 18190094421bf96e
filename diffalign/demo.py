"""``diffalign demo``: the whole story on the shipped tiny models, for real: sample, score, train, compare, report."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .console import Console
from .recipe import load_recipe

if TYPE_CHECKING:
    from rich.console import Console as Rich

    from .eval.evaluate import Evaluation
    from .run import Run

MODEL, HELDOUT = "tiny-sd", "tiny-heldout"
SCORERS, PRIMARY = "oracle,tiny-pickscore,tiny-clip", "oracle"
IN_LOOP = ("tiny-pickscore",)  # it labelled the pairs that training saw
STEPS, GUIDANCE = 20, 3.0


@dataclass
class Demo:
    """What the demo made."""

    run: Run
    evaluation: Evaluation
    seconds: float

    def render(self, console: Rich) -> None:
        """The win rate with its interval, and where the report is."""
        from .eval.report import headline

        self.evaluation.render(console)
        comparison = self.evaluation.comparisons[0]
        console.print(comparison.sentence(headline(comparison, PRIMARY)))
        console.print(f"took {self.seconds:.0f} s; report: {self.evaluation.report}")


def run_demo(out: Path, steps: int | None = None, prompts: int = 200, progress: bool = True) -> Demo:
    """Train ``tiny/dpo`` into ``out/run`` and judge it beside its base on held-out prompts into ``out/eval``.

    Both halves resume where they were stopped. Raises UserError and RunError as ``train`` and ``evaluate`` do."""
    from .eval.evaluate import Sampling, evaluate
    from .eval.prompts import read_prompts
    from .run import train

    started = time.perf_counter()
    say = narrator(progress)
    values: dict[str, Any] = {"output.dir": str(out / "run"), **({"steps": steps} if steps else {})}
    recipe = load_recipe("tiny/dpo", **values)
    say("1. the shipped pairs: sampled from the tiny base model, labelled by the tiny PickScore, with noise and flaws")
    say(f"2. a LoRA is trained by Diffusion-DPO for {recipe.train.steps} steps; base samples first")
    run = train(recipe, "auto", progress)
    say(f"3. base and aligned model draw {prompts} held-out prompts from the same noise; the oracle only judges")
    evaluation = evaluate(
        [f"base={MODEL}", f"aligned={MODEL}+{run.dir}"],
        read_prompts(HELDOUT)[:prompts],
        SCORERS,
        out / "eval",
        sampling=Sampling(steps=STEPS, guidance=GUIDANCE, batch=25),
        primary=PRIMARY,
        in_loop=IN_LOOP,
        run=run.dir,
        title="Diffusion-DPO on the tiny world",
        progress=progress,
    )
    return Demo(run, evaluation, time.perf_counter() - started)


def narrator(shown: bool) -> Callable[[str], None]:
    """Says what is happening, on stderr."""
    return Console(shown).say
