"""Where the cache lives, and writing that survives kill -9 and a full disk."""

from __future__ import annotations

import errno
import hashlib
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from ..errors import RunError, UserError
from ..recipe import DataRecipe

# A temporary file of this age belongs to a process that was killed.
STALE_SECONDS = 3600


def cache_root(recipe: DataRecipe) -> Path:
    """``data.cache_dir``, else ``$DIFFALIGN_CACHE``, else ``diffalign`` in the user's cache folder."""
    if recipe.cache_dir:
        return Path(recipe.cache_dir).expanduser()
    return default_root()


def default_root() -> Path:
    """``$DIFFALIGN_CACHE``, else ``diffalign`` in the user's cache folder."""
    if os.environ.get("DIFFALIGN_CACHE"):
        return Path(os.environ["DIFFALIGN_CACHE"]).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "diffalign"


def make_folder(folder: Path) -> None:
    """Create a folder. Raises UserError where that is not possible."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cache folder '{folder}' cannot be made ({error.strerror}); set data.cache_dir, or data.cache=false"
        ) from error


@contextmanager
def swapping(path: Path, beside: Path | None = None) -> Iterator[BinaryIO]:
    """A file ``beside`` a path (``.NAME.tmp``) that takes its name when it is whole: flushed to the disk, then renamed.
    Raises OSError, and leaves nothing then."""
    beside = beside or path.with_name(f".{path.name}.tmp")
    try:
        with open(beside, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError:
        beside.unlink(missing_ok=True)
        raise


def swap(path: Path, data: bytes) -> None:
    """A file whose content is replaced as a whole or not at all. Raises OSError."""
    with swapping(path) as file:
        file.write(data)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """`swapping` for files of the cache, whose folder is made and flushed, too.

    Raises:
        RunError: the disk is full. UserError: the folder is not writable.
    """
    make_folder(path.parent)
    try:
        with swapping(path, path.parent / f".{path.name}.{os.getpid()}.tmp") as file:
            yield file
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise RunError(
                f"disk full: '{path.parent}' has no room for '{path.name}'; what is written so far is kept: free some "
                "space or set data.cache_dir, and start the same command again"
            ) from error
        raise UserError(
            f"cache folder '{path.parent}' is not writable ({error.strerror}); set data.cache_dir, or data.cache=false"
        ) from error
    folder = os.open(path.parent, os.O_RDONLY) if os.name == "posix" else None
    if folder is not None:
        os.fsync(folder)
        os.close(folder)


def write_atomic(path: Path, data: bytes) -> None:
    """Write beside, flush to the disk, rename: the file is there as a whole or not at all.

    Raises:
        RunError: the disk is full. UserError: the folder is not writable.
    """
    try:
        with replacing(path) as file:
            file.write(data)
    except RunError as error:
        raise RunError(str(error).replace("no room for", f"no room for {len(data):,} bytes of")) from error


def file_sha256(path: Path) -> str:
    """Hash of a file's content. Raises OSError."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def remove_leftovers(folder: Path) -> None:
    """Delete temporary files of killed processes."""
    for file in folder.glob(".*.tmp"):
        try:
            if time.time() - file.stat().st_mtime > STALE_SECONDS:
                file.unlink()
        except FileNotFoundError:
            continue  # another process was faster
