"""Looks at every picture once: does it decode, how large is it, is it the same as another one."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass, replace
from pathlib import Path

from ..recipe import DataRecipe
from .files import cache_root, write_atomic
from .images import Alpha, ImageError, difference_hash, load_image
from .rows import ImageRef, digest_of

# Below this many pictures looking again is cheaper than a file.
KEEP_FROM = 1000
SAVE_EVERY = 20_000


def workers() -> int:
    """Threads for decoding: the cores this process may use, at most 8."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(8, cores))


@dataclass(frozen=True)
class Look:
    """``digest`` of the bytes, ``pixels`` and ``hash`` (64-bit difference hash) of the decoded picture; ``error`` and
    its ``reason`` when it is of no use."""

    digest: str = ""
    width: int = 0
    height: int = 0
    pixels: str = ""
    error: str = ""
    reason: str = ""
    hash: int = 0

    def apply(self, ref: ImageRef) -> ImageRef:
        """The reference with what was seen."""
        return replace(ref, digest=self.digest, size=(self.width, self.height))


def look_at(ref: ImageRef, alpha: Alpha) -> Look:
    """Read and decode one picture in full."""
    try:
        data = ref.read()
    except ImageError as error:
        return Look(error=f"{ref.name}: {error}", reason=error.reason)
    return look_bytes(data, ref.name, alpha)


def look_bytes(data: bytes, name: str, alpha: Alpha) -> Look:
    """Decode one picture in full; ``name`` is for the error."""
    try:
        image = load_image(data, alpha)
    except ImageError as error:
        return Look(error=f"{name}: {error}", reason=error.reason)
    pixels = digest_of(f"{image.size}".encode(), image.tobytes())
    return Look(digest_of(data), image.width, image.height, pixels, hash=difference_hash(image))


class Scanner:
    """Looks with a thread pool; what was seen is kept beside the cache and reused while a file's size and time stand.

    ``expected`` is the number of pictures to come: results of small sets are not kept."""

    def __init__(self, recipe: DataRecipe, label: str, expected: int) -> None:
        self.alpha = recipe.alpha
        self.seen: dict[str, Look] = {}
        self.fresh = 0
        name = digest_of(str(Path(label).absolute()).encode(), recipe.split.encode(), recipe.alpha.encode(), b"2")
        keep = recipe.cache and expected >= KEEP_FROM
        self.file: Path | None = cache_root(recipe) / "scans" / f"{name}.parquet" if keep else None
        self.pool = ThreadPoolExecutor(workers(), thread_name_prefix="scan")
        if self.file is not None and self.file.is_file():
            self.seen = _load(self.file)

    def __enter__(self) -> Scanner:
        return self

    def __exit__(self, *error: object) -> None:
        self.pool.shutdown(cancel_futures=True)
        self.save()

    def look(self, refs: Sequence[ImageRef]) -> list[Look]:
        """One look for each reference, in order."""
        return list(self.pool.map(self._one, refs))

    def _one(self, ref: ImageRef) -> Look:
        stamp = ref.stamp()
        known = self.seen.get(stamp) if stamp else None
        if known is not None:
            return known
        look = look_at(ref, self.alpha)
        if stamp and look.reason != "missing image":
            self.seen[stamp] = look
            self.fresh += 1
        return look

    def save(self, least: int = 1) -> None:
        """Write what was seen, when at least ``least`` looks are new."""
        if self.file is None or self.fresh < least:
            return
        import pyarrow as pa
        import pyarrow.parquet as pq

        columns = list(zip(*(astuple(look) for look in self.seen.values()), strict=True))
        names = [*Look.__dataclass_fields__]
        arrays = {n: pa.array(c, pa.uint64() if n == "hash" else None) for n, c in zip(names, columns, strict=True)}
        table = pa.table({"stamp": list(self.seen), **arrays})
        buffer = io.BytesIO()
        pq.write_table(table, buffer, compression="zstd")
        write_atomic(self.file, buffer.getvalue())
        self.fresh = 0


def _load(file: Path) -> dict[str, Look]:
    """What an earlier scan saw; nothing when the file is torn: then it is made anew."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        columns = pq.read_table(file).to_pydict()
        stamps = columns.pop("stamp")
        return {stamp: Look(*row) for stamp, row in zip(stamps, zip(*columns.values(), strict=True), strict=True)}
    except (pa.ArrowInvalid, OSError, KeyError, TypeError):
        return {}
