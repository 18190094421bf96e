"""Rows packed into Arrow batches: memory holds a few bytes a row, objects are built when asked for.

Batches of 4,096 rows are kept in memory up to 32 MiB; what is older lies in mapped files, from which the system takes
pages as they are read and drops them when memory is short.
"""

from __future__ import annotations

import bisect
import math
import operator
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Self, TypeVar, overload

import numpy as np
import pyarrow as pa

from .files import make_folder
from .images import ImageError
from .keyindex import first_places, key_array
from .rows import Cell, ImageRef, ImageRow, PairRow, PromptRow, Row, digest_of

if TYPE_CHECKING:
    from hashlib import _Hash

    from .tables import Table

CHUNK = 4096
SPILL = 32 * 2**20
R = TypeVar("R", bound=Row)


class Gone:
    """The table behind pictures that came from a stream: they were encoded as they passed and are not kept."""

    def image(self, row: int, column: str) -> bytes | Path:
        raise ImageError("came from a stream and is not kept", "missing image")

    def stamp(self, row: int, column: str) -> str:
        return ""


class Column(Sequence[str]):
    """One text column, read when asked for."""

    def __init__(self, rows: Packed[Any], name: str) -> None:
        self.rows, self.name = rows, name

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> list[str]: ...

    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        batch, place = self.rows.at(index)
        return self.shown(batch.column(self.name)[place].as_py())

    def __iter__(self) -> Iterator[str]:
        for batch in self.rows.batches():
            yield from map(self.shown, batch.column(self.name).to_pylist())

    def shown(self, text: str) -> str:
        """What is given of a text."""
        return text


class Packed(Sequence[R], Generic[R]):
    """Rows of one kind; ``append`` fills them, reading builds a row anew each time.

    Args:
        table: where the pictures of the rows are read from; None for rows whose pictures passed by in a stream.
        folder: where batches go that memory should not hold; the system's folder for temporary files by default.
    """

    sides: tuple[str, ...]
    texts: ClassVar[tuple[str, ...]]
    labels: ClassVar[tuple[str, ...]] = ()  # words that batches hold as numbers
    numbers: tuple[str, ...]

    def __init__(self, table: Table | None = None, folder: Path | None = None) -> None:
        self.table, self.folder = table, folder
        self._batches: list[pa.RecordBatch] = []
        self._starts: list[int] = []
        self._mapped = 0  # batches from here on are in memory
        self._memory = 0
        self._pending: list[tuple[Any, ...]] = []
        self._sealed = 0
        self.schema = self._make_schema()
        self.present: dict[str, None] = {}  # numbers, labels and texts that some row has
        self._places: dict[str, dict[str, int]] = {}
        self._counted = 0

    def _make_schema(self) -> pa.Schema:
        fields: list[tuple[str, Any]] = [
            ("id", pa.string()),
            *((name, pa.string()) for name in (*self.texts, *self.labels)),
            ("row", pa.int64()),
        ]
        for side in self.sides:
            fields += [
                (f"{side}_column", pa.string()),
                (f"{side}_path", pa.string()),
                (f"{side}_digest", pa.binary(16)),
            ]
            fields += [(f"{side}_width", pa.int32()), (f"{side}_height", pa.int32())]
        return pa.schema([*fields, *((name, pa.float64()) for name in self.numbers)])

    @classmethod
    def mapped(cls, path: Path, table: Any, present: Sequence[str]) -> Self:
        """Rows that ``batches`` gave and a file holds. Raises ArrowInvalid or OSError when it is none."""
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        found = cls.of_schema(reader.schema, table, path.parent)
        if reader.schema != found.schema:
            raise pa.ArrowInvalid("other columns")
        for number in range(reader.num_record_batches):
            found._take(reader.get_batch(number))
        found._mapped = len(found._batches)
        found.present = dict.fromkeys(present)
        return found

    @classmethod
    def of_schema(cls, schema: pa.Schema, table: Any, folder: Path | None) -> Self:
        """Empty rows of the kind that a file has."""
        return cls(table, folder)

    # -- filling ------------------------------------------------------------------------------------------------------

    def append(self, row: R) -> None:
        """One more row. The picture's bytes are not kept, only where they are and their hash."""
        texts: dict[str, str] = row.prompts
        packed: list[Any] = [row.id, *(texts.get(name) for name in self.texts)]
        for name in self.labels:
            packed.append(getattr(row, name))
            self.present.update({} if packed[-1] is None else {name: None})
        place = len(packed)
        packed.append(-1)
        for side in self.sides:
            ref = row.images[side]
            column = path = None
            if isinstance(ref.source, Cell):
                packed[place] = ref.source.row
                column = ref.source.column
            elif isinstance(ref.source, Path):
                path = str(ref.source)
            width, height = ref.size or (None, None)
            packed += [column, path, bytes.fromhex(ref.content_hash()), width, height]
        for name, value in row.columns.items():
            packed.append(value)
            if value is not None and (name != "tie" or value):
                self.present[name] = None
        self.present.update(dict.fromkeys(texts))
        self._pending.append(tuple(packed))
        if len(self._pending) >= CHUNK:
            self._pack()

    def extend(self, rows: Iterable[R]) -> None:
        """Several rows."""
        for row in rows:
            self.append(row)

    def _pack(self) -> None:
        """Pending rows become a batch; beyond the limit batches leave the memory."""
        if not self._pending:
            return
        columns = zip(*self._pending, strict=True)
        arrays = [pa.array(list(values), field.type) for values, field in zip(columns, self.schema, strict=True)]
        self._pending = []
        self._take(pa.RecordBatch.from_arrays(arrays, schema=self.schema))
        self._memory += self._batches[-1].nbytes
        if self._memory > SPILL:
            self._spill()

    def _take(self, batch: pa.RecordBatch) -> None:
        self._starts.append(self._sealed)
        self._batches.append(batch)
        self._sealed += len(batch)

    def _spill(self) -> None:
        """Batches in memory go to a mapped file that vanishes with the process."""
        if self.folder is not None:
            make_folder(self.folder)
        handle, name = tempfile.mkstemp(".tmp", ".rows-", self.folder)
        try:
            with os.fdopen(handle, "wb") as file, pa.ipc.new_file(file, self.schema) as writer:
                for batch in self._batches[self._mapped :]:
                    writer.write_batch(batch)
            reader = pa.ipc.open_file(pa.memory_map(name))
            self._batches[self._mapped :] = [reader.get_batch(k) for k in range(reader.num_record_batches)]
        finally:
            if os.name == "posix":  # elsewhere a mapped file cannot be deleted: the next start removes it
                os.unlink(name)
        self._mapped, self._memory = len(self._batches), 0
        pa.default_memory_pool().release_unused()

    # -- reading ------------------------------------------------------------------------------------------------------

    def batches(self) -> Iterator[pa.RecordBatch]:
        """The rows in Arrow batches, in order."""
        self._pack()
        yield from self._batches

    def at(self, index: int) -> tuple[pa.RecordBatch, int]:
        """The batch and the place in it of one row. Raises IndexError."""
        self._pack()
        i = operator.index(index)
        i += len(self) if i < 0 else 0
        if not 0 <= i < self._sealed:
            raise IndexError(f"row {index} of {self._sealed}")
        number = bisect.bisect_right(self._starts, i) - 1
        return self._batches[number], i - self._starts[number]

    def __len__(self) -> int:
        return self._sealed + len(self._pending)

    @overload
    def __getitem__(self, index: int) -> R: ...

    @overload
    def __getitem__(self, index: slice) -> list[R]: ...

    def __getitem__(self, index: int | slice) -> R | list[R]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        batch, place = self.at(index)
        return self._row({n: column[place].as_py() for n, column in zip(self.schema.names, batch.columns, strict=True)})

    def __iter__(self) -> Iterator[R]:
        for batch in self.batches():
            for start in range(0, len(batch), 256):  # a batch as objects would be some megabytes
                yield from map(self._row, batch.slice(start, 256).to_pylist())

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(map(operator.eq, self, other))

    __hash__ = None  # type: ignore[assignment]

    def _ref(self, values: dict[str, Any], side: str) -> ImageRef:
        column, path = values[f"{side}_column"], values[f"{side}_path"]
        width, height = values[f"{side}_width"], values[f"{side}_height"]
        digest = values[f"{side}_digest"].hex()
        size = None if width is None else (width, height)
        if path is not None:
            return ImageRef(Path(path), path, digest, size)
        if column is None or self.table is None:
            return ImageRef(Cell(Gone(), values["row"], side), f"{values['id']} {side}", digest, size)
        found = self.table.ref(values["row"], column)
        return ImageRef(found.source, found.name, digest, size)

    def _row(self, values: dict[str, Any]) -> R:
        raise TypeError(f"{type(self).__name__} holds no rows")

    # -- columns ------------------------------------------------------------------------------------------------------

    @property
    def ids(self) -> Column:
        """The rows' ids."""
        return Column(self, "id")

    @property
    def groups(self) -> Sequence[str]:
        """A name for each row; rows of one name are trained on, or held out, together."""
        return self.ids

    @property
    def columns(self) -> list[str]:
        """Names of the numbers in which some row has a value; ``tie`` only where ties were kept, ``user`` a user's
        place in ``users``."""
        return [name for name in (*self.numbers, *self.labels) if name in self.present]

    @property
    def users(self) -> list[str]:
        """Who gave the preferences, in alphabetical order; empty where the data do not say."""
        return list(self.places_of("user")) if "user" in self.labels else []

    def places_of(self, label: str) -> dict[str, int]:
        """The different words of a label, in order, each with its place."""
        if len(self) != self._counted:
            self._places, self._counted = {}, len(self)
        if label not in self._places:
            words: set[str] = set()
            for batch in self.batches():
                words.update(batch.column(label).unique().to_pylist())
            self._places[label] = {word: n for n, word in enumerate(sorted(words - {None}))}
        return self._places[label]

    @property
    def two_prompts(self) -> bool:
        """Whether some row has a prompt of its own for the loser."""
        return "rejected_prompt" in self.present

    def digests(self, side: str) -> np.ndarray:
        """Content hashes of one side's pictures, (n, 2) uint64."""
        parts = [np.zeros((0, 2), np.uint64)]
        for batch in self.batches():
            column = batch.column(f"{side}_digest")
            numbers = np.frombuffer(column.buffers()[1], np.uint64).reshape(-1, 2)
            parts.append(numbers[column.offset : column.offset + len(column)])
        return np.concatenate(parts)

    def sizes(self, side: str) -> np.ndarray:
        """(n, 2) int32: width and height of one side's pictures, 0 where they are not known."""
        parts = [np.zeros((0, 2), np.int32)]
        for batch in self.batches():
            both = [batch.column(f"{side}_{name}").fill_null(0).to_numpy() for name in ("width", "height")]
            parts.append(np.stack(both, 1))
        return np.concatenate(parts)

    def values(self, name: str) -> np.ndarray:
        """(n,) fp64: one of the ``columns``, NaN where a row has none."""
        if name in self.labels:
            places = self.places_of(name)
            words = (word for batch in self.batches() for word in batch.column(name).to_pylist())
            return np.fromiter((places.get(word, math.nan) for word in words), float, len(self))
        given: list[np.ndarray] = [batch.column(name).fill_null(math.nan).to_numpy() for batch in self.batches()]
        return np.concatenate([np.zeros(0), *given])

    def distinct_prompts(self) -> Iterator[list[str]]:
        """Every prompt once, those of losers too, some thousands at a time."""
        keys = key_array(digest_of(text.encode()) for texts in self._prompts() for text in texts)
        first, start = first_places(keys), 0
        for texts in self._prompts():
            mine = first[np.searchsorted(first, start) : np.searchsorted(first, start + len(texts))] - start
            yield [texts[i] for i in mine.tolist()]
            start += len(texts)

    def prompt_counts(self) -> Counter[str]:
        """How many rows have a prompt, by the prompt."""
        counts: Counter[str] = Counter()
        for batch in self.batches():
            counts.update(batch.column("prompt").to_pylist())
        return counts

    def _prompts(self) -> Iterator[list[str]]:
        """The prompts of all rows, a list a batch."""
        for batch in self.batches():
            columns = [batch.column(name).to_pylist() for name in self.texts if name in ("prompt", *self.present)]
            yield [text for texts in zip(*columns, strict=True) for text in texts if text is not None]

    def update_hash(self, digest: _Hash) -> None:
        """Feed what the rows are, in order, to a hash: ids, pictures, prompts and numbers."""
        names = ["id", *(f"{side}_digest" for side in self.sides), *(n for n in self.texts if n in self.present)]
        for batch in self.batches():
            for own, *parts in zip(*(batch.column(n).to_pylist() for n in names), strict=True):
                words = (p.hex() if isinstance(p, bytes) else str(p) for p in parts)
                digest.update(f"\n{own} {' '.join(words)}".encode())
        for name in self.columns:
            digest.update(name.encode() + self.values(name).tobytes())


Rows = Packed[Any]


class PairRows(Packed[PairRow]):
    """Preference pairs."""

    sides = ("chosen", "rejected")
    texts = ("prompt", "rejected_prompt")
    numbers = ("chosen_score", "rejected_score", "tie")
    labels = ("user",)

    def _row(self, values: dict[str, Any]) -> PairRow:
        return PairRow(
            values["id"],
            values["prompt"],
            self._ref(values, "chosen"),
            self._ref(values, "rejected"),
            values["rejected_prompt"],
            values["chosen_score"],
            values["rejected_score"],
            bool(values["tie"]),
            values["user"],
        )

    def winners(self) -> ImageRows:
        """The chosen pictures alone, over the same memory."""
        found = ImageRows(self.table, self.folder)
        plain = {"id": "id", "prompt": "prompt", "row": "row", "score": "chosen_score"}
        source = {name: plain.get(name, name.replace("image_", "chosen_")) for name in found.schema.names}
        for batch in self.batches():
            arrays = [batch.column(source[name]) for name in found.schema.names]
            found._take(pa.RecordBatch.from_arrays(arrays, schema=found.schema))
        found._mapped = len(found._batches)
        found.present = {"prompt": None} | ({"score": None} if "chosen_score" in self.present else {})
        return found


class PromptRows(Packed[PromptRow]):
    """Prompts without pictures."""

    sides = ()
    texts = ("prompt",)
    numbers = ()

    def _row(self, values: dict[str, Any]) -> PromptRow:
        return PromptRow(values["id"], values["prompt"])


class ImageRows(Packed[ImageRow]):
    """Captioned pictures."""

    sides = ("image",)
    texts = ("prompt",)
    numbers = ("score",)

    def _row(self, values: dict[str, Any]) -> ImageRow:
        return ImageRow(values["id"], values["prompt"], self._ref(values, "image"), values["score"])


@dataclass(frozen=True)
class Stream:
    """Rows that pass by once; ``packed`` is empty and takes what is known of them; ``keep`` is called at the end."""

    rows: Iterator[Any]
    packed: Rows
    keep: Callable[[Rows], None] = lambda rows: None

    def gather(self) -> Rows:
        """All rows, read to the end without their pictures being used."""
        self.packed.extend(self.rows)
        self.keep(self.packed)
        return self.packed


KINDS: dict[type, type[Rows]] = {PairRow: PairRows, ImageRow: ImageRows, PromptRow: PromptRows}


def packed(rows: Sequence[Row]) -> Rows:
    """Rows of a list in packed form; packed ones as they are. Their pictures must be files or cells of one table."""
    if isinstance(rows, Packed):
        return rows
    first = rows[0] if rows else None
    cells = [ref.source for ref in first.images.values()] if first is not None else []
    table: Any = cells[0].table if cells and isinstance(cells[0], Cell) else None
    found = KINDS[type(first) if first is not None else PairRow](table)
    found.extend(rows)
    return found
