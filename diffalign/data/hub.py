"""Data sets of the `datasets` library: saved on disk, from the hub, or streamed without a copy on the disk."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import RunError, UserError, nearest
from .rows import digest_of, file_stamp
from .table import Kept, Table
from .webdataset import column_of, from_members

if TYPE_CHECKING:
    import datasets

WINDOW_BYTES = 512 * 2**20
BLOCK = 256  # rows of plain values that are read at once
# What `datasets` can stream from local files, by suffix.
STREAMED = {".parquet": "parquet", ".jsonl": "json", ".csv": "csv", ".tar": "webdataset", ".arrow": "arrow"}


class DatasetTable(Table):
    """A data set of the `datasets` library; its Arrow files are memory-mapped."""

    def __init__(self, label: str, data: datasets.Dataset) -> None:
        data, self.pictures = _undecoded(data)
        super().__init__("datasets", label, Path(label), data.column_names, len(data))
        self.fingerprint: str = data._fingerprint
        self.single = {name: data.select_columns([name]) for name in data.column_names}
        self.kept: Kept[list[Any]] = Kept(64, lambda _: 1)

    def signature(self) -> str:
        return digest_of(self.fingerprint.encode())

    def holds_bytes(self, column: str) -> bool:
        return column in self.pictures

    def value(self, row: int, column: str) -> Any:
        if column not in self.single:
            return None
        if column in self.pictures:
            return self.single[column][row][column]
        start = row // BLOCK * BLOCK
        with self.kept.lock:
            block = self.kept.get((start, column))
            if block is None:
                found = self.single[column][start : start + BLOCK][column]
                block = self.kept.put((start, column), found)
        return block[row - start]

    def image(self, row: int, column: str) -> bytes | Path:
        return self.picture(self.value(row, column), column)

    def stamp(self, row: int, column: str) -> str:
        if column not in self.pictures:
            return super().stamp(row, column)
        return f"{self.fingerprint}|{row}|{column}"


class StreamTable(Table):
    """Rows that come one after another and are not kept but for a window of about 512 MB.

    Going forwards is free; going back before the window starts the stream again. ``total`` is known at its end."""

    together = 16  # with two pictures of some MB each they fit into the window

    def __init__(self, label: str, base: Path, data: datasets.IterableDataset, signature: str) -> None:
        data, self.pictures = _undecoded(data)
        names = data.column_names or list(next(iter(data), {}))
        self.members = "__key__" in names  # WebDataset shards
        if self.members:
            self.pictures = {column for column, binary in map(column_of, names) if binary}
            names = list(from_members(next(iter(data), {})))
        super().__init__("datasets", label, base, names, None)
        self.data, self.fingerprint = data, signature
        self.kept: Kept[dict[str, Any]] = Kept(WINDOW_BYTES, _record_bytes)
        self.rows: Iterator[dict[str, Any]] = iter(data)
        self.next = 0

    def signature(self) -> str:
        return self.fingerprint

    def holds_bytes(self, column: str) -> bool:
        return column in self.pictures

    def exists(self, row: int) -> bool:
        return (row < self.total) if self.total is not None else self._record(row) is not None

    def value(self, row: int, column: str) -> Any:
        record = self._record(row)
        if record is None:
            raise RunError(f"'{self.label}' ends before row {row}, which it had before; start the command again")
        return record.get(column)

    def image(self, row: int, column: str) -> bytes | Path:
        return self.picture(self.value(row, column), column)

    def stamp(self, row: int, column: str) -> str:
        if column not in self.pictures:
            return super().stamp(row, column)
        return f"{self.fingerprint}|{row}|{column}" if self.fingerprint else ""

    def _record(self, row: int) -> dict[str, Any] | None:
        """The row; None after the last one. Raises RunError when the stream breaks."""
        with self.kept.lock:
            found = self.kept.get(row)
            if found is not None:
                return found
            try:
                if row < self.next:
                    self.rows, self.next = iter(self.data.skip(row)), row
                while self.next <= row:
                    record = next(self.rows, None)
                    if record is None:
                        self.total = self.next
                        return None
                    self.kept.put(self.next, from_members(record) if self.members else record)
                    self.next += 1
            except (OSError, ValueError) as error:
                why = " ".join(str(error).split())[:200]
                raise RunError(
                    f"the stream of '{self.label}' broke at row {self.next}: {why}; what is encoded is kept, start the "
                    "command again"
                ) from error
            return self.kept.get(row)


def _record_bytes(record: dict[str, Any]) -> float:
    pictures = (v.get("bytes") if isinstance(v, dict) else v for v in record.values())
    return 500 + sum(len(p) for p in pictures if isinstance(p, bytes))


def _undecoded(data: Any) -> tuple[Any, set[str]]:
    """The data set with its pictures as bytes, and the names of their columns."""
    import datasets

    pictures = set()
    for name, feature in (data.features or {}).items():
        inner = feature.feature if isinstance(feature, (datasets.List, datasets.LargeList)) else feature
        if isinstance(inner, datasets.Image):
            plain = datasets.Image(decode=False)
            data = data.cast_column(name, plain if inner is feature else datasets.List(plain))
            pictures.add(name)
        elif getattr(inner, "dtype", "") in ("binary", "large_binary"):
            pictures.add(name)
    return data, pictures


def from_disk(folder: Path, split: str) -> datasets.Dataset:
    """What `save_to_disk` wrote. Raises UserError."""
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


def open_hub(name: str, split: str, streaming: bool) -> Table:
    """A data set of the hub, downloaded, or streamed. Raises UserError when it cannot be reached."""
    import datasets

    name = name.removeprefix("hf://").removeprefix("datasets/")
    try:
        if not streaming:
            return DatasetTable(name, datasets.load_dataset(name, split=split))
        builder = datasets.load_dataset_builder(name)
        data = builder.as_streaming_dataset(split=split)
        signature = digest_of(f"{name}|{builder.config_id}|{builder.hash}|{split}".encode()) if builder.hash else ""
        return StreamTable(name, Path(), data, signature)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        why = " ".join(str(error).split())
        raise UserError(f"data.path '{name}' is no file or folder here, and the hub says: {why[:200]}") from error


def open_stream(label: str, files: list[Path]) -> StreamTable:
    """Local files as a stream. Raises UserError for files that cannot be streamed."""
    import datasets

    kind = STREAMED.get(files[0].suffix)
    if kind is None:
        raise UserError(
            f"data.streaming: '{label}' is no Parquet, .jsonl, .csv or .tar; leave data.streaming out, its rows are "
            "read one by one anyway"
        )
    signature = digest_of(*(file_stamp(file).encode() for file in files))
    try:
        data = datasets.load_dataset(kind, data_files=[str(file) for file in files], split="train", streaming=True)
        return StreamTable(label, files[0].parent, data, signature)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        why = " ".join(str(error).split())
        raise UserError(f"'{label}' cannot be streamed: {why[:200]}") from error
