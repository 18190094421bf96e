"""The formats that ``pairs convert`` writes. A writer that goes on from what was durable gives the same bytes."""

from __future__ import annotations

import csv
import io
import json
import os
import tarfile
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from .rows import PairRow, RankedRow, RatedRow, Row, digest_of

if TYPE_CHECKING:
    import pyarrow as pa

FOLDER_ROWS = 1000  # rows whose pictures share a folder
GROUP_ROWS = 100  # of a Parquet row group: what is in memory while it is written
GROUP_BYTES = 64 * 2**20
MAGIC = {b"\xff\xd8": "jpg", b"\x89P": "png", b"RI": "webp", b"GI": "gif", b"BM": "bmp", b"II": "tif", b"MM": "tif"}
PICTURES = {"pair": ("chosen", "rejected"), "rated": ("image",)}  # names of a row's pictures; a list has any number
# Pick-a-Pic's columns and types, as the card of its data set lists them.
PICK_A_PIC = {
    "are_different": "bool",
    "best_image_uid": "string",
    "caption": "string",
    "created_at": "timestamp[ns]",
    "has_label": "bool",
    "image_0_uid": "string",
    "image_0_url": "string",
    "image_1_uid": "string",
    "image_1_url": "string",
    "jpg_0": "binary",
    "jpg_1": "binary",
    "label_0": "double",
    "label_1": "double",
    "model_0": "string",
    "model_1": "string",
    "ranking_id": "int64",
    "user_id": "int64",
    "num_example_per_prompt": "int64",
    "__index_level_0__": "int64",
}


def suffix_of(data: bytes) -> str:
    """The usual suffix of a picture's encoding."""
    return MAGIC.get(data[:2], "jpg")


@dataclass(frozen=True)
class Picture:
    """Encoded bytes; ``link`` is the file to link to instead of writing them."""

    data: bytes
    suffix: str
    link: Path | None = None


@dataclass(frozen=True)
class Record:
    """A row to write: its number, its own id if it has one, its pictures by name. ``turned``: the source named the
    loser first. ``others``: plain values that no row has, or of the source's row, for Pick-a-Pic's columns."""

    number: int
    id: str | None
    row: Row
    pictures: Mapping[str, Picture]
    turned: bool
    others: Mapping[str, Any]

    @property
    def size(self) -> int:
        """Bytes of the pictures."""
        return sum(len(picture.data) for picture in self.pictures.values())

    def plain(self, fields: Sequence[str]) -> dict[str, Any]:
        """What is no picture."""
        named = {n: self.others[n] if n in self.others else plain_value(self.row, n) for n in fields}
        return {"id": self.id, "prompt": self.row.prompt, **named}

    def file(self, name: str) -> str:
        """What a picture is called among those of all rows."""
        return f"{self.number:08d}-{name}.{self.pictures[name].suffix}"


def plain_value(row: Row, name: str) -> Any:
    """A plain column's value: of rated pictures whether they were liked, of lists a number a picture."""
    if isinstance(row, RatedRow):
        return row.label > 0
    if isinstance(row, RankedRow):
        return list(dict(row.rewards).get(name, row.scores))
    return getattr(row, name)


class Writer(ABC):
    """Writes records in order into an empty folder, or goes on from the ``state`` that ``commit`` gave last. ``kinds``:
    of rows that the format can hold."""

    kinds: ClassVar[tuple[str, ...]] = ("pair", "rated", "ranked")

    def __init__(self, folder: Path, kind: str, fields: Sequence[str], state: Mapping[str, Any]) -> None:
        self.folder, self.kind, self.fields = folder, kind, list(fields)
        self.done: int = state.get("done", 0)  # bytes of a list of rows, or complete shards

    @abstractmethod
    def add(self, record: Record) -> None:
        """One row."""

    @abstractmethod
    def commit(self) -> dict[str, Any]:
        """All rows so far are on the disk; the state to go on from."""

    def finish(self) -> None:  # noqa: B027  most formats need nothing
        """Whatever a reader needs besides. May be called again after a kill."""


class ListWriter(Writer):
    """Pictures as files and a list of them beside: what people can look into."""

    name = "pairs.jsonl"

    def __init__(self, folder: Path, kind: str, fields: Sequence[str], state: Mapping[str, Any]) -> None:
        super().__init__(folder, kind, fields, state)
        self.list = open(folder / self.name, "ab")  # noqa: SIM115  closed by finish
        self.list.truncate(self.done)
        self.list.seek(self.done)

    def column(self, name: str) -> str:
        """The column of a picture's path."""
        return name

    def add(self, record: Record) -> None:
        names = {}
        for name, picture in record.pictures.items():
            file = f"images/{record.number // FOLDER_ROWS:05d}/{record.file(name)}"
            names[self.column(name)] = file
            path = self.folder / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)  # of a process that was killed
            if picture.link is not None:
                path.symlink_to(picture.link.absolute())
            else:
                path.write_bytes(picture.data)
        plain = record.plain(self.fields)
        if plain["id"] is None:
            del plain["id"]
        files = {"images": list(names.values())} if self.kind == "ranked" else names
        self.list.write(self.line(plain | files).encode())

    def line(self, values: dict[str, Any]) -> str:
        """A row of the list."""
        return json.dumps({k: v for k, v in values.items() if v is not None}, ensure_ascii=False) + "\n"

    def commit(self) -> dict[str, Any]:
        self.list.flush()
        os.fsync(self.list.fileno())
        os.sync()  # the pictures
        self.done = self.list.tell()
        return {"done": self.done}

    def finish(self) -> None:
        self.list.close()


class FolderWriter(ListWriter):
    """The hub's image folder: `metadata.jsonl` whose columns end in ``file_name``; lists keep theirs in ``images``."""

    name = "metadata.jsonl"

    def column(self, name: str) -> str:
        return "file_name" if self.kind == "rated" else f"{name}_file_name"


class CsvWriter(ListWriter):
    """The same as CSV; an empty cell is no value."""

    name = "pairs.csv"
    kinds = ("pair", "rated")

    def line(self, values: dict[str, Any]) -> str:
        columns = ["id", "prompt", *PICTURES[self.kind], *self.fields]
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        if not self.list.tell():
            writer.writerow(columns)
        writer.writerow(["" if values.get(c) is None else values[c] for c in columns])
        return out.getvalue()


class WebDatasetWriter(Writer):
    """Tar shards of one commit each: ``key.chosen.jpg``, ``key.rejected.jpg`` (``key.image.jpg``), ``key.json``."""

    kinds = ("pair", "rated")

    def __init__(self, folder: Path, kind: str, fields: Sequence[str], state: Mapping[str, Any]) -> None:
        super().__init__(folder, kind, fields, state)
        self.tar: tarfile.TarFile | None = None

    def add(self, record: Record) -> None:
        if self.tar is None:
            self.tar = tarfile.open(self.folder / f"{self.done:06d}.tar", "w", format=tarfile.PAX_FORMAT)  # noqa: SIM115
        plain = {k: v for k, v in record.plain(self.fields).items() if v is not None}
        parts = {f"{name}.{picture.suffix}": picture.data for name, picture in record.pictures.items()}
        for name, data in (parts | {"json": json.dumps(plain, ensure_ascii=False).encode()}).items():
            member = tarfile.TarInfo(f"{record.number:08d}.{name}")
            member.size = len(data)
            self.tar.addfile(member, io.BytesIO(data))

    def commit(self) -> dict[str, Any]:
        if self.tar is not None:
            path = Path(str(self.tar.name))
            self.tar.close()
            self.tar = None
            _sync(path)
            self.done += 1
        return {"done": self.done}


class ArrowWriter(Writer):
    """Shards of one commit each, from record batches of about 100 rows."""

    suffix: ClassVar[str] = "parquet"

    def __init__(self, folder: Path, kind: str, fields: Sequence[str], state: Mapping[str, Any]) -> None:
        super().__init__(folder, kind, fields, state)
        self.schema = self.make_schema()
        self.rows: list[dict[str, Any]] = []
        self.size = 0
        self.sink: Any = None

    def make_schema(self) -> pa.Schema:
        """Columns and types, with the hub's note on which are pictures."""
        return self.features().arrow_schema

    def features(self) -> Any:
        """The columns as `datasets` knows them."""
        import datasets

        kinds = {"tie": "bool", "label": "bool", "chosen_score": "float64", "rejected_score": "float64"}
        named: dict[str, Any] = {"id": datasets.Value("string"), "prompt": datasets.Value("string")}
        if self.kind == "ranked":
            named |= {name: datasets.List(datasets.Value("float64")) for name in self.fields}
            return datasets.Features({**named, "images": datasets.List(datasets.Image())})
        named |= {name: datasets.Value(kinds.get(name, "string")) for name in self.fields}
        return datasets.Features({**named, **{name: datasets.Image() for name in PICTURES[self.kind]}})

    def values(self, record: Record) -> dict[str, Any]:
        """A row under the schema."""
        named = {name: {"bytes": p.data, "path": record.file(name)} for name, p in record.pictures.items()}
        return record.plain(self.fields) | ({"images": list(named.values())} if self.kind == "ranked" else named)

    def path(self, shard: int) -> Path:
        """Where a shard lies."""
        return self.folder / f"part-{shard:05d}.{self.suffix}"

    def open(self, path: Path) -> Any:
        """Something with write_batch and close."""
        import pyarrow.parquet as pq

        return pq.ParquetWriter(path, self.schema)

    def add(self, record: Record) -> None:
        self.rows.append(self.values(record))
        self.size += record.size
        if len(self.rows) >= GROUP_ROWS or self.size >= GROUP_BYTES:
            self._flush()

    def _flush(self) -> None:
        import pyarrow as pa

        if self.rows:
            if self.sink is None:
                self.sink = self.open(self.path(self.done))
            self.sink.write_batch(pa.RecordBatch.from_pylist(self.rows, self.schema))
            self.rows, self.size = [], 0

    def commit(self) -> dict[str, Any]:
        self._flush()
        if self.sink is not None:
            self.sink.close()
            self.sink = None
            _sync(self.path(self.done))
            self.done += 1
        return {"done": self.done}


class PickAPicWriter(ArrowWriter):
    """Pick-a-Pic's own columns in Parquet, ``jpg_0`` and ``jpg_1`` as the source had them, the winner first if it had
    none. Scores go to SmPO's ``ps_score_0``, ``ps_score_1``. What the source does not know is null."""

    kinds = ("pair",)

    def make_schema(self) -> pa.Schema:
        import pyarrow as pa

        kinds = {"bool": pa.bool_(), "string": pa.string(), "binary": pa.binary(), "double": pa.float64()}
        kinds |= {"int64": pa.int64(), "timestamp[ns]": pa.timestamp("ns")}
        fields = [pa.field(name, kinds[kind]) for name, kind in PICK_A_PIC.items()]
        if "chosen_score" in self.fields:
            fields += [pa.field(f"ps_score_{i}", pa.float64()) for i in (0, 1)]
        return pa.schema(fields)

    def values(self, record: Record) -> dict[str, Any]:
        row, pictures = record.row, list(record.pictures.values())
        assert isinstance(row, PairRow)
        scores = [row.chosen_score, row.rejected_score]
        label = (0.5, 0.5) if row.tie else (1.0, 0.0)
        if record.turned:
            pictures, scores, label = pictures[::-1], scores[::-1], label[::-1]
        uids = [digest_of(picture.data) for picture in pictures]
        made: dict[str, Any] = {
            "are_different": True,
            "best_image_uid": None if row.tie else uids[label.index(1.0)],
            "has_label": True,
            "image_0_uid": uids[0],
            "image_1_uid": uids[1],
            "ranking_id": _whole_number(str(record.id or "")),
            "user_id": _whole_number(row.user or ""),
            "__index_level_0__": record.number,
        }
        made |= {name: value for name, value in record.others.items() if name in made or name in PICK_A_PIC}
        made |= {"caption": row.prompt, "label_0": label[0], "label_1": label[1]}
        made |= {f"jpg_{i}": picture.data for i, picture in enumerate(pictures)}
        if "chosen_score" in self.fields:
            made |= {f"ps_score_{i}": score for i, score in enumerate(scores)}
        return made


def _whole_number(text: str) -> int | None:
    """The number that a text is, where it fits into 64 bits."""
    return int(text) if text.isdecimal() and len(text) < 19 else None


class DatasetsWriter(ArrowWriter):
    """What ``datasets.load_from_disk`` opens: Arrow streams and two notes."""

    suffix = "arrow"

    def open(self, path: Path) -> Any:
        import pyarrow as pa

        return pa.ipc.new_stream(str(path), self.schema)

    def finish(self) -> None:
        import datasets

        shards = [self.path(i) for i in range(self.done)]
        stamp = digest_of(*(f"{path.name}|{path.stat().st_size}".encode() for path in shards))
        state: dict[str, Any] = {
            "_data_files": [{"filename": path.name} for path in shards],
            "_fingerprint": stamp[:16],
            "_format_columns": None,
            "_format_kwargs": {},
            "_format_type": None,
            "_output_all_columns": False,
            "_split": "train",
        }
        (self.folder / "state.json").write_text(json.dumps(state, indent=2, sort_keys=True))
        datasets.DatasetInfo(features=self.features()).write_to_directory(str(self.folder))


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


WRITERS: dict[str, type[Writer]] = {
    "folder": FolderWriter,
    "jsonl": ListWriter,
    "csv": CsvWriter,
    "parquet": ArrowWriter,
    "datasets": DatasetsWriter,
    "webdataset": WebDatasetWriter,
    "pickapic": PickAPicWriter,
}
