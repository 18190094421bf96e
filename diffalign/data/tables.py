"""The table behind a path: what kind it is, and who reads it."""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path

from ..errors import UserError, nearest
from .hub import DatasetTable, StreamTable, from_disk, open_hub, open_stream
from .parquet import ParquetTable
from .table import Table
from .text import read_text_table
from .webdataset import WebDatasetTable, expand

__all__ = ["Table", "open_table", "read_text_table"]

BUILTIN = ("tiny-pairs", "tiny-ranked")
METADATA = ("metadata.jsonl", "metadata.csv", "pairs.jsonl", "pairs.csv")
SAVED = ("dataset_info.json", "dataset_dict.json")
HUB_ID = re.compile(r"(hf://(datasets/)?)?[\w-][\w.-]*/[\w-][\w.-]*")
# By suffix: what reads a single file, as data.format calls it.
KINDS = {".jsonl": "folder", ".json": "folder", ".csv": "folder", ".parquet": "parquet", ".tar": "webdataset"}
LACKS = {
    "auto": "no metadata.jsonl, metadata.csv, *.parquet, *.tar or saved data set",
    "folder": "no metadata.jsonl or metadata.csv",
    "parquet": "no *.parquet",
    "datasets": "nothing written by save_to_disk",
    "webdataset": "no *.tar",
}


def _builtin(name: str) -> Path | None:
    """A data set that ships with the package: ``tiny-pairs``, ``tiny-pairs/folder``, ``tiny-ranked``."""
    parts = Path(name).parts
    if not parts or parts[0] not in BUILTIN or ".." in parts:
        return None
    found = Path(str(resources.files("diffalign.assets"))).joinpath(*parts)
    return found if found.exists() else None


def open_table(path: str, format: str = "auto", split: str = "train", streaming: bool = False) -> Table:
    """The table behind a path, a pattern (``x-{000..012}.tar``), a built-in name or a hub id, recognised by what is
    there. ``streaming`` reads it through `datasets`, forwards, without a copy of a hub data set on the disk.

    Raises:
        UserError: nothing there, unknown kind, or not readable.
    """
    place = _builtin(path) or Path(path).expanduser()
    if "\0" in path or not path.strip():
        raise UserError("data.path is empty or no path; name a folder, a file or a hub id")
    if "{" in path and not place.exists():
        return _open_files(path, [Path(name).expanduser() for name in expand(path)], format, streaming)
    if path.startswith("hf://") or not _exists(place):
        if format in ("auto", "datasets") and HUB_ID.fullmatch(path):
            return open_hub(path, split, streaming)
        beside = [p.name for p in place.parent.iterdir()] if place.parent.is_dir() else []
        raise UserError(f"data.path '{path}' does not exist{nearest(place.name, beside)}")
    if place.is_file():
        return _open_files(path, [place], format, streaming)
    return _open_folder(path, place, format, split, streaming)


def _exists(place: Path) -> bool:
    try:
        return place.exists()
    except OSError:  # a name that is too long, for one
        return False


def _open_files(label: str, files: list[Path], format: str, streaming: bool) -> Table:
    """Files that were named one by one."""
    for file in files:
        if not file.is_file():
            raise UserError(f"'{file}' of data.path '{label}' does not exist")
    if files[0].name.endswith((".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")):
        raise UserError(f"'{files[0]}' is compressed, and so has no random access; unpack it to a plain .tar")
    kind = KINDS.get(files[0].suffix)
    if kind is None or format not in ("auto", kind) or (kind == "folder" and len(files) > 1):
        raise UserError(f"data.path '{label}' is no .jsonl, .csv, .parquet or .tar file (data.format={format})")
    return _open(label, files, kind, streaming)


def _open(label: str, files: list[Path], kind: str, streaming: bool) -> Table:
    if streaming:
        return open_stream(label, files)
    if kind == "folder":
        return read_text_table(files[0])
    return ParquetTable(Path(label), files) if kind == "parquet" else WebDatasetTable(label, files)


def _open_folder(path: str, place: Path, format: str, split: str, streaming: bool) -> Table:
    if format in ("auto", "folder"):
        for name in (*METADATA, *(f"{split}/{name}" for name in METADATA)):
            if (place / name).is_file():
                return _open(str(place / name), [place / name], "folder", streaming)
    if format in ("auto", "datasets") and any((place / name).is_file() for name in SAVED):
        data = from_disk(place, split)
        if streaming:
            return StreamTable(str(place), place, data.to_iterable_dataset(), data._fingerprint)
        return DatasetTable(str(place), data)
    for kind, pattern in (("parquet", "*.parquet"), ("webdataset", "*.tar")):
        if format in ("auto", kind):
            files = _of_split(sorted(place.rglob(pattern)), split)
            if files:
                return _open(str(place), files, kind, streaming)
    raise UserError(f"folder '{path}' holds {LACKS[format]}; see `diffalign pairs check --help` for the formats")


def _of_split(files: list[Path], split: str) -> list[Path]:
    """The hub's layout names files by split (``train-00000-of-00010.parquet``); others belong to every split."""
    named = [f for f in files if re.match(r"(train|validation|test|dev)([-_.]|$)", f.name)]
    if not named:
        return files
    mine = [f for f in named if re.match(re.escape(split) + r"([-.]|_\d|$)", f.name)]
    if not mine:
        known = {re.split(r"[-.]", f.name)[0] for f in named}
        kind = "Parquet" if files[0].suffix == ".parquet" else files[0].suffix
        raise UserError(f"no {kind} file of the split '{split}' in '{files[0].parent}'{nearest(split, known)}")
    return mine
