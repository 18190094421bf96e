"""Tables of any format behind one face: plain values by row and column, and pictures that are read when asked for."""

from __future__ import annotations

import bisect
import csv
import io
import json
import re
import threading
from collections import OrderedDict
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError, nearest
from .images import ImageError
from .rows import BadRow, Cell, ImageRef, file_stamp

if TYPE_CHECKING:
    import datasets
    import pyarrow

METADATA = ("metadata.jsonl", "metadata.csv")
# Bytes of Parquet row groups that stay in memory.
GROUPS_KEPT = 256 * 2**20


class Table:
    """Rows with named columns. ``values`` holds the columns that are not pictures, in full."""

    def __init__(
        self, format: str, label: str, base: Path, columns: Sequence[str], values: dict[str, list[Any]]
    ) -> None:
        self.format, self.label, self.base = format, label, base
        self.columns, self.values = list(columns), values
        self.bad: list[BadRow] = []

    def __len__(self) -> int:
        return len(next(iter(self.values.values()), []))

    def place(self, row: int) -> str:
        """Where a person finds the row."""
        return f"{self.label} row {row}"

    def value(self, row: int, column: str) -> Any:
        """A value that is no picture; None where the column or the value is missing."""
        return self.values[column][row] if column in self.values else None

    def ref(self, row: int, column: str) -> ImageRef:
        """The picture of a cell. Raises ImageError when the cell is empty or no path."""
        if column not in self.values:
            return ImageRef(Cell(self, row, column), f"{self.place(row)} {column}")
        return ImageRef(self._path(self.values[column][row], column), str(self.values[column][row]))

    def _path(self, value: Any, column: str) -> Path:
        if value is None or value == "":
            raise ImageError(f"'{column}' is empty", "missing image")
        if not isinstance(value, str):
            raise ImageError(f"'{column}' is no path but {type(value).__name__}", "malformed row")
        if re.match(r"https?://", value):
            raise ImageError(f"'{column}' is a web address; download the pictures first", "missing image")
        return self.base / value

    def _picture(self, value: Any, column: str) -> bytes | Path:
        """Bytes, an Image struct of `datasets`, or a path."""
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path")
        return value if isinstance(value, bytes) and value else self._path(value or None, column)

    def image(self, row: int, column: str) -> bytes | Path:
        return self._path(self.values[column][row], column)

    def stamp(self, row: int, column: str) -> str:
        return ""


class TextTable(Table):
    """A .jsonl, .json or .csv file; paths are relative to it."""

    def __init__(self, file: Path, records: list[tuple[int, dict[str, Any]]], bad: list[BadRow]) -> None:
        columns = list(dict.fromkeys(key for _, record in records for key in record))
        values = {column: [record.get(column) for _, record in records] for column in columns}
        super().__init__("folder", str(file), file.parent, columns, values)
        self.lines = [line for line, _ in records]
        self.bad = bad

    def place(self, row: int) -> str:
        return f"{Path(self.label).name} line {self.lines[row]}"


class ParquetTable(Table):
    """One or more Parquet files. Pictures are read by row group, a few groups stay in memory."""

    def __init__(self, label: Path, files: Sequence[Path]) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.files, self.readers, self.starts, rows = list(files), [], [], 0
        values: dict[str, list[Any]] = {}
        columns: list[str] = []
        for file in files:
            try:
                reader = pq.ParquetFile(file)
                plain = [f.name for f in reader.schema_arrow if not _holds_pictures(f.type)]
                table = reader.read(columns=plain)
            except (pa.ArrowInvalid, OSError) as error:
                raise UserError(f"'{file}' is no readable Parquet file: {' '.join(str(error).split())}") from error
            columns = columns or list(reader.schema_arrow.names)
            if set(reader.schema_arrow.names) != set(columns):
                odd = sorted(set(columns) ^ set(reader.schema_arrow.names))
                raise UserError(f"'{file}' and '{files[0]}' differ in the columns {', '.join(odd)}; read them apart")
            for name in plain:
                values.setdefault(name, []).extend(table.column(name).to_pylist())
            self.readers.append(reader)
            self.starts.append(rows)
            rows += reader.metadata.num_rows
        super().__init__("parquet", str(label), files[0].parent, columns, values)
        self.rows = rows
        self.groups = [_row_group_starts(reader) for reader in self.readers]
        self.stamps = [file_stamp(file) for file in self.files]
        self.kept: OrderedDict[tuple[int, int, str], pyarrow.ChunkedArray] = OrderedDict()
        self.lock = threading.Lock()

    def __len__(self) -> int:
        return self.rows

    def _locate(self, row: int) -> tuple[int, int]:
        number = bisect.bisect_right(self.starts, row) - 1
        return number, row - self.starts[number]

    def place(self, row: int) -> str:
        number, local = self._locate(row)
        return f"{self.files[number].name} row {local}"

    def stamp(self, row: int, column: str) -> str:
        number, local = self._locate(row)
        return f"{self.stamps[number]}|{local}|{column}"

    def image(self, row: int, column: str) -> bytes | Path:
        import pyarrow as pa

        number, local = self._locate(row)
        group = bisect.bisect_right(self.groups[number], local) - 1
        key = (number, group, column)
        with self.lock:
            try:
                if key not in self.kept:
                    self.kept[key] = self.readers[number].read_row_group(group, columns=[column]).column(0)
                    while len(self.kept) > 2 and sum(a.nbytes for a in self.kept.values()) > GROUPS_KEPT:
                        self.kept.popitem(last=False)
            except (pa.ArrowInvalid, OSError) as error:
                raise ImageError(f"damaged row group: {' '.join(str(error).split())}") from error
            self.kept.move_to_end(key)
            array = self.kept[key]
        return self._picture(array[local - self.groups[number][group]].as_py(), column)


class DatasetTable(Table):
    """A data set of the `datasets` library; its Arrow files are memory-mapped."""

    def __init__(self, label: str, data: datasets.Dataset) -> None:
        import datasets

        pictures: list[str] = []
        for name, feature in data.features.items():
            if isinstance(feature, datasets.Image):
                data = data.cast_column(name, datasets.Image(decode=False))
                pictures.append(name)
            elif getattr(feature, "dtype", "") in ("binary", "large_binary"):
                pictures.append(name)
        plain = [name for name in data.column_names if name not in pictures]
        values = data.select_columns(plain).to_dict() if plain else {}
        super().__init__("datasets", label, Path(label), data.column_names, values)
        self.data = data
        self.single = {name: data.select_columns([name]) for name in pictures}

    def __len__(self) -> int:
        return len(self.data)

    def stamp(self, row: int, column: str) -> str:
        return f"{self.data._fingerprint}|{row}|{column}"

    def image(self, row: int, column: str) -> bytes | Path:
        return self._picture(self.single[column][row][column], column)


def _holds_pictures(kind: pyarrow.DataType) -> bool:
    import pyarrow as pa

    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return _holds_pictures(kind.value_type)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_struct(kind)


def _row_group_starts(reader: Any) -> list[int]:
    starts, total = [], 0
    for group in range(reader.metadata.num_row_groups):
        starts.append(total)
        total += reader.metadata.row_group(group).num_rows
    return starts


def read_text_table(file: Path) -> TextTable:
    """Rows of a .jsonl, .json (a list) or .csv file. Raises UserError when it cannot be read at all."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"'{file}' cannot be read as UTF-8 text: {error}") from error
    bad: list[BadRow] = []
    records: list[tuple[int, dict[str, Any]]] = []
    if file.suffix == ".csv":
        rows = csv.DictReader(io.StringIO(text, newline=""))
        for record in rows:
            if None in record or None in record.values():
                bad.append(BadRow(f"{file.name} line {rows.line_num}", "malformed row", "wrong number of fields"))
            else:
                records.append((rows.line_num, {k: (v if v != "" else None) for k, v in record.items()}))
        return TextTable(file, records, bad)
    if file.suffix == ".json":
        try:
            parsed = [(i, value) for i, value in enumerate(json.loads(text))]
        except (json.JSONDecodeError, TypeError) as error:
            raise UserError(f"'{file}' is no JSON list of rows: {error}") from error
    else:
        parsed = []
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                try:
                    parsed.append((number, json.loads(line)))
                except json.JSONDecodeError as error:
                    bad.append(BadRow(f"{file.name} line {number}", "malformed row", f"no JSON: {error}"))
    for number, value in parsed:
        if isinstance(value, dict):
            records.append((number, value))
        else:
            bad.append(BadRow(f"{file.name} line {number}", "malformed row", "no object"))
    return TextTable(file, records, bad)


def _builtin(name: str) -> Path | None:
    """A data set that ships with the package: ``tiny-pairs``, ``tiny-pairs/folder``."""
    parts = Path(name).parts
    if not parts or not parts[0].startswith("tiny-pairs") or ".." in parts:
        return None
    found = Path(str(resources.files("diffalign.assets"))).joinpath(*parts)
    return found if found.exists() else None


def open_table(path: str, format: str = "auto", split: str = "train") -> Table:
    """The table behind a path, a built-in name or a hub id, recognised by what is there.

    Raises:
        UserError: nothing there, unknown kind, or not readable.
    """
    place = _builtin(path) or Path(path).expanduser()
    if not place.exists():
        if format in ("auto", "datasets") and re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", path):
            return DatasetTable(path, _from_hub(path, split))
        beside = [p.name for p in place.parent.iterdir()] if place.parent.is_dir() else []
        raise UserError(f"data.path '{path}' does not exist{nearest(place.name, beside)}")
    if place.is_file():
        if place.suffix in (".jsonl", ".json", ".csv") and format in ("auto", "folder"):
            return read_text_table(place)
        if place.suffix == ".parquet" and format in ("auto", "parquet"):
            return ParquetTable(place, [place])
        raise UserError(f"data.path '{path}' is no .jsonl, .csv or .parquet file (data.format={format})")
    if format in ("auto", "folder"):
        for name in (*METADATA, *(f"{split}/{name}" for name in METADATA)):
            if (place / name).is_file():
                return read_text_table(place / name)
    if format in ("auto", "datasets") and any(
        (place / n).is_file() for n in ("dataset_info.json", "dataset_dict.json")
    ):
        return DatasetTable(str(place), _from_disk(place, split))
    if format in ("auto", "parquet"):
        files = _of_split(sorted(place.rglob("*.parquet")), split)
        if files:
            return ParquetTable(place, files)
    wanted = {
        "auto": "no metadata.jsonl, metadata.csv, *.parquet or saved data set",
        "folder": "no metadata.jsonl or metadata.csv",
        "parquet": "no *.parquet",
        "datasets": "nothing written by save_to_disk",
    }
    raise UserError(f"folder '{path}' holds {wanted[format]}; see `diffalign pairs check --help` for the formats")


def _of_split(files: list[Path], split: str) -> list[Path]:
    """The hub's layout names files by split (``train-00000-of-00010.parquet``); others belong to every split."""
    named = [f for f in files if re.match(r"(train|validation|test|dev)([-_.]|$)", f.name)]
    if not named:
        return files
    mine = [f for f in named if re.match(re.escape(split) + r"([-.]|_\d|$)", f.name)]
    if not mine:
        known = {re.split(r"[-.]", f.name)[0] for f in named}
        raise UserError(f"no Parquet file of the split '{split}' in '{files[0].parent}'{nearest(split, known)}")
    return mine


def _from_disk(folder: Path, split: str) -> datasets.Dataset:
    import datasets

    try:
        found = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"'{folder}' cannot be opened as a saved data set: {' '.join(str(error).split())}") from error
    if isinstance(found, datasets.Dataset):
        return found
    if split not in found:
        raise UserError(f"'{folder}' has no split '{split}'{nearest(split, found)}; set data.split")
    return found[split]


def _from_hub(name: str, split: str) -> datasets.Dataset:
    import datasets

    try:
        return datasets.load_dataset(name, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        why = " ".join(str(error).split())
        raise UserError(f"data.path '{name}' is no file or folder here, and the hub says: {why[:200]}") from error
