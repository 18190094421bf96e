"""Rows of text files: .jsonl and .csv by the place of their lines, .json lists in memory."""

from __future__ import annotations

import csv
import json
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import UserError
from .images import ImageError
from .rows import BadRow, digest_of, file_stamp
from .table import Kept, Table

LINES_KEPT = 1024


class TextTable(Table):
    """A .jsonl or .csv file, read once to find its rows; of each row only its place in the file is kept.

    Paths of pictures are relative to the file. Raises UserError when it cannot be read as a whole."""

    def __init__(self, file: Path) -> None:
        super().__init__("folder", str(file), file.parent, [], 0)
        self.file, self.is_csv = file, file.suffix == ".csv"
        self.starts, self.ends, self.lines = array("q"), array("q"), array("q")
        self.kept: Kept[dict[str, Any]] = Kept(LINES_KEPT, lambda _: 1)
        names: dict[str, None] = {}
        try:
            with open(file, "rb") as opened:
                for record in self._csv(opened) if self.is_csv else self._jsonl(opened):
                    names.update(dict.fromkeys(record))
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"'{file}' cannot be read as UTF-8 text: {error}") from error
        except csv.Error as error:
            raise UserError(f"'{file}' is no CSV file: {error}") from error
        self.columns, self.total = list(names), len(self.starts)
        self.opened = open(file, "rb")  # noqa: SIM115  open as long as the table
        self.state = file_stamp(file)

    def signature(self) -> str:
        return digest_of(self.state.encode())

    def place(self, row: int) -> str:
        return f"{self.file.name} line {self.lines[row]}"

    def value(self, row: int, column: str) -> Any:
        with self.kept.lock:
            record = self.kept.get(row)
            if record is None:
                record = self.kept.put(row, self._parse(row))
        return record.get(column)

    def _row(self, start: int, end: int, line: int) -> None:
        self.starts.append(start)
        self.ends.append(end)
        self.lines.append(line)

    def _flaw(self, line: int, detail: str) -> None:
        self.bad.append(BadRow(f"{self.file.name} line {line}", "malformed row", detail))

    def _jsonl(self, opened: Any) -> Iterator[dict[str, Any]]:
        end = 0
        for number, raw in enumerate(opened, 1):
            start, end = end, end + len(raw)
            text = _text(raw, number)
            if not text.strip():
                continue
            try:
                record = json.loads(text)
            except (ValueError, RecursionError) as error:
                self._flaw(number, f"no JSON: {error}")
                continue
            if not isinstance(record, dict):
                self._flaw(number, "no object")
                continue
            self._row(start, end, number)
            yield record

    def _csv(self, opened: Any) -> Iterator[dict[str, Any]]:
        end = 0

        def lines() -> Iterator[str]:
            nonlocal end
            for number, raw in enumerate(opened, 1):
                end += len(raw)
                yield _text(raw, number)

        reader = csv.reader(lines())
        self.header = next(reader, [])
        start = end
        for cells in reader:
            if len(cells) == len(self.header):
                self._row(start, end, reader.line_num)
                yield self._named(cells)
            elif cells:
                self._flaw(reader.line_num, "wrong number of fields")
            start = end

    def _named(self, cells: list[str]) -> dict[str, Any]:
        return {name: cell if cell != "" else None for name, cell in zip(self.header, cells, strict=True)}

    def _parse(self, row: int) -> dict[str, Any]:
        """One row again. Raises ImageError when the file is not what it was."""
        self.opened.seek(self.starts[row])
        raw = self.opened.read(self.ends[row] - self.starts[row])
        try:
            text = _text(raw, self.lines[row])
            if self.is_csv:
                return self._named(next(csv.reader(text.splitlines(keepends=True))))
            record: dict[str, Any] = json.loads(text)
            return record
        except (ValueError, StopIteration, csv.Error) as error:
            raise ImageError(f"'{self.file}' changed while it was read", "malformed row") from error


class ListTable(Table):
    """A .json file that holds a list of rows, or rows given as they are; in memory."""

    def __init__(self, file: Path) -> None:
        super().__init__("folder", str(file), file.parent, [], 0)
        try:
            found = json.loads(file.read_text(encoding="utf-8-sig"))
            if not isinstance(found, list):
                raise TypeError("not a list")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"'{file}' cannot be read as UTF-8 text: {error}") from error
        except (ValueError, TypeError, RecursionError) as error:
            raise UserError(f"'{file}' is no JSON list of rows: {error}") from error
        self.records = [(number, row) for number, row in enumerate(found) if isinstance(row, dict)]
        for number, row in enumerate(found):
            if not isinstance(row, dict):
                self.bad.append(BadRow(f"{file.name} row {number}", "malformed row", "no object"))
        self.columns = list(dict.fromkeys(key for _, row in self.records for key in row))
        self.total = len(self.records)

    def place(self, row: int) -> str:
        return f"{Path(self.label).name} row {self.records[row][0]}"

    def value(self, row: int, column: str) -> Any:
        return self.records[row][1].get(column)


def read_text_table(file: Path) -> Table:
    """Rows of a .jsonl, .json (a list) or .csv file. Raises UserError when it cannot be read at all."""
    return ListTable(file) if file.suffix == ".json" else TextTable(file)


def _text(raw: bytes, number: int) -> str:
    return raw.decode("utf-8-sig" if number == 1 else "utf-8")
