"""Parquet files, read by row group or, where row groups are large, a few rows at a time."""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from .images import ImageError
from .rows import digest_of, file_stamp
from .table import KEPT_BYTES, Kept, Table

if TYPE_CHECKING:
    import pyarrow

FILES_OPEN = 32
# A column of a row group above this is read in blocks of about half of it: forwards without loss, backwards again from
# the start of the group.
BLOCK_BYTES = 32 * 2**20


class ParquetTable(Table):
    """One or more Parquet files of the same columns; blocks of about 128 MB stay in memory.

    Raises UserError for a file that is none and for files with other columns than the first."""

    def __init__(self, label: Path, files: Sequence[Path]) -> None:
        import pyarrow as pa

        self.files, self.starts, rows = list(files), [0], 0
        self.readers: Kept[Any] = Kept(FILES_OPEN, lambda _: 1)
        self.groups: list[list[int]] = []
        columns: list[str] = []
        for number, file in enumerate(files):
            try:
                reader = self._reader(number)
            except (pa.ArrowInvalid, OSError) as error:
                raise UserError(f"'{file}' is no readable Parquet file: {' '.join(str(error).split())}") from error
            schema = reader.schema_arrow
            if not number:
                columns = list(schema.names)
                self.binary = {field.name for field in schema if _holds_pictures(field.type)}
            if set(schema.names) != set(columns):
                odd = sorted(set(columns) ^ set(schema.names))
                raise UserError(f"'{file}' and '{files[0]}' differ in the columns {', '.join(odd)}; read them apart")
            starts = [0]
            for group in range(reader.metadata.num_row_groups):
                starts.append(starts[-1] + reader.metadata.row_group(group).num_rows)
            self.groups.append(starts)
            rows += starts[-1]
            self.starts.append(rows)
        super().__init__("parquet", str(label), files[0].parent, columns, rows)
        self.stamps = [file_stamp(file) for file in self.files]
        self.kept: Kept[pyarrow.ChunkedArray] = Kept(KEPT_BYTES, lambda array: array.nbytes)
        self.cursors: dict[tuple[int, str], tuple[int, int, Iterator[Any]]] = {}

    def signature(self) -> str:
        return digest_of(*(stamp.encode() for stamp in self.stamps))

    def holds_bytes(self, column: str) -> bool:
        return column in self.binary

    def place(self, row: int) -> str:
        number, local = self._locate(row)
        return f"{self.files[number].name} row {local}"

    def stamp(self, row: int, column: str) -> str:
        if column not in self.binary:
            return super().stamp(row, column)
        number, local = self._locate(row)
        return f"{self.stamps[number]}|{local}|{column}"

    def image(self, row: int, column: str) -> bytes | Path:
        return self.picture(self._cell(row, column, "unreadable image"), column)

    def value(self, row: int, column: str) -> Any:
        return self._cell(row, column, "malformed row") if column in self.columns else None

    def _locate(self, row: int) -> tuple[int, int]:
        number = bisect.bisect_right(self.starts, row) - 1
        return number, row - self.starts[number]

    def _reader(self, number: int) -> Any:
        return self.readers.get(number) or self.readers.put(number, self._opened(number))

    def _opened(self, number: int, metadata: Any = None) -> Any:
        import pyarrow.parquet as pq

        # a buffer keeps a large column chunk from being read whole
        return pq.ParquetFile(self.files[number], metadata=metadata, buffer_size=1 << 20, pre_buffer=False)

    def _cell(self, row: int, column: str, reason: str) -> Any:
        """A value as plain Python. Raises ImageError where the file is damaged."""
        import pyarrow as pa

        number, local = self._locate(row)
        group = bisect.bisect_right(self.groups[number], local) - 1
        local -= self.groups[number][group]
        with self.kept.lock:
            try:
                step = self._step(number, group, column)
                array = self._block(number, group, column, local // step, step)
            except (pa.ArrowInvalid, OSError, StopIteration) as error:
                self.cursors.pop((number, column), None)
                raise ImageError(f"damaged row group: {' '.join(str(error).split())}", reason) from error
        if local % step >= len(array):
            raise ImageError("damaged row group: fewer rows than it says", reason)
        return array[local % step].as_py()

    def _step(self, number: int, group: int, column: str) -> int:
        """Rows of a block of this column."""
        meta = self._reader(number).metadata.row_group(group)
        size = sum(
            meta.column(i).total_uncompressed_size
            for i in range(meta.num_columns)
            if meta.column(i).path_in_schema.partition(".")[0] == column
        )
        return max(1, meta.num_rows if size <= BLOCK_BYTES else meta.num_rows * BLOCK_BYTES // (2 * size))

    def _block(self, number: int, group: int, column: str, block: int, step: int) -> pyarrow.ChunkedArray:
        key = (number, group, column)
        found = self.kept.get((*key, block))
        if found is not None:
            return found
        if step == self.groups[number][group + 1] - self.groups[number][group]:
            return self.kept.put((*key, 0), self._reader(number).read_row_group(group, columns=[column]).column(0))
        at_group, at, batches = self.cursors.pop((number, column), (-1, 0, iter(())))
        if at_group != group or at > block:
            # a reader of its own: two iterations over one reader disturb each other
            reader = self._opened(number, self._reader(number).metadata)
            at, batches = 0, reader.iter_batches(batch_size=step, row_groups=[group], columns=[column])
        while at <= block:
            found = self.kept.put((*key, at), _batch(batches))
            at += 1
        self.cursors[number, column] = (group, at, batches)
        if len(self.cursors) > FILES_OPEN:  # of files that were read to their end
            self.cursors.pop(next(iter(self.cursors)))
        assert found is not None
        return found


def _batch(batches: Iterator[Any]) -> Any:
    import pyarrow as pa

    return pa.chunked_array([next(batches).column(0)])


def _holds_pictures(kind: pyarrow.DataType) -> bool:
    import pyarrow as pa

    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return _holds_pictures(kind.value_type)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_struct(kind)
