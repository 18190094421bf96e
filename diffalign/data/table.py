"""Tables of any format behind one face: values and pictures by row and column, read when they are asked for."""

from __future__ import annotations

import re
import threading
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

from .images import ImageError
from .rows import BadRow, Cell, ImageRef, file_stamp

# Bytes that a table keeps of what it has read.
KEPT_BYTES = 128 * 2**20
V = TypeVar("V")


class Table(ABC):
    """Rows with named columns. Access is cheap in any order unless a format says otherwise, and safe from threads.

    ``columns`` are the names that are known from the start; ``total`` is the number of rows, None where only reading to
    the end tells; ``bad`` lists what is no row at all.
    """

    together = 256  # rows that may be asked for at once without reading anything twice

    def __init__(self, format: str, label: str, base: Path, columns: Sequence[str], total: int | None) -> None:
        self.format, self.label, self.base = format, label, base
        self.columns, self.total = list(columns), total
        self.bad: list[BadRow] = []

    def signature(self) -> str:
        """A name for this very state of the whole table; "" when there is none."""
        return ""

    def exists(self, row: int) -> bool:
        """Whether the table has this row."""
        return self.total is not None and row < self.total

    def place(self, row: int) -> str:
        """Where a person finds the row."""
        return f"{self.label} row {row}"

    @abstractmethod
    def value(self, row: int, column: str) -> Any:
        """What a cell holds; None where the column or the value is missing. Raises ImageError when it is damaged."""

    def holds_bytes(self, column: str) -> bool:
        """Whether the column holds pictures themselves, not their paths."""
        return False

    def ref(self, row: int, column: str) -> ImageRef:
        """The picture of a cell. Raises ImageError when a path is empty or none."""
        if self.holds_bytes(column):
            return ImageRef(Cell(self, row, column), f"{self.place(row)} {column}")
        value = self.value(row, column)
        self.path(value, column)
        return ImageRef(Cell(self, row, column), str(value))

    def image(self, row: int, column: str) -> bytes | Path:
        """Encoded bytes, or the file that holds them. Raises ImageError."""
        return self.path(self.value(row, column), column)

    def stamp(self, row: int, column: str) -> str:
        """A name for this very state of the picture; "" when there is none."""
        found = self.image(row, column)
        return file_stamp(found) if isinstance(found, Path) else ""

    def path(self, value: Any, column: str) -> Path:
        """The file that a cell names. Raises ImageError."""
        if value is None or value == "":
            raise ImageError(f"'{column}' is empty", "missing image")
        if not isinstance(value, str):
            raise ImageError(f"'{column}' is no path but {type(value).__name__}", "malformed row")
        if re.match(r"https?://", value):
            raise ImageError(f"'{column}' is a web address; download the pictures first", "missing image")
        if "\0" in value:
            raise ImageError(f"'{column}' is no path", "malformed row")
        return self.base / value

    def picture(self, value: Any, column: str) -> bytes | Path:
        """Bytes, an Image struct of `datasets`, or a path, as a picture."""
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path")
        return value if isinstance(value, bytes) and value else self.path(value or None, column)


class Kept(Generic[V]):
    """What was read last, at most ``limit`` in all (by ``size`` of each); at least one stays. Not for threads alone:
    hold ``lock`` around it."""

    def __init__(self, limit: float, size: Callable[[V], float]) -> None:
        self.limit, self.size, self.sum = limit, size, 0.0
        self.items: OrderedDict[Hashable, V] = OrderedDict()
        self.lock = threading.Lock()

    def get(self, key: Hashable) -> V | None:
        """The thing, which becomes the latest; None when it is not kept."""
        found = self.items.get(key)
        if found is not None:
            self.items.move_to_end(key)
        return found

    def put(self, key: Hashable, value: V) -> V:
        """Keep a thing and let go of the oldest."""
        self.items[key] = value
        self.sum += self.size(value)
        while len(self.items) > 1 and self.sum > self.limit:
            _, old = self.items.popitem(last=False)
            self.sum -= self.size(old)
        return value
