"""What the commands share: the app, options that several take, and how results are printed."""

from __future__ import annotations

import json
import os
from typing import Annotated, Any, Literal

import typer

app = typer.Typer(
    name="diffalign",
    help="Align and distil text-to-image diffusion models, and judge the result.",
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

Recipe = Annotated[str, typer.Argument(help="A recipe file, or a built-in name such as sd15/dpo.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Overrides: key.sub=value ...", metavar="[KEY=VALUE]...")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress.")]
Device = Annotated[Literal["auto", "cuda", "mps", "cpu"], typer.Option(help="Where to compute.")]
Dtype = Annotated[Literal["auto", "fp32", "bf16", "fp16"], typer.Option(help="Number format of the networks.")]
Steps = Annotated[int, typer.Option(help="Sampling steps.", min=1)]
Guidance = Annotated[float, typer.Option(help="Classifier-free guidance; 1 or less means none.")]
Negative = Annotated[str | None, typer.Option(help="Negative prompt.")]
Scheduler = Annotated[str, typer.Option(help="Sampler: ddim, euler, dpm++, unipc, lcm, default, ...")]
Height = Annotated[int | None, typer.Option(help="Pixels; the model's own if not given.")]
Width = Annotated[int | None, typer.Option(help="Pixels; the model's own if not given.")]
Seed = Annotated[int, typer.Option(help="Keys the noise of every image.", min=0)]
PerPrompt = Annotated[int, typer.Option(help="Images for each prompt.", min=1)]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub model.")]
Variant = Annotated[str | None, typer.Option(help="Weight files to take, such as fp16.")]
BatchSize = Annotated[int, typer.Option("--batch", help="Images a forward.", min=1)]


def out() -> Any:
    """A console on stdout that does not colour or wrap what a pipe reads."""
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = 140  # a table in a file is not cut to an imagined screen
    return console


def print_rows(rows: list[dict[str, Any]], columns: list[str], as_json: bool) -> None:
    """A listing: aligned columns for people, JSON for programs."""
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    widths = [max(len(str(row.get(c, ""))) for row in rows) if rows else 0 for c in columns[:-1]]
    for row in rows:
        cells = [str(row.get(c, "")).ljust(w) for c, w in zip(columns, widths, strict=False)]
        print("  ".join([*cells, str(row.get(columns[-1], ""))]).rstrip())


def is_main() -> bool:
    """Whether this process prints; under a launcher rank 0 alone does."""
    return os.environ.get("RANK", "0") == "0"
