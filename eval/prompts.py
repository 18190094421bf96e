"""Prompt sets: a text, a file, or a set that ships with the package; with ids that do not move. Imports no torch."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError, nearest
from .promptfiles import (
    CATEGORY_COLUMNS,
    ID_COLUMNS,
    PROMPT_COLUMNS,
    SUFFIXES,
    Record,
    answer_of,
    read_records,
    records_of,
)

if TYPE_CHECKING:
    from importlib.abc import Traversable

    from rich.console import Console


@dataclass(frozen=True)
class Prompt:
    """One prompt of a set. ``id`` names it in manifests, score files and noise keys. ``answer``: what a picture of it
    holds, in GenEval's manner ({"tag", "include": [{"class", "count", "color", "position"}], "exclude"})."""

    id: str
    prompt: str
    category: str | None = None
    answer: Record | None = field(default=None, compare=False)


def text_id(prompt: str) -> str:
    """The id of a prompt that brings none: 12 hex digits of its text's sha256.

    It depends on the text alone, so the same prompt keeps its noise and its cached scores in every list it is in."""
    return hashlib.sha256(prompt.encode()).hexdigest()[:12]


def prompts_sha256(prompts: Sequence[Prompt]) -> str:
    """sha256 of the ordered list of (id, text): what two results must share to be compared."""
    digest = hashlib.sha256()
    for item in prompts:
        digest.update(json.dumps([item.id, item.prompt], ensure_ascii=False).encode() + b"\n")
    return digest.hexdigest()


def builtin_sets() -> dict[str, Traversable]:
    """Prompt sets that ship with the package, by name."""
    folder = resources.files("diffalign.assets") / "prompts"
    if not folder.is_dir():
        return {}
    files = sorted(folder.iterdir(), key=lambda file: file.name)
    return {Path(f.name).stem: f for f in files if Path(f.name).suffix in SUFFIXES}


def read_table(source: str | Path) -> list[tuple[int, Record]]:
    """Rows of a prompt file or folder, or of a set by name. Raises UserError when there is neither."""
    path = Path(source)
    if path.suffix in SUFFIXES or path.is_dir():
        if not path.exists():
            raise UserError(f"prompt file '{source}' does not exist; give a {', '.join(SUFFIXES)} file or a set's name")
        return read_records(path)
    sets = builtin_sets()
    if str(source) not in sets:
        raise UserError(f"unknown prompt set '{source}'{nearest(str(source), sets)}")
    file = sets[str(source)]
    return records_of(file.read_bytes(), file.name)


def read_prompts(source: str | Path) -> list[Prompt]:
    """Prompts from a text, a file (.txt, .jsonl, .json, .csv, .tsv, .parquet), a folder of .json lists, or a set that
    ships with the package; layouts in :mod:`.promptfiles`.

    Columns: ``prompt`` (or ``caption``, ``text``, ``Prompt``), and where there are any ``id``, ``category`` and
    GenEval's ``include``. A prompt without an id gets :func:`text_id`; a text that comes again a number behind it.

    Raises:
        UserError: no such file or set, no prompt column, an empty prompt, an id that comes twice, or no prompt at all.
    """
    name = str(source)
    if not name.strip():
        raise UserError("the prompt is empty; give a text, a prompt file or the name of a prompt set")
    if not is_source(name):
        return [Prompt(text_id(name), name)]
    prompts: list[Prompt] = []
    seen: dict[str, int] = {}
    texts: Counter[str] = Counter()
    for number, row in read_table(source):
        text = first_of(row, PROMPT_COLUMNS)
        if text is None or not text.strip():
            have = ", ".join(row) or "none"
            fault = "has an empty prompt" if text is not None else f"has no column 'prompt' (columns: {have})"
            raise UserError(f"line {number} of '{name}' {fault}; every row needs a prompt")
        identity = first_of(row, ID_COLUMNS)
        if identity is None:
            texts[text] += 1
            identity = text_id(text) if texts[text] == 1 else f"{text_id(text)}-{texts[text]}"
        if identity in seen:
            raise UserError(
                f"id '{identity}' stands on lines {seen[identity]} and {number} of '{name}'; ids must differ"
            )
        seen[identity] = number
        prompts.append(Prompt(identity, text, first_of(row, CATEGORY_COLUMNS), answer_of(row)))
    if not prompts:
        raise UserError(f"'{name}' holds no prompt; write one a line")
    return prompts


def set_name(source: str | Path) -> str:
    """What a source of prompts is called in results: a set's or file's name, or "text" for a prompt itself."""
    return Path(source).stem if is_source(str(source)) else "text"


def is_source(name: str) -> bool:
    """Whether a string names a file, a folder or a set; otherwise it is a prompt itself.

    A single word that is close to a set's name counts as that name misspelt, and is refused by the reader."""
    path = Path(name)
    if path.suffix in SUFFIXES and (" " not in name.strip() or path.is_file()):
        return True
    sets = builtin_sets()
    if name in sets or ("/" in name and path.is_dir()):
        return True
    return " " not in name and "-" in name and "did you mean" in nearest(name, sets)


def first_of(row: Mapping[str, object], names: Sequence[str]) -> str | None:
    """The first of these columns that a row has, as text."""
    return next((str(row[name]) for name in names if name in row), None)


@dataclass(frozen=True)
class SetFacts:
    """What `diffalign prompts` says about a set."""

    name: str
    prompts: list[Prompt]

    def json(self) -> dict[str, object]:
        """Counts and the hash that results carry."""
        return {
            "name": self.name,
            "prompts": len(self.prompts),
            "sha256": prompts_sha256(self.prompts),
            "categories": dict(Counter(p.category for p in self.prompts if p.category is not None)),
            "with_answers": sum(p.answer is not None for p in self.prompts),
            "longest_words": max(len(p.prompt.split()) for p in self.prompts),
        }

    def render(self, console: Console) -> None:
        """A table of categories with an example each."""
        from rich.table import Table

        facts = self.json()
        answers = f", {facts['with_answers']} with answers" if facts["with_answers"] else ""
        console.print(f"{self.name}: {facts['prompts']} prompts{answers}; sha256 {facts['sha256']}", highlight=False)
        table = Table("category", "prompts", "example")
        groups: dict[str, list[Prompt]] = {}
        for prompt in self.prompts:
            groups.setdefault(prompt.category or "", []).append(prompt)
        for name, found in groups.items():
            example = found[0].prompt
            table.add_row(name, str(len(found)), example if len(example) <= 80 else f"{example[:79]}…")
        console.print(table, markup=False)


def describe_set(source: str | Path) -> SetFacts:
    """Read a set and name it. Raises UserError as :func:`read_prompts`, and for a bare text."""
    if not is_source(str(source)):
        raise UserError(f"unknown prompt set '{source}'{nearest(str(source), builtin_sets())}")
    return SetFacts(set_name(source), read_prompts(source))
