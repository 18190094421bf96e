"""Commands that give pairs their scores, and prompts their parts: score, make, split."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from .common import AsJson, BatchSize, Device, Dtype, Overrides, Quiet, is_main, out, print_rows, sampling_options
from .pairs import Form, Link, Source, Strict, Target, data_changes, pairs

Scorers = Annotated[str, typer.Option(help="Names, comma-separated; name=PATH for own weights.")]
Weights = Annotated[str, typer.Option(help="Of the scorers in the mix, such as a=1,b=0.5; each 1 if not given.")]


@pairs.command("score")
def pairs_score(
    source: Source,
    target: Target,
    scorers: Scorers,
    overrides: Overrides = None,
    weights: Weights = "",
    relabel: Annotated[bool, typer.Option(help="The higher score is the chosen picture.")] = False,
    tie_gap: Annotated[float, typer.Option(help="With --relabel: scores no further apart are a tie.")] = 0.0,
    ties: Annotated[Literal["keep", "skip", "random"], typer.Option(help="What becomes of ties.")] = "keep",
    form: Form = "folder",
    link: Link = False,
    batch: BatchSize = 32,
    device: Device = "auto",
    dtype: Dtype = "auto",
    strict: Strict = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Write pairs with score columns, and new labels if wished; resumes picture by picture, shares the work."""
    from ..console import Console
    from ..data.convert import ConvertOptions
    from ..data.mix import parse_weights
    from ..data.rescore import Rescoring, score_pairs
    from ..eval.scorers import parse_scorers
    from ..recipe import data_recipe

    how = Rescoring(parse_weights(weights, list(parse_scorers(scorers))), relabel, tie_gap)
    found = score_pairs(
        data_recipe(source, data_changes(overrides, strict, ties)),
        target,
        scorers,
        how,
        ConvertOptions(form, link=link),
        batch=batch,
        device=device,
        dtype=dtype,
        bar=not quiet,
        progress=Console(not quiet).counting("writing"),
    )
    if found is not None:
        print(json.dumps(found.json(), indent=1)) if as_json else found.render(out())


@pairs.command("make")
@sampling_options
def pairs_make(
    models: Annotated[list[str], typer.Argument(help="Generators: [LABEL=]MODEL[+LORA[@SCALE]]; several compete.")],
    prompts: Annotated[str, typer.Option(help="A prompt file, built-in set, or the prompt itself.")],
    scorers: Scorers,
    to: Annotated[Path, typer.Option("--out", help="Folder for pictures, scores and metadata.jsonl.")],
    sampling: dict[str, Any],
    form: Annotated[Literal["pairs", "ranked"], typer.Option("--as", help="What to write.")] = "pairs",
    weights: Weights = "",
    mix: Annotated[
        Literal["auto", "wins", "scores"],
        typer.Option(help="Share of duels won, or mean of scores; auto: a single scorer's scores, else wins."),
    ] = "auto",
    choose: Annotated[
        Literal["best-worst", "adjacent", "all"], typer.Option(help="Which pairs of a prompt's ranking.")
    ] = "best-worst",
    gap: Annotated[float, typer.Option(help="Least difference of the two scores (of a list's ends).")] = 0.0,
    ties: Annotated[Literal["skip", "keep"], typer.Option(help="Equal scores: leave out, or keep as a tie.")] = "skip",
    dedup: Annotated[Literal["exact", "none"], typer.Option(help="Leave out equal pictures of a prompt.")] = "exact",
    near: Annotated[int | None, typer.Option(help="... and those within so many of 64 bits of their hash.")] = None,
    score_batch: Annotated[int, typer.Option(help="Images a forward of a scorer.", min=1)] = 32,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Sample, score and rank: pairs or ranked lists of your own models; resumes image by image, shares the work."""
    from ..data.make import MakeOptions, make_pairs
    from ..pipelines.spec import Sampling

    options = MakeOptions(form, mix, choose, gap, ties, dedup, near)
    found = make_pairs(
        models,
        prompts,
        scorers,
        to,
        options,
        weights=weights,
        sampling=Sampling(**sampling),
        score_batch=score_batch,
        progress=not quiet,
    )
    if found is not None and is_main():
        print(json.dumps(found.json(), indent=1)) if as_json else found.render(out())


@pairs.command("split")
def pairs_split(
    prompts: Annotated[str, typer.Argument(help="A prompt file or built-in set.")],
    to: Annotated[Path, typer.Argument(help="Folder for partition.json and a prompt file a part.", metavar="DST")],
    words: Annotated[
        Path | None, typer.Option(help="YAML of part: [words]; the part without words takes the rest.")
    ] = None,
    clusters: Annotated[int | None, typer.Option(help="... or so many parts by what the prompts say.", min=1)] = None,
    model: Annotated[str | None, typer.Option(help="With --clusters: the model whose text encoder reads them.")] = None,
    as_json: AsJson = False,
) -> None:
    """Part prompts for multi-student distillation: each PART.tsv trains a student, and `sample` takes them all."""
    from omegaconf import OmegaConf

    from ..errors import UserError
    from ..eval.prompts import read_prompts
    from ..partition import by_clusters, by_words, features_of, split_prompts
    from ..recipe import read_yaml

    if (words is None) == (clusters is None):
        raise UserError("say how to part the prompts: --words FILE, or --clusters N with --model")
    if clusters is not None and model is None:
        raise UserError("--clusters needs --model, whose text encoder reads the prompts")
    features = None
    if words is not None:
        if words.suffix not in {".yaml", ".yml"} or not words.is_file():
            raise UserError(f"--words {words} is no YAML file; write one of part: [words], and one part without words")
        found: Any = OmegaConf.to_container(read_yaml(str(words)))
        partition = by_words(found)
    else:
        assert clusters is not None and model is not None
        features = features_of(model)
        partition = by_clusters(features([p.prompt for p in read_prompts(prompts)]), clusters)
    counts = split_prompts(prompts, to, partition, features)
    rows = [{"part": name, "prompts": count, "file": str(to / f"{name}.tsv")} for name, count in counts.items()]
    print_rows(rows, ["part", "prompts", "file"], as_json)
