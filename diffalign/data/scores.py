"""``data.scorer``: the scores of a run's own pictures by a scorer of the eval suite, in the place of score columns.

Each picture is scored once, as it was given (not as it was cropped for training), and the cache keeps the numbers under
the scorer's fingerprint: its weights, its preprocessing, its number format.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..errors import RunError, UserError
from ..recipe import DataRecipe
from .images import ImageError
from .reading import coin
from .scan import workers

if TYPE_CHECKING:
    from numpy import ndarray

    from ..eval.scorers import Scorer
    from .cache import LatentCache
    from .rows import ImageRef

# The column of each picture's score.
COLUMNS = {"chosen": "chosen_score", "rejected": "rejected_score", "image": "score"}


def check_scorer(recipe: DataRecipe) -> None:
    """Raises UserError for a ``data.scorer`` that is none, or several, or cannot see the pictures again."""
    if recipe.scorer is None:
        return
    from ..eval.scorers import parse_scorers

    if len(parse_scorers(recipe.scorer)) > 1:
        raise UserError(
            f"data.scorer takes one scorer, not '{recipe.scorer}'; mix several with `diffalign pairs score`"
        )
    if recipe.streaming:
        raise UserError(
            "data.scorer needs the pictures a second time and data.streaming reads them once; set data.streaming=false "
            "or write the scores into the data with `diffalign pairs score`"
        )


def score_rows(
    cache: LatentCache, device: str, say: Callable[[str], None], progress: Callable[[int, int], None] | None = None
) -> None:
    """Puts the scores of ``data.scorer`` into ``cache.extra``, where they stand before the data's own: of pairs
    ``chosen_score`` and ``rejected_score`` (both pictures for the row's prompt), of captioned pictures ``score``.

    Raises:
        UserError: as `check_scorer`; rows without pictures or of lists; prompts that the scorer cannot judge.
        RunError: a picture changed meanwhile.
    """
    recipe = cache.recipe
    if recipe.scorer is None:
        return
    check_scorer(recipe)
    sides = cache.rows.sides
    if not sides or not set(sides) <= set(COLUMNS):
        raise UserError(
            "data.scorer scores pairs and captioned pictures, not lists or prompts; ranked lists get scores from "
            "`diffalign pairs make`"
        )
    from ..eval.scorers import load_scorer

    scorer = load_scorer(recipe.scorer, device=device)
    texts = [text for part in cache.rows.distinct_prompts() for text in part]
    scorer.check_prompts(texts)
    scorer.plan_texts(texts)  # a reweighted scorer weighs all prompts of the data, whatever batch they come in
    note = f" (in the place of the data's own {COLUMNS[sides[0]]})" if COLUMNS[sides[0]] in cache.rows.columns else ""
    say(f"scores by {scorer.name}, {scorer.fingerprint_id}{note}")
    with ThreadPoolExecutor(workers(), "score") as pool:

        def compute(chosen: Sequence[int]) -> dict[str, torch.Tensor]:
            rows = [cache.rows[i] for i in chosen]
            refs = [row.images[side] for side in sides for row in rows]
            prepared = list(pool.map(lambda ref: _prepare(scorer, ref), refs))
            values = scorer.score_prepared(prepared, [row.prompt for row in rows] * len(sides)).values
            return {COLUMNS[side]: part for side, part in zip(sides, values.chunk(len(sides)), strict=True)}

        made_by = {"scorer": json.dumps(scorer.fingerprint, sort_keys=True)}
        found = cache.table(made_by, compute, recipe.encode_batch, progress)
    columns = {name: values.numpy() for name, values in found.items()}
    if recipe.shuffle_labels and "rejected" in sides:  # as the readers do: scores follow the label, or the order shows
        swapped = np.array([coin("shuffle_labels", name) for name in cache.ids])
        a, b = columns["chosen_score"], columns["rejected_score"]
        columns |= {"chosen_score": np.where(swapped, b, a), "rejected_score": np.where(swapped, a, b)}
    cache.extra |= columns


def _prepare(scorer: Scorer, ref: ImageRef) -> ndarray:
    from ..eval.preprocess import decode

    try:
        return scorer.prepare(decode(ref.read()).image)
    except (ImageError, OSError, ValueError, SyntaxError) as error:
        raise RunError(f"picture '{ref.name}' cannot be read any more ({error}); start again") from error


def within_gap(cache: LatentCache, min_gap: float | None) -> ndarray:
    """(n,) bool: rows whose ``chosen_score`` exceeds ``rejected_score`` by ``min_gap``; all where there is none."""
    if min_gap is None:
        return np.ones(len(cache), bool)
    kept: ndarray = cache.values("chosen_score") - cache.values("rejected_score") >= min_gap
    return kept
