"""Score files: one row an (image, scorer), as JSON lines or Parquet, with a sidecar that says how they were made."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from ..errors import UserError

SUFFIXES = (".jsonl", ".parquet")
FORMAT = 1


@dataclass(frozen=True)
class Row:
    """A score, or the reason why there is none (``error``; then ``value`` is None).

    ``flags``: truncated (the prompt), alpha (laid on white), rotated (EXIF)."""

    id: str
    prompt: str
    k: int
    seed: int | None
    category: str | None
    image: str
    image_sha256: str | None
    scorer: str
    fingerprint: str
    value: float | None
    parts: dict[str, float] = field(default_factory=dict)
    flags: list[str] = field(default_factory=list)
    error: str | None = None

    def json(self) -> str:
        return json.dumps(asdict(self), ensure_ascii=False)


Key = tuple[str, int, str]  # id, k, scorer


def key_of(row: Row) -> Key:
    """What names a row within its file."""
    return row.id, row.k, row.scorer


@dataclass
class Meta:
    """The sidecar ``<name>.meta.json``: what must agree before two score files are compared."""

    prompts_sha256: str
    prompts: int
    images: int
    scorers: dict[str, dict[str, str]]  # name -> full fingerprint
    sampling: dict[str, object] = field(default_factory=dict)  # sample.json beside the images, when there was one
    notes: list[str] = field(default_factory=list)
    folder: str | None = None  # what image names are relative to, seen from the score file's folder
    prompt_set: str | None = None  # what the list of prompts is called
    conventions: dict[str, str] = field(default_factory=dict)  # scorer -> what a report has to state of it
    complete: bool = False
    rows: int | None = None  # of a complete file
    format: int = FORMAT


@dataclass(frozen=True)
class ScoreFile:
    """A score file as read back."""

    path: Path
    rows: list[Row]
    meta: Meta


def meta_path(path: Path) -> Path:
    """scores.jsonl -> scores.meta.json"""
    return path.with_suffix(".meta.json")


def read_score_file(source: str | Path) -> ScoreFile:
    """A score file, or the one in a folder (``scores.jsonl`` or ``scores.parquet``, else the only one there).

    Raises UserError when there is none, when it was cut short before it was finished, or is no score file."""
    path = Path(source)
    if path.is_dir():
        path = _find(path)
    if not path.is_file():
        raise UserError(f"score file '{source}' does not exist; make one with `diffalign score`")
    meta = read_meta(path)
    if meta is None:
        raise UserError(f"'{path}' has no {meta_path(path).name} beside it, so its scorers are unknown; score again")
    if not meta.complete:
        raise UserError(
            f"'{path}' is unfinished: its scoring was stopped; run the same `diffalign score` command to go on"
        )
    rows = read_rows(path)
    if meta.rows is not None and len(rows) != meta.rows:
        raise UserError(f"'{path}' is half written: {len(rows)} of {meta.rows} rows; run `diffalign score` again")
    return ScoreFile(path, rows, meta)


def read_meta(path: Path) -> Meta | None:
    """The sidecar of a score file, or None. Raises UserError when it is of another format."""
    file = meta_path(path)
    if not file.is_file():
        return None
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        if data.get("format") != FORMAT:
            raise UserError(f"'{file}' has format {data.get('format')}, this version reads {FORMAT}; score again")
        return Meta(**data)
    except (json.JSONDecodeError, TypeError, AttributeError) as error:
        raise UserError(f"'{file}' is not the sidecar of a score file ({error}); delete it and score again") from error


def read_rows(path: Path) -> list[Row]:
    """Rows of a .jsonl or .parquet score file. A last line that was torn by a kill is left out.

    Raises UserError for anything else that does not read as a row."""
    known = {f.name for f in fields(Row)}
    if path.suffix == ".parquet":
        import pyarrow.parquet as pq

        try:
            records = pq.read_table(path).to_pylist()
        except (OSError, ValueError) as error:
            raise UserError(f"'{path}' is not a Parquet score file ({error})") from error
        for record in records:
            record["parts"] = json.loads(record.get("parts") or "{}")
    else:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        records = []
        for number, line in enumerate(lines, 1):
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError as error:
                if number == len(lines) and not line.endswith("\n"):
                    break
                raise UserError(f"line {number} of '{path}' is not JSON; it is no score file") from error
    for record in records:
        if not isinstance(record, dict) or not known >= set(record) or "scorer" not in record or "value" not in record:
            raise UserError(f"'{path}' is no score file; choose another name for the scores")
    return [Row(**record) for record in records]


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write a whole score file at once: a temporary file takes the place of the old one."""
    temporary = path.with_name(path.name + ".tmp")
    if path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        schema = pa.schema(
            [(n, pa.string()) for n in ("id", "prompt")]
            + [("k", pa.int64()), ("seed", pa.int64())]
            + [(n, pa.string()) for n in ("category", "image", "image_sha256", "scorer", "fingerprint")]
            + [
                ("value", pa.float64()),
                ("parts", pa.string()),
                ("flags", pa.list_(pa.string())),
                ("error", pa.string()),
            ]
        )
        pq.write_table(
            pa.Table.from_pylist([{**asdict(r), "parts": json.dumps(r.parts)} for r in rows], schema), temporary
        )
    else:
        temporary.write_text("".join(row.json() + "\n" for row in rows), encoding="utf-8")
    os.replace(temporary, path)


def write_meta(path: Path, meta: Meta) -> None:
    """Write the sidecar of a score file, whole or not at all."""
    file = meta_path(path)
    temporary = file.with_name(file.name + ".tmp")
    temporary.write_text(json.dumps(asdict(meta), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, file)


class RowLog:
    """Append-only JSON lines: what a killed run leaves behind. A torn last line is cut off when it is opened."""

    def __init__(self, path: Path, rows: Iterable[Row]) -> None:
        self.path = path
        write_rows(path, list(rows))
        self._stream = path.open("a", encoding="utf-8")

    def append(self, rows: Iterable[Row]) -> None:
        """Write rows and hand them to the disk."""
        self._stream.writelines(row.json() + "\n" for row in rows)
        self._stream.flush()
        os.fsync(self._stream.fileno())

    def close(self) -> None:
        self._stream.close()


def _find(folder: Path) -> Path:
    for suffix in SUFFIXES:
        if (folder / f"scores{suffix}").is_file():
            return folder / f"scores{suffix}"
    found = [p for s in SUFFIXES for p in folder.glob(f"*{s}") if meta_path(p).is_file()]
    if len(found) != 1:
        count = f"{len(found)} score files" if found else "no score file"
        raise UserError(
            f"folder '{folder}' holds {count}; name the file, or score with --out {folder / 'scores.jsonl'}"
        )
    return found[0]
