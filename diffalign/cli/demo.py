"""The demo."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .common import Quiet, app, out


@app.command()
def demo(
    to: Annotated[Path, typer.Option("--out", help="Folder for everything the demo makes.")] = Path("demo"),
    steps: Annotated[int | None, typer.Option(help="Training steps; the recipe's if not given.", min=1)] = None,
    prompts_: Annotated[int, typer.Option("--prompts", help="Held-out prompts to judge on.", min=8)] = 200,
    quiet: Quiet = False,
) -> None:
    """The whole story on the tiny models: sample, score pairs, train a LoRA by Diffusion-DPO, compare, report."""
    from ..demo import run_demo

    run_demo(to, steps, prompts_, progress=not quiet).render(out())
