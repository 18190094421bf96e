"""Prompt sets: a text, a file, or a set that ships with the package; with ids that do not move. Imports no torch."""

from __future__ import annotations

import csv
import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError, nearest

if TYPE_CHECKING:
    from importlib.abc import Traversable

PROMPT_COLUMNS = ("prompt", "caption", "text", "Prompt")
ID_COLUMNS = ("id", "prompt_id")
CATEGORY_COLUMNS = ("category", "Category", "tag")
SUFFIXES = (".txt", ".jsonl", ".csv", ".tsv")


@dataclass(frozen=True)
class Prompt:
    """One prompt of a set. ``id`` names it in manifests, score files and noise keys."""

    id: str
    prompt: str
    category: str | None = None


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


def read_rows(text: str, suffix: str, source: str) -> Iterator[tuple[int, dict[str, str]]]:
    """The rows of a prompt file as (line number, columns). A .txt line becomes ``{"prompt": line}``.

    Raises UserError for a line that is not JSON or holds no object."""
    if suffix == ".txt":
        yield from ((n, {"prompt": line.strip()}) for n, line in enumerate(text.splitlines(), 1) if line.strip())
    elif suffix == ".jsonl":
        for number, line in enumerate(text.splitlines(), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(
                    f"line {number} of '{source}' is not JSON: {error.msg}; write one object a line"
                ) from error
            if not isinstance(row, dict):
                raise UserError(f"line {number} of '{source}' is not a JSON object; write {{\"prompt\": ...}}")
            yield number, {k: v if isinstance(v, str) else str(v) for k, v in row.items() if v is not None}
    else:
        # Tab-separated sets such as PartiPrompts carry bare quotes: quoting rules would eat them.
        lines = text.splitlines()
        tabs = suffix == ".tsv"
        reader = csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE) if tabs else csv.DictReader(lines)
        for row in reader:
            yield reader.line_num, {k: v for k, v in row.items() if k is not None and isinstance(v, str) and v != ""}


def read_table(source: str | Path) -> list[tuple[int, dict[str, str]]]:
    """Rows of a prompt file, or of a set by name. Raises UserError when there is neither."""
    path = Path(source)
    if path.suffix in SUFFIXES:
        if not path.is_file():
            raise UserError(f"prompt file '{source}' does not exist; give a {', '.join(SUFFIXES)} file or a set's name")
        return list(read_rows(_decode(path.read_bytes(), str(source)), path.suffix, str(source)))
    sets = builtin_sets()
    if str(source) not in sets:
        raise UserError(f"unknown prompt set '{source}'{nearest(str(source), sets)}")
    file = sets[str(source)]
    return list(read_rows(_decode(file.read_bytes(), str(source)), Path(file.name).suffix, str(source)))


def read_prompts(source: str | Path) -> list[Prompt]:
    """Prompts from a text, a .txt, .jsonl, .csv or .tsv file, or a set that ships with the package.

    Columns: ``prompt`` (or ``caption``, ``text``, ``Prompt``), and where there are any ``id`` and ``category``.
    A prompt without an id gets :func:`text_id`; a text that comes again gets a number behind it.

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
        text = _first(row, PROMPT_COLUMNS)
        if text is None or not text.strip():
            have = ", ".join(row) or "none"
            fault = "has an empty prompt" if text is not None else f"has no column 'prompt' (columns: {have})"
            raise UserError(f"line {number} of '{name}' {fault}; every row needs a prompt")
        identity = _first(row, ID_COLUMNS)
        if identity is None:
            texts[text] += 1
            identity = text_id(text) if texts[text] == 1 else f"{text_id(text)}-{texts[text]}"
        if identity in seen:
            raise UserError(
                f"id '{identity}' stands on lines {seen[identity]} and {number} of '{name}'; ids must differ"
            )
        seen[identity] = number
        prompts.append(Prompt(identity, text, _first(row, CATEGORY_COLUMNS)))
    if not prompts:
        raise UserError(f"'{name}' holds no prompt; write one a line")
    return prompts


def set_name(source: str | Path) -> str:
    """What a source of prompts is called in results: a set's or file's name, or "text" for a prompt itself."""
    return Path(source).stem if is_source(str(source)) else "text"


def is_source(name: str) -> bool:
    """Whether a string names a file or a set; otherwise it is a prompt itself.

    A single word that is close to a set's name counts as that name misspelt, and is refused by the reader."""
    if Path(name).suffix in SUFFIXES and (" " not in name.strip() or Path(name).is_file()):
        return True
    sets = builtin_sets()
    return name in sets or (" " not in name and "-" in name and "did you mean" in nearest(name, sets))


def _first(row: Mapping[str, str], names: Sequence[str]) -> str | None:
    return next((row[name] for name in names if name in row), None)


def _decode(data: bytes, source: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"'{source}' is not UTF-8 text (byte {error.start}); save it as UTF-8") from error
