"""WebDataset shards: tar files in which the members of a sample follow one another under one key.

``000.chosen.jpg``, ``000.rejected.jpg``, ``000.json`` (or ``000.txt``); ``000.jpg_0``, ``000.jpg_1``; ``000.jpg`` and
``000.txt`` for captioned pictures. Each member's place is kept, so that any picture is one read away.
"""

from __future__ import annotations

import json
import re
import tarfile
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from ..errors import UserError
from .images import ImageError
from .rows import BadRow, digest_of, file_stamp
from .table import Kept, Table

PICTURES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
TEXTS = {"txt", "text", "cls", "caption", "prompt"}
RECORD = "json"
FILES_OPEN = 32
RECORDS_KEPT = 1024
SHARDS_MOST = 100_000
LOOKED_INTO = 16  # samples whose json tells the names of columns


class WebDatasetTable(Table):
    """Samples of one or more .tar files. A member ``key.name.jpg`` is the column ``name``, ``key.jpg`` is ``image``,
    ``key.name.txt`` the text ``name``, ``key.txt`` is ``prompt``; the keys of ``key.json`` are columns too.

    Raises UserError for a file that is no tar, and for compressed ones."""

    def __init__(self, label: str, shards: Sequence[Path]) -> None:
        super().__init__("webdataset", label, shards[0].parent, [], 0)
        self.shards = list(shards)
        self.shard_of = array("i")
        self.keys, self.key_ends = bytearray(), array("q")
        # by column: (offset, size) of each sample's member; size -1 where it has none
        self.members: dict[str, tuple[array[int], array[int]]] = {}
        self.binary: set[str] = set()
        self.opened: Kept[IO[bytes]] = Kept(FILES_OPEN, lambda _: 1)
        self.records: Kept[dict[str, Any]] = Kept(RECORDS_KEPT, lambda _: 1)
        for number, shard in enumerate(self.shards):
            self._index(number, shard)
        self.total = len(self.shard_of)
        self.stamps = [file_stamp(shard) for shard in self.shards]
        names = dict.fromkeys(name for name in self.members if name != RECORD)
        for row in range(min(LOOKED_INTO, self.total)):
            names.update(dict.fromkeys(self._record(row)))
        self.columns = list(names)

    def signature(self) -> str:
        return digest_of(*(stamp.encode() for stamp in self.stamps))

    def holds_bytes(self, column: str) -> bool:
        return column in self.binary

    def place(self, row: int) -> str:
        start = self.key_ends[row - 1] if row else 0
        key = self.keys[start : self.key_ends[row]].decode(errors="replace")
        return f"{self.shards[self.shard_of[row]].name} sample {key}"

    def stamp(self, row: int, column: str) -> str:
        if column not in self.binary:
            return super().stamp(row, column)
        return f"{self.stamps[self.shard_of[row]]}|{self.members[column][0][row]}"

    def image(self, row: int, column: str) -> bytes | Path:
        if column not in self.binary:
            return super().image(row, column)
        data = self._member(row, column)
        if data is None:
            raise ImageError(f"the sample has no '{column}' picture", "missing image")
        return data

    def value(self, row: int, column: str) -> Any:
        """A text member, else a key of the sample's json."""
        if column in self.members and column not in self.binary and column != RECORD:
            data = self._member(row, column)
            if data is not None:
                try:
                    return data.decode("utf-8-sig").strip()
                except UnicodeDecodeError as error:
                    raise ImageError(f"'{column}' is no UTF-8 text", "malformed row") from error
        return self._record(row, strict=True).get(column)

    def _record(self, row: int, strict: bool = False) -> dict[str, Any]:
        """What the sample's json says; empty where there is none, or, unless ``strict``, where it is none."""
        with self.records.lock:
            found = self.records.get(row)
        if found is None:
            data = self._member(row, RECORD)
            try:
                found = {} if data is None else json.loads(data)
                if not isinstance(found, dict):
                    raise ValueError("no object")
            except (ValueError, RecursionError) as error:
                if strict:
                    raise ImageError(f"the sample's json is none: {error}", "malformed row") from error
                return {}
            with self.records.lock:
                self.records.put(row, found)
        return found

    def _member(self, row: int, column: str) -> bytes | None:
        """Bytes of a member; None where the sample has none. Raises ImageError when the shard was cut off since."""
        offsets, sizes = self.members.get(column, ([], []))
        if row >= len(sizes) or sizes[row] < 0:
            return None
        offset, size = offsets[row], sizes[row]
        number = self.shard_of[row]
        with self.opened.lock:
            try:
                file = self.opened.get(number)
                if file is None:
                    file = self.opened.put(number, open(self.shards[number], "rb"))  # noqa: SIM115  until others are used
                file.seek(offset)
                data = file.read(size)
            except OSError as error:
                raise ImageError(
                    f"'{self.shards[number]}' cannot be read: {error.strerror}", "missing image"
                ) from error
        if len(data) != size:
            raise ImageError(f"'{self.shards[number]}' is cut off")
        return data

    def _index(self, number: int, shard: Path) -> None:
        key, known = None, set[str]()
        for name, offset, size in self._walk(shard):
            head, _, extension = name.rpartition("/")[2].partition(".")
            column, binary = column_of(extension.lower())
            if not head or not column:
                continue
            full = name[: len(name) - len(extension) - 1]
            if full != key:
                key, known = full, set()
                self.shard_of.append(number)
                self.keys += full.encode(errors="replace")
                self.key_ends.append(len(self.keys))
            if column in known:
                continue  # the first one counts: key.jpg before key.png
            known.add(column)
            self._put(len(self.shard_of) - 1, column, binary, offset, size)

    def _put(self, row: int, column: str, binary: bool, offset: int, size: int) -> None:
        if column not in self.members:
            self.members[column] = array("q"), array("q")
            if binary:
                self.binary.add(column)
        offsets, sizes = self.members[column]
        gap = row - len(sizes)
        offsets.extend([0] * gap)
        sizes.extend([-1] * gap)
        offsets.append(offset)
        sizes.append(size)

    def _walk(self, shard: Path) -> Iterator[tuple[str, int, int]]:
        """Name, offset and size of the files of a shard; a shard that is cut off gives those before the cut."""
        try:
            with tarfile.open(shard, "r:") as tar:
                end = shard.stat().st_size
                while (member := tar.next()) is not None:
                    if member.isfile():
                        if member.offset_data + member.size > end:
                            raise tarfile.ReadError("unexpected end of data")
                        yield member.name, member.offset_data, member.size
                    vars(tar)["members"].clear()  # its list of a million members is not needed
        except tarfile.ReadError as error:
            if not self.shard_of or self.shards[self.shard_of[-1]] != shard:
                raise UserError(
                    f"'{shard}' is no plain .tar ({error}); unpack compressed ones: gzip has no random access"
                ) from error
            self.bad.append(BadRow(f"{shard.name} after {len(self.shard_of)} samples", "malformed row", str(error)))
        except OSError as error:
            raise UserError(f"'{shard}' cannot be read: {error.strerror or error}") from error


def column_of(extension: str) -> tuple[str, bool]:
    """(column, whether it holds a picture) of a member's extension; ("", False) for others."""
    stem, _, last = extension.rpartition(".")
    if last == RECORD:
        return RECORD, False
    if re.fullmatch(r"jpg_\d+", last):
        return last, True
    if last in PICTURES:
        return (f"jpg_{stem}" if stem in ("0", "1") else stem or "image"), True
    if last in TEXTS:
        return (stem or ("prompt" if last in ("txt", "text") else last)), False
    return "", False


def from_members(record: dict[str, Any]) -> dict[str, Any]:
    """A sample as `datasets` gives it (names of members), under the names of columns."""
    found: dict[str, Any] = {}
    for name, value in record.items():
        column, _ = column_of(name.lower())
        if column and column != RECORD:
            found.setdefault(column, value)
    inner = next((v for k, v in record.items() if column_of(k.lower())[0] == RECORD and isinstance(v, dict)), {})
    return {**inner, **found}


def expand(pattern: str) -> list[str]:
    """``x-{000..012}.tar`` and ``{a,b}/x.tar`` as the names they stand for, in order."""
    found = re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", pattern)
    if found is None:
        return [pattern]
    first, last, names = found.groups()
    if names is None:
        width = len(first) if first.startswith("0") else 0
        if int(last) - int(first) >= SHARDS_MOST:
            raise UserError(f"'{pattern}' stands for {int(last) - int(first) + 1:,} files; the most is {SHARDS_MOST:,}")
        parts = [str(i).zfill(width) for i in range(int(first), int(last) + 1)]
    else:
        parts = names.split(",")
    return [text for part in parts for text in expand(pattern[: found.start()] + part + pattern[found.end() :])]
