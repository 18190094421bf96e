"""Commands on preference pairs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from .common import AsJson, Overrides, Quiet, app, out

pairs = typer.Typer(help="Preference pairs: check, convert.", no_args_is_help=True)
app.add_typer(pairs, name="pairs")


@pairs.command("check")
def pairs_check(
    path: Annotated[str, typer.Argument(help="Folder, .jsonl, .csv, Parquet, .tar shards, datasets folder, hub id.")],
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


@pairs.command("convert")
def pairs_convert(
    source: Annotated[str, typer.Argument(help="Pairs in any format that `pairs check` takes.", metavar="SRC")],
    target: Annotated[Path, typer.Argument(help="Folder to write.", metavar="DST")],
    overrides: Overrides = None,
    form: Annotated[
        Literal["folder", "jsonl", "csv", "parquet", "datasets", "webdataset", "pickapic"],
        typer.Option("--format", help="Of DST."),
    ] = "folder",
    limit: Annotated[int | None, typer.Option("--max", min=1, help="Stop after that many pairs.")] = None,
    resize: Annotated[int | None, typer.Option(min=8, help="Shorter side of larger pictures in pixels.")] = None,
    quality: Annotated[int | None, typer.Option(min=1, max=100, help="Write pictures anew as JPEG.")] = None,
    link: Annotated[bool, typer.Option("--link/--copy", help="Link to picture files instead of copying.")] = False,
    strict: Annotated[bool, typer.Option(help="A flawed row is an error.")] = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Write pairs in another format; pictures keep their bytes. A killed conversion goes on where it was."""
    from ..console import Console
    from ..data.convert import ConvertOptions, convert_pairs
    from ..recipe import data_recipe

    changes = ["ties=keep", "duplicates=keep", *(text.removeprefix("data.") for text in overrides or [])]
    changes += [f"max_pairs={limit}"] * (limit is not None) + ["strict=true"] * strict
    options = ConvertOptions(form, resize, quality, link)
    found = convert_pairs(data_recipe(source, changes), target, options, Console(not quiet).counting("converting"))
    print(json.dumps(found.json(), indent=1)) if as_json else found.render(out())
