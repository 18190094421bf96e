"""Rows that are prompts alone: from a list of prompts, a set that ships with the package, or any set of pictures."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ..recipe import DataRecipe
from .filters import Names
from .reading import Progress, Reading, draft_or_flaw, prompt_column, prompt_of, settle
from .rows import BadRow, PromptRow, Report, digest_of
from .rowtable import PromptRows
from .table import Table

LISTS = (".txt", ".tsv")  # lists of prompts, never of pictures
CHUNK = 4096


def is_prompt_list(path: str) -> bool:
    """Whether ``data.path`` is a file of prompts or a prompt set's name, rather than a table of rows."""
    from ..eval.prompts import builtin_sets

    return Path(path).suffix in LISTS or (path in builtin_sets() and not Path(path).exists())


def read_prompt_list(recipe: DataRecipe) -> tuple[PromptRows, Report]:
    """The prompts of a .txt or .tsv file or of a set by name (``diffalign prompts``), with the ids they have there.

    Raises:
        UserError: as ``eval.prompts.read_prompts``.
    """
    from ..eval.prompts import read_prompts

    found = read_prompts(recipe.path)
    rows, report = PromptRows(), Report(recipe.path, "prompts", rows=len(found), available=len(found))
    seen = Names()
    for prompt in found:
        if recipe.duplicates == "skip" and not _fresh(prompt.prompt, seen):
            report.repeated += 1
            continue
        rows.append(PromptRow(prompt.id, prompt.prompt))
        if len(rows) == recipe.max_pairs:
            break
    settle(report, len(rows), recipe, "prompt")
    return rows, report


def open_prompts(recipe: DataRecipe, progress: Progress | None, table: Table) -> Reading[PromptRow]:
    """The different prompts (column ``prompt``, ``caption`` or ``text``) of a table, one after another; its pictures
    are not looked at. Ids are a hash of the prompt. ``max_pairs`` counts prompts.

    Raises UserError as ``read_pairs``; what it raises at its end comes after the last row."""
    column = prompt_column(table)
    report = Report(table.label, table.format, rows=len(table.bad), bad=list(table.bad))

    def rows() -> Iterator[PromptRow]:
        seen, i = Names(), 0
        while table.exists(i):
            found = draft_or_flaw(table, i, lambda place: prompt_of(table, place, column))
            report.rows += 1
            i += 1
            if isinstance(found, BadRow):
                report.bad.append(found)
            elif _fresh(found, seen):
                report.usable += 1
                yield PromptRow(_id(found), found)
            else:
                report.repeated += 1
            if progress is not None and i % CHUNK == 0:
                progress(i, table.total or 0)
            if report.usable == recipe.max_pairs:
                break
        report.available = len(table.bad) + (table.total or i)
        settle(report, report.usable, recipe, "prompt")

    return Reading(table, report, rows())


def _id(prompt: str) -> str:
    return digest_of(prompt.encode())[:20]


def _fresh(prompt: str, seen: Names) -> bool:
    """Whether a prompt is new; from now on it is not."""
    if _id(prompt) in seen:
        return False
    seen.take(_id(prompt))
    return True
