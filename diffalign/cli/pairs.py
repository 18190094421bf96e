"""Commands on preference pairs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from .common import AsJson, Device, Dtype, Overrides, Quiet, app, is_main, out, sampling_options

pairs = typer.Typer(help="Preference pairs: check, convert, caption, score, make, label, split.", no_args_is_help=True)
app.add_typer(pairs, name="pairs")

Source = Annotated[str, typer.Argument(help="Pairs in any format that `pairs check` takes.", metavar="SRC")]
Target = Annotated[Path, typer.Argument(help="Folder to write.", metavar="DST")]
Limit = Annotated[int | None, typer.Option("--max", min=1, help="Stop after that many rows.")]
Link = Annotated[bool, typer.Option("--link/--copy", help="Link to picture files instead of copying.")]
Strict = Annotated[bool, typer.Option(help="A flawed row is an error.")]
Form = Annotated[
    Literal["folder", "jsonl", "csv", "parquet", "datasets", "webdataset", "pickapic"],
    typer.Option("--format", help="Of DST."),
]


def data_changes(overrides: list[str] | None, strict: bool, ties: str = "keep", limit: int | None = None) -> list[str]:
    """Overrides of the data section for commands that write rows anew: all of them, unless others are asked for."""
    changes = [f"ties={ties}", "duplicates=keep", *(text.removeprefix("data.") for text in overrides or [])]
    return changes + [f"max_pairs={limit}"] * (limit is not None) + ["strict=true"] * strict


@pairs.command("check")
def pairs_check(
    path: Annotated[str, typer.Argument(help="Folder, .jsonl, .csv, Parquet, .tar shards, datasets folder, hub id.")],
    overrides: Overrides = None,
    to: Annotated[Path | None, typer.Option("--out", help="Folder for report.json and sheet.png.")] = None,
    model: Annotated[str | None, typer.Option(help="Model whose tokenizer counts over-long prompts.")] = None,
    strict: Strict = False,
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
    source: Source,
    target: Target,
    overrides: Overrides = None,
    form: Form = "folder",
    limit: Limit = None,
    resize: Annotated[int | None, typer.Option(min=8, help="Shorter side of larger pictures in pixels.")] = None,
    quality: Annotated[int | None, typer.Option(min=1, max=100, help="Write pictures anew as JPEG.")] = None,
    link: Link = False,
    strict: Strict = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Write pairs, rated pictures or ranked lists in another format; pictures keep their bytes.

    A killed conversion goes on where it was. Further scores of lists go along with data.rewards=[NAME,...]."""
    from ..console import Console
    from ..data.convert import ConvertOptions, convert_pairs
    from ..recipe import data_recipe

    changes = data_changes(overrides, strict, limit=limit)
    options = ConvertOptions(form, resize, quality, link)
    found = convert_pairs(data_recipe(source, changes), target, options, Console(not quiet).counting("converting"))
    print(json.dumps(found.json(), indent=1)) if as_json else found.render(out())


@pairs.command("caption")
def pairs_caption(
    source: Source,
    target: Target,
    overrides: Overrides = None,
    strategy: Annotated[
        Literal["caption", "perturb", "hybrid"],
        typer.Option(help="Say what each picture shows; perturb the loser's caption; or both."),
    ] = "perturb",
    captioner: Annotated[str | None, typer.Option(help="Image-to-text model: folder or hub id.")] = None,
    perturber: Annotated[str, typer.Option(help="Text model (folder or hub id), or rules.")] = "rules",
    level: Annotated[Literal["weak", "medium", "strong"], typer.Option(help="Of perturbation.")] = "medium",
    tokenizer: Annotated[str | None, typer.Option(help="The perturber's, where it is not with it.")] = None,
    instruction: Annotated[
        str | None, typer.Option(help="What a chat model is told; {prompt} stands for the pair's prompt.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest caption.")] = 128,
    batch: Annotated[int, typer.Option(min=1, help="Pairs at a time.")] = 8,
    seed: Annotated[int, typer.Option(min=0, help="Of the perturbation.")] = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    form: Annotated[
        Literal["folder", "jsonl", "csv", "parquet", "datasets", "webdataset"], typer.Option("--format", help="Of DST.")
    ] = "folder",
    limit: Limit = None,
    link: Link = False,
    strict: Strict = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Give each picture of a pair a caption of its own, for DCPO. A killed run goes on where it was."""
    from ..console import Console
    from ..data.caption import CaptionOptions, caption_pairs
    from ..data.convert import ConvertOptions
    from ..recipe import data_recipe

    changes = data_changes(overrides, strict, limit=limit)
    given = {"instruction": instruction} if instruction else {}
    captions = CaptionOptions(
        strategy, captioner, perturber, level, tokenizer, max_tokens=max_tokens, batch=batch, seed=seed,
        device=device, dtype=dtype, **given,
    )  # fmt: skip
    shown = Console(not quiet and is_main()).counting("captioning batches")
    found = caption_pairs(data_recipe(source, changes), target, ConvertOptions(form, link=link), captions, shown)
    if is_main():
        print(json.dumps(found.json(), indent=1)) if as_json else found.render(out())


@pairs.command("teacher")
@sampling_options
def pairs_teacher(
    model: Annotated[str, typer.Argument(help="The teacher: a diffusers folder, hub id or built-in name.")],
    target: Annotated[Path, typer.Argument(help="Folder to write.", metavar="DST")],
    prompts: Annotated[str, typer.Option(help="A prompt file or built-in set.")],
    sampling: dict[str, Any],
    lora: Annotated[str | None, typer.Option(help="LoRA file, folder, or run's folder.")] = None,
    lora_scale: Annotated[float, typer.Option(help="Strength of the LoRA.")] = 1.0,
    quiet: Quiet = False,
) -> None:
    """The teacher's pictures of known noise, for DMD's regression. A killed run goes on where it was."""
    from ..data.teacher import teacher_pairs
    from ..eval.prompts import read_prompts
    from ..pipelines.sample import SampleSpec

    print(teacher_pairs(SampleSpec(model, lora, lora_scale, **sampling), read_prompts(prompts), target, not quiet))
