"""Looks at every picture once: does it decode, how large is it, is it the same as another one."""

from __future__ import annotations

import bisect
import hashlib
import io
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ..recipe import DataRecipe
from .files import cache_root, write_atomic
from .images import Alpha, ImageError, difference_hash, load_image
from .keyindex import KeyIndex
from .rows import ImageRef, digest_of

# Below this many pictures looking again is cheaper than a file.
KEEP_FROM = 1000
SAVE_EVERY = 20_000
CODE = b"3"  # raised whenever a look would say something else
BLOCKS = 512
PACKED = np.dtype([("digest", "V16"), ("pixels", "V16"), ("width", "i4"), ("height", "i4"), ("hash", "u8")])


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


class Seen:
    """Looks by the stamp of their picture, about 80 bytes each; only pictures of no use keep more."""

    def __init__(self) -> None:
        self.index = KeyIndex()
        self.blocks: list[np.ndarray] = []  # of PACKED
        self.starts: list[int] = []
        self.count = 0
        self.useless: dict[bytes, Look] = {}

    def find(self, stamp: bytes) -> Look | None:
        """What is known of a stamp. Safe from several threads while nothing is added."""
        place = int(self.index.find(np.frombuffer(stamp, np.uint64).reshape(1, 2))[0])
        if place < 0:
            return self.useless.get(stamp)
        number = bisect.bisect_right(self.starts, place) - 1
        row = self.blocks[number][place - self.starts[number]]
        digest, pixels = row["digest"].tobytes().hex(), row["pixels"].tobytes().hex()
        return Look(digest, int(row["width"]), int(row["height"]), pixels, hash=int(row["hash"]))

    def add(self, stamps: Sequence[bytes], looks: Sequence[Look]) -> None:
        """Looks under their stamps; the first one of a stamp stays."""
        good = [(stamp, look) for stamp, look in zip(stamps, looks, strict=True) if not look.error]
        self.useless |= {stamp: look for stamp, look in zip(stamps, looks, strict=True) if look.error}
        if not good:
            return
        block = np.array(
            [(bytes.fromhex(k.digest), bytes.fromhex(k.pixels), k.width, k.height, k.hash) for _, k in good], PACKED
        )
        keys = np.frombuffer(b"".join(stamp for stamp, _ in good), np.uint64).reshape(-1, 2)
        self.index.add(keys, np.arange(self.count, self.count + len(block)))
        self.starts.append(self.count)
        self.blocks.append(block)
        self.count += len(block)
        if len(self.blocks) > BLOCKS:
            self.blocks, self.starts = [np.concatenate(self.blocks)], [0]


class Scanner:
    """Looks with a thread pool; what was seen is kept beside the cache and reused while a file's size and time stand.

    What is new is written as one more file, named by the hash of its content: a file that was altered is deleted and
    its pictures are looked at again. ``expected`` is the number of pictures to come: results of small sets are not
    kept.
    """

    def __init__(self, recipe: DataRecipe, label: str, expected: int) -> None:
        self.alpha = recipe.alpha
        self.seen = Seen()
        self.fresh: list[tuple[bytes, Look]] = []
        self.name = digest_of(str(Path(label).absolute()).encode(), recipe.split.encode(), recipe.alpha.encode(), CODE)
        keep = recipe.cache and expected >= KEEP_FROM
        self.folder: Path | None = cache_root(recipe) / "scans" if keep else None
        self.pool = ThreadPoolExecutor(workers(), thread_name_prefix="scan")
        for file in sorted(self.folder.glob(f"{self.name}-*.parquet")) if self.folder is not None else ():
            self._load(file)

    def __enter__(self) -> Scanner:
        return self

    def __exit__(self, *error: object) -> None:
        self.pool.shutdown(cancel_futures=True)
        self.save()

    def look(self, refs: Sequence[ImageRef]) -> list[Look]:
        """One look for each reference, in order."""
        found = list(self.pool.map(self._one, refs))
        fresh = [(stamp, look) for stamp, look, new in found if new and stamp]
        if self.folder is not None:
            self.fresh += fresh
            self.seen.add([stamp for stamp, _ in fresh], [look for _, look in fresh])
        return [look for _, look, _ in found]

    def _one(self, ref: ImageRef) -> tuple[bytes, Look, bool]:
        """(stamp or b"", look, whether it is worth keeping)."""
        text = ref.stamp() if self.folder is not None else ""
        stamp = bytes.fromhex(digest_of(text.encode(errors="surrogatepass"))) if text else b""
        known = self.seen.find(stamp) if stamp else None
        if known is not None:
            return stamp, known, False
        look = look_at(ref, self.alpha)
        return stamp, look, look.reason != "missing image"

    def save(self, least: int = 1) -> None:
        """Write what is new, when that is at least ``least`` looks."""
        if self.folder is None or len(self.fresh) < least:
            return
        import pyarrow as pa
        import pyarrow.parquet as pq

        looks = [look for _, look in self.fresh]
        columns = {name: [getattr(look, name) for look in looks] for name in Look.__dataclass_fields__}
        arrays = {n: pa.array(c, pa.uint64() if n == "hash" else None) for n, c in columns.items()}
        buffer = io.BytesIO()
        stamps = pa.array([stamp for stamp, _ in self.fresh], pa.binary(16))
        pq.write_table(pa.table({"stamp": stamps, **arrays}), buffer, compression="zstd")
        data = buffer.getvalue()
        write_atomic(self.folder / f"{self.name}-{_hash(data)}.parquet", data)
        self.fresh = []

    def _load(self, file: Path) -> None:
        """Take up what an earlier scan saw. A file that is not what its name says is deleted."""
        import pyarrow.parquet as pq

        data = file.read_bytes()
        if _hash(data) != file.stem.rpartition("-")[2]:
            file.unlink(missing_ok=True)
            return
        for batch in pq.ParquetFile(io.BytesIO(data)).iter_batches(8192):
            columns = batch.to_pydict()
            stamps = columns.pop("stamp")
            self.seen.add(stamps, [Look(*row) for row in zip(*columns.values(), strict=True)])


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:32]
