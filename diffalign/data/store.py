"""Tensors by content key in safetensors shards: written whole or not at all, checked before they are used."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from .files import make_folder, remove_leftovers, write_atomic

SHARD_ROWS = 512
SHARD_BYTES = 64 * 2**20
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I32": torch.int32}
NAME = re.compile(r"[0-9a-f]{32}\.safetensors")


class TornShard(Exception):
    """A shard that is cut off, altered, or made by something else."""


@dataclass
class Shard:
    """One file, memory-mapped on first use."""

    path: Path
    keys: list[str]
    layout: dict[str, tuple[torch.dtype, list[int], int, int]]
    size: int
    tensors: dict[str, Tensor] | None = None

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
        digest = hashlib.sha256()
        with open(self.path, "rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
        if digest.hexdigest()[:32] != self.path.stem:
            raise TornShard("content altered")

    def row(self, number: int) -> dict[str, Tensor]:
        """Views of one entry, straight from the mapped file."""
        if self.tensors is None:
            data = torch.from_file(str(self.path), shared=False, size=self.size, dtype=torch.uint8)
            self.tensors = {
                name: data[start:end].view(dtype).view(shape)
                for name, (dtype, shape, start, end) in self.layout.items()
            }
        return {name: tensor[number] for name, tensor in self.tensors.items()}


class Store:
    """Entries (a few tensors each) by key under one folder.

    Everything in it was made by the same ``made_by``: a mapping of names to hashes and settings. A shard's file name is
    the hash of its content; a shard that is cut off, altered or made by anything else is never used.
    """

    def __init__(self, folder: Path, made_by: Mapping[str, str]) -> None:
        self.folder = folder
        self.made_by = dict(made_by)
        self.fingerprint = fingerprint_of(made_by)
        self.shards: dict[str, Shard] = {}
        self.index: dict[str, tuple[Shard, int]] = {}
        self.refused: list[str] = []

    def __contains__(self, key: str) -> bool:
        return key in self.index

    def __len__(self) -> int:
        return len(self.index)

    def missing(self, keys: Iterable[str]) -> list[str]:
        """The keys that are not here, each once, in order."""
        return [key for key in dict.fromkeys(keys) if key not in self.index]

    def get(self, key: str) -> dict[str, Tensor]:
        """The tensors of an entry: views into the mapped file, not to be written to."""
        shard, number = self.index[key]
        return shard.row(number)

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
                self._add(shard)
        if whole != stamps:
            write_atomic(self.folder / "checked.json", json.dumps(whole).encode())

    def refresh(self) -> None:
        """Take up shards that other processes wrote (whole by construction); drop none."""
        for path in self._files():
            if path.name not in self.shards:
                self._add(Shard.open(path, self.fingerprint))

    def look(self) -> None:
        """Take up what can be read without changing anything on the disk."""
        for path in self._files():
            try:
                self._add(Shard.open(path, self.fingerprint))
            except TornShard:
                continue  # `repair` will delete it

    def write(self, keys: Sequence[str], tensors: Mapping[str, Tensor]) -> None:
        """One new shard; every tensor has the keys on its first axis."""
        data = save(
            {name: tensor.contiguous() for name, tensor in tensors.items()},
            {"made_by": self.fingerprint, "keys": " ".join(keys)},
        )
        path = self.folder / f"{hashlib.sha256(data).hexdigest()[:32]}.safetensors"
        write_atomic(path, data)
        self._add(Shard.open(path, self.fingerprint))

    def bytes(self) -> int:
        """Size of all shards."""
        return sum(shard.size for shard in self.shards.values())

    def _add(self, shard: Shard) -> None:
        if shard.path.name not in self.shards:
            self.shards[shard.path.name] = shard
            for number, key in enumerate(shard.keys):
                self.index.setdefault(key, (shard, number))

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
