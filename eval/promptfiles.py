"""Files that hold prompts, as records: text, JSON lines, JSON, CSV, TSV and Parquet in the layouts of the usual sets.

Recognised: PartiPrompts' TSV, HPDv2's JSON lists (a file a style, or a folder of them), GenEval's metadata, COCO's
captions, and Pick-a-Pic's Parquet, where each caption is taken once. Imports no torch; pyarrow only for Parquet.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from ..errors import UserError

PROMPT_COLUMNS = ("prompt", "caption", "text", "Prompt")
ID_COLUMNS = ("id", "prompt_id")
CATEGORY_COLUMNS = ("category", "Category", "tag", "style")
SUFFIXES = (".txt", ".jsonl", ".json", ".csv", ".tsv", ".parquet")
PAIR_COLUMNS = frozenset({"label_0", "ranking_id", "are_different"})  # Pick-a-Pic: a caption in many rows

Record = dict[str, object]


def read_records(path: Path) -> list[tuple[int, Record]]:
    """(line or entry, columns) of every prompt in a file, or in a folder of .json lists.

    Raises UserError for a file that is not what its suffix says."""
    if path.is_dir():
        files = sorted(path.glob("*.json"))
        if not files:
            raise UserError(f"folder '{path}' holds no .json list of prompts; give a file ({', '.join(SUFFIXES)})")
        return [row for file in files for row in records_of(file.read_bytes(), file.name, style=file.stem)]
    return records_of(path.read_bytes(), str(path))


def records_of(data: bytes, source: str, style: str | None = None) -> list[tuple[int, Record]]:
    """Records of a file's bytes; ``source`` names it in messages and gives the suffix."""
    suffix = Path(source).suffix
    if suffix == ".parquet":
        return list(_parquet(data, source))
    text = _decode(data, source)
    if suffix == ".txt":
        return [(n, {"prompt": line.strip()}) for n, line in enumerate(text.splitlines(), 1) if line.strip()]
    if suffix == ".jsonl":
        return list(_jsonl(text, source))
    if suffix == ".json":
        return list(_json(text, source, style))
    # Tab-separated sets such as PartiPrompts carry bare quotes: quoting rules would eat them.
    lines = text.splitlines()
    reader = (
        csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE) if suffix == ".tsv" else csv.DictReader(lines)
    )
    return [(reader.line_num, {k: v for k, v in row.items() if k is not None and v}) for row in reader]


def answer_of(record: Mapping[str, object]) -> Record | None:
    """What GenEval's judge needs of a record: ``tag``, ``include``, ``exclude``; None where there is none."""
    include = record.get("include")
    if not isinstance(include, list):
        return None
    return {k: record[k] for k in ("tag", "include", "exclude") if k in record}


def _jsonl(text: str, source: str) -> Iterator[tuple[int, Record]]:
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"line {number} of '{source}' is not JSON: {error.msg}; write one object a line") from error
        if not isinstance(row, dict):
            raise UserError(f"line {number} of '{source}' is not a JSON object; write {{\"prompt\": ...}}")
        yield number, {k: v for k, v in row.items() if v is not None}


def _json(text: str, source: str, style: str | None) -> Iterator[tuple[int, Record]]:
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"'{source}' is not JSON: {error.msg} (line {error.lineno})") from error
    if isinstance(data, dict) and isinstance(data.get("annotations"), list):  # COCO captions
        yield from enumerate(_objects(data["annotations"], source), 1)
    elif isinstance(data, dict) and data and all(isinstance(v, list) for v in data.values()):  # style -> prompts
        for name, found in data.items():
            yield from _listed(found, source, name)
    elif isinstance(data, list):
        yield from _listed(data, source, style)
    else:
        raise UserError(f'\'{source}\' holds no list of prompts; write ["a prompt", ...] or {{"style": [...]}}')


def _listed(found: list[object], source: str, style: str | None) -> Iterator[tuple[int, Record]]:
    """A JSON list: texts (named by style and place, as HPDv2's images are) or objects."""
    if not all(isinstance(entry, str) for entry in found):
        yield from enumerate(_objects(found, source), 1)
        return
    for place, entry in enumerate(found):
        named = {} if style is None else {"id": f"{style}-{place:05d}", "category": style}
        yield place + 1, {"prompt": entry, **named}


def _objects(found: list[object], source: str) -> list[Record]:
    wrong = next((n for n, entry in enumerate(found, 1) if not isinstance(entry, dict)), None)
    if wrong is not None:
        raise UserError(f"entry {wrong} of '{source}' is neither a text nor an object; write {{\"prompt\": ...}}")
    return [{k: v for k, v in entry.items() if v is not None} for entry in found if isinstance(entry, dict)]


def _parquet(data: bytes, source: str) -> Iterator[tuple[int, Record]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(pa.BufferReader(data))
        have = file.schema_arrow.names
        wanted = [c for c in (*PROMPT_COLUMNS, *ID_COLUMNS, *CATEGORY_COLUMNS, "image", "file_name") if c in have]
        plain = [c for c in wanted if not pa.types.is_struct(file.schema_arrow.field(c).type)]
        plain = [c for c in plain if not pa.types.is_binary(file.schema_arrow.field(c).type)]
        rows = file.read(columns=plain).to_pylist()
    except (OSError, ValueError) as error:
        raise UserError(f"'{source}' is not a Parquet file ({error})") from error
    seen: set[object] = set()
    for number, row in enumerate(rows, 1):
        if not PAIR_COLUMNS.isdisjoint(have):
            text = next((row[c] for c in PROMPT_COLUMNS if c in row), None)
            if text in seen:
                continue
            seen.add(text)
        yield number, {k: v for k, v in row.items() if v is not None}


def _decode(data: bytes, source: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"'{source}' is not UTF-8 text (byte {error.start}); save it as UTF-8") from error
