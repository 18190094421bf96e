"""Tensors by content key in safetensors shards: written whole or not at all, checked before they are used."""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from ..errors import RunError
from .files import file_sha256, make_folder, remove_leftovers, write_atomic
from .keyindex import KeyIndex, first_places, key_array

SHARD_ROWS = 512
SHARD_BYTES = 64 * 2**20
OPEN_FILES = 128
ROW_BITS = 20  # a place is the shard's number and the row in it
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I32": torch.int32}
NAME = re.compile(r"[0-9a-f]{32}\.safetensors")


class TornShard(Exception):
    """A shard that is cut off, altered, or made by something else."""


@dataclass
class Shard:
    """One file. ``layout`` is type, shape, first and last byte of each tensor."""

    path: Path
    keys: list[str]
    layout: dict[str, tuple[torch.dtype, list[int], int, int]]
    size: int

    @staticmethod
    def open(path: Path, made_by: str) -> Shard:
        """Read the header only. Raises TornShard when the file's size or its maker is not what it should be."""
        try:
            size = path.stat().st_size
            with open(path, "rb") as file:
                length = int.from_bytes(file.read(8), "little")
                if length > size - 8:
                    raise TornShard("cut off in its header")
                header = json.loads(file.read(length))
            extra = header.pop("__metadata__")
            keys = extra["keys"].split(" ")
            base = 8 + length
            layout = {
                name: (DTYPES[e["dtype"]], e["shape"], base + e["data_offsets"][0], base + e["data_offsets"][1])
                for name, e in header.items()
            }
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise TornShard(f"unreadable header: {error}") from error
        if extra.get("made_by") != made_by:
            raise TornShard("made by other weights or settings")
        if size != max(end for _, _, _, end in layout.values()):
            raise TornShard("cut off")
        if any(shape[0] != len(keys) for _, shape, _, _ in layout.values()):
            raise TornShard("rows and keys differ in number")
        return Shard(path, keys, layout, size)

    def verify(self) -> None:
        """Raises TornShard unless the content's hash is the file's name."""
        if file_sha256(self.path)[:32] != self.path.stem:
            raise TornShard("content altered")

    def row(self, number: int, file: FileIO) -> dict[str, Tensor]:
        """One entry, read from the open file. Raises RunError when the file has become shorter."""
        found = {}
        for name, (dtype, shape, start, end) in self.layout.items():
            length = (end - start) // shape[0]
            buffer = bytearray(length)
            file.seek(start + number * length)
            if file.readinto(buffer) != length:
                raise RunError(f"'{self.path}' was cut off while it was in use; start the command again")
            found[name] = torch.frombuffer(buffer, dtype=dtype).view(shape[1:])
        return found


class Files:
    """Open shards, the ones used last; reading is for one thread at a time."""

    def __init__(self) -> None:
        self.files: OrderedDict[Path, FileIO] = OrderedDict()
        self.lock = threading.Lock()

    def read(self, shard: Shard, number: int) -> dict[str, Tensor]:
        """One entry of a shard. Raises RunError when the file is gone or shorter."""
        with self.lock:
            try:
                file = self.files.pop(shard.path, None) or FileIO(shard.path)
                self.files[shard.path] = file
                if len(self.files) > OPEN_FILES:
                    self.files.popitem(last=False)[1].close()
                return shard.row(number, file)
            except OSError as error:
                why = error.strerror or error
                raise RunError(f"'{shard.path}' cannot be read ({why}); start the command again") from error


class Store:
    """Entries (a few tensors each) by key under one folder.

    Everything in it was made by the same ``made_by``: a mapping of names to hashes and settings. A shard's file name is
    the hash of its content; a shard that is cut off, altered or made by anything else is never used.
    """

    def __init__(self, folder: Path, made_by: Mapping[str, str]) -> None:
        self.folder = folder
        self.made_by = dict(made_by)
        self.fingerprint = fingerprint_of(made_by)
        self.shards: list[Shard] = []
        self.known: set[str] = set()  # names of the shards' files
        self.index = KeyIndex()
        self.files = Files()
        self.refused: list[str] = []

    def __contains__(self, key: str) -> bool:
        return bool(self.index.find(key_array([key]))[0] >= 0)

    def __len__(self) -> int:
        return len(self.index)

    def missing(self, keys: np.ndarray) -> np.ndarray:
        """Positions of the keys (n, 2) that are not here, each key once, ascending."""
        first = first_places(keys)
        return first[self.index.find(keys[first]) < 0]

    def find(self, keys: Iterable[str]) -> dict[str, dict[str, Tensor]]:
        """The entries that are here, each a few tensors, read from the disk."""
        names = list(dict.fromkeys(keys))
        places = self.index.find(key_array(names)).tolist()
        mask = (1 << ROW_BITS) - 1
        return {
            name: self.files.read(self.shards[place >> ROW_BITS], place & mask)
            for name, place in zip(names, places, strict=True)
            if place >= 0
        }

    def get(self, key: str) -> dict[str, Tensor]:
        """The tensors of an entry. Raises KeyError."""
        return self.find([key])[key]

    def repair(self) -> None:
        """Create the folder, delete what killed processes left, and every shard that is not whole. One process only."""
        make_folder(self.folder)
        remove_leftovers(self.folder)
        mark = self.folder / "cache.json"
        text = json.dumps({"format": 1, "made_by": self.made_by}, indent=2, sort_keys=True).encode()
        if not mark.is_file() or mark.read_bytes() != text:
            write_atomic(mark, text)
        stamps = self._stamps()
        whole: dict[str, list[int]] = {}
        found: list[Shard] = []
        for path in self._files():
            state = path.stat()
            stamp = [state.st_size, state.st_mtime_ns]
            try:
                shard = Shard.open(path, self.fingerprint)
                if stamps.get(path.name) != stamp:
                    shard.verify()
            except TornShard as error:
                self.refused.append(f"{path.name}: {error}")
                path.unlink()
            else:
                whole[path.name] = stamp
                found.append(shard)
        self._add(found)
        if whole != stamps:
            write_atomic(self.folder / "checked.json", json.dumps(whole).encode())

    def refresh(self) -> None:
        """Take up shards that other processes wrote (whole by construction); drop none."""
        self._add([Shard.open(path, self.fingerprint) for path in self._files() if path.name not in self.known])

    def look(self) -> None:
        """Take up what can be read without changing anything on the disk."""
        found = []
        for path in self._files():
            try:
                found.append(Shard.open(path, self.fingerprint))
            except TornShard:
                continue  # `repair` will delete it
        self._add(found)

    def write(self, keys: Sequence[str], tensors: Mapping[str, Tensor]) -> None:
        """One new shard; every tensor has the keys on its first axis."""
        data = save(
            {name: tensor.contiguous() for name, tensor in tensors.items()},
            {"made_by": self.fingerprint, "keys": " ".join(keys)},
        )
        path = self.folder / f"{hashlib.sha256(data).hexdigest()[:32]}.safetensors"
        write_atomic(path, data)
        self._add([Shard.open(path, self.fingerprint)])

    def bytes(self) -> int:
        """Size of all shards."""
        return sum(shard.size for shard in self.shards)

    def _add(self, shards: Sequence[Shard]) -> None:
        """Take up shards; their keys live in the index alone."""
        keys, places = [], []
        for shard in shards:
            if shard.path.name not in self.known:
                first = len(self.shards) << ROW_BITS
                self.known.add(shard.path.name)
                self.shards.append(shard)
                keys.append(key_array(shard.keys))
                places.append(np.arange(first, first + len(shard.keys)))
                shard.keys.clear()
        if keys:
            self.index.add(np.concatenate(keys), np.concatenate(places))

    def _files(self) -> list[Path]:
        return sorted(p for p in self.folder.glob("*.safetensors") if NAME.fullmatch(p.name))

    def _stamps(self) -> dict[str, list[int]]:
        """Size and time of the shards whose content was verified before."""
        try:
            return dict(json.loads((self.folder / "checked.json").read_text()))
        except (OSError, ValueError, TypeError):
            return {}


def fingerprint_of(made_by: Mapping[str, str]) -> str:
    """One hash of what made a store."""
    return hashlib.sha256(json.dumps(dict(made_by), sort_keys=True).encode()).hexdigest()


def maker_of(folder: Path) -> dict[str, str] | None:
    """What made the store in this folder; None when there is none, or its note is torn."""
    try:
        return dict(json.loads((folder / "cache.json").read_text())["made_by"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def free_bytes(folder: Path) -> int:
    """Free space of the disk that ``folder`` is or will be on."""
    while not folder.exists():
        folder = folder.parent
    state = os.statvfs(folder)
    return state.f_bavail * state.f_frsize


def rows_per_shard(entry_bytes: int) -> int:
    """Entries of one shard: 512, or fewer when they are large."""
    return max(1, min(SHARD_ROWS, SHARD_BYTES // max(1, entry_bytes)))
