"""What the commands share: the app, options that several take, and how results are printed."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Callable
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
BatchSize = Annotated[int, typer.Option("--batch", help="Images a forward.", min=1)]
InLoop = Annotated[str, typer.Option(help="Scorers that training used, comma-separated; they are marked.")]
Allow = Annotated[str, typer.Option(help="Differences to let pass, comma-separated: sampling, seeds.")]

# The fields of pipelines.spec.Sampling as options: name -> (type, default).
SAMPLING: dict[str, tuple[Any, Any]] = {
    "steps": (Annotated[int | None, typer.Option(help="Sampling steps; the model's record, else 25.", min=1)], None),
    "guidance": (
        Annotated[float | None, typer.Option(help="Guidance (1 or less: none); the model's record, else 7.5.")],
        None,
    ),
    "negative_prompt": (Annotated[str | None, typer.Option(help="Negative prompt.")], None),
    "scheduler": (
        Annotated[
            str | None, typer.Option(help="ddim, euler, dpm++, unipc, lcm, default, ...; the record, else ddim.")
        ],
        None,
    ),
    "height": (Annotated[int | None, typer.Option(help="Pixels; the model's own if not given.")], None),
    "width": (Annotated[int | None, typer.Option(help="Pixels; the model's own if not given.")], None),
    "seed": (Annotated[str, typer.Option(help="Keys the noise of every image; several as 0,1,2.")], "0"),
    "per_prompt": (Annotated[int, typer.Option(help="Images for each prompt and seed.", min=1)], 1),
    "long_prompts": (
        Annotated[
            int | None,
            typer.Option(help="Encode prompts by segments to so many tokens (240); a run's own if not given.", min=2),
        ],
        None,
    ),
    "batch": (BatchSize, 8),
    "device": (Device, "auto"),
    "dtype": (Dtype, "auto"),
    "revision": (Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub model.")], None),
    "variant": (Annotated[str | None, typer.Option(help="Weight files to take, such as fp16.")], None),
}


def sampling_options(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command the options of `SAMPLING`; it receives them checked for type as the dict ``sampling``."""
    keyword = inspect.Parameter.KEYWORD_ONLY
    own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.name != "sampling"]
    further = [inspect.Parameter(n, keyword, default=d, annotation=t) for n, (t, d) in SAMPLING.items()]

    def wrapped(**values: Any) -> None:
        from ..pipelines.spec import parse_seeds

        sampling = {name: values.pop(name) for name in SAMPLING}
        command(**values, sampling={**sampling, "seed": parse_seeds(sampling["seed"])})

    wrapped.__name__, wrapped.__doc__ = command.__name__, command.__doc__
    wrapped.__annotations__ = {}
    wrapped.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [p.replace(kind=keyword) for p in own] + further
    )
    return wrapped


def names(text: str) -> list[str]:
    """A comma-separated option as a list."""
    return [name.strip() for name in text.split(",") if name.strip()]


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
