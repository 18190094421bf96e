"""Commands on preference pairs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from .common import AsJson, Overrides, app, out

pairs = typer.Typer(help="Preference pairs: check.", no_args_is_help=True)
app.add_typer(pairs, name="pairs")


@pairs.command("check")
def pairs_check(
    path: Annotated[str, typer.Argument(help="Folder, .jsonl, .csv, Parquet, datasets folder or hub id.")],
    overrides: Overrides = None,
    to: Annotated[Path | None, typer.Option("--out", help="Folder for report.json and sheet.png.")] = None,
    model: Annotated[str | None, typer.Option(help="Model whose tokenizer counts over-long prompts.")] = None,
    strict: Annotated[bool, typer.Option(help="A flawed row is an error.")] = False,
    as_json: AsJson = False,
) -> None:
    """Count what a set of pairs holds: usable pairs, ties, duplicates, unreadable images; with a picture sheet."""
    from ..data.check import check_pairs
    from ..recipe import data_recipe

    changes = [text.removeprefix("data.") for text in overrides or []]
    recipe = data_recipe(path, [*changes, "strict=true"] if strict else changes)
    found = check_pairs(recipe, to, model)
    print(json.dumps(found.json(), indent=1)) if as_json else found.render(out())
