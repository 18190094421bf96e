"""The data path at size: many small pairs on disk, cached, then read in batches; rate and memory over time."""

from __future__ import annotations

import gc
import io
import json
import resource
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ..data.cache import open_cache
from ..data.files import cache_root, write_atomic
from ..data.keyindex import KeyIndex, key_array, key_bytes
from ..data.rowfile import read_rows
from ..data.rows import ImageRef, PairRow
from ..data.rowtable import PairRows
from ..data.source import Source
from ..errors import UserError
from ..families import pick_device
from ..recipe import Recipe
from ..setup import load_base

if TYPE_CHECKING:
    from rich.console import Console

SIDE = 32
PIECE = 2000  # pairs of one Parquet row group
PER_PROMPT = 20  # pairs of one prompt
INTERVAL = 0.25  # seconds between looks at the memory
Form = Literal["parquet", "folder"]


@dataclass
class Stage:
    """One part of the work. ``cpu`` are seconds of all cores together. Memory is the process's resident set in MB;
    ``slope`` is its growth in the second half, in MB for every 100,000 pairs that passed."""

    name: str
    pairs: int
    seconds: float
    cpu: float
    start: float
    end: float
    peak: float
    slope: float
    curve: list[tuple[float, float]] = field(default_factory=list, repr=False)

    @property
    def rate(self) -> float:
        """Pairs a second."""
        return self.pairs / self.seconds


@dataclass
class DataReport:
    """What ``bench data`` found."""

    pairs: int
    form: str
    picture: int
    data_mb: float
    cache_mb: float
    rows_mb: float
    stages: list[Stage]
    index: dict[str, float]

    def json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self) | {"stages": [asdict(s) | {"pairs_per_second": s.rate} for s in self.stages]}

    def render(self, console: Console) -> None:
        """For a person."""
        from rich.table import Table

        title = f"{self.pairs:,} pairs of {SIDE} px pictures ({self.form}, {self.data_mb:,.0f} MB)"
        table = Table("stage", "seconds", "CPU", "pairs/s", "RSS start", "end", "peak MB", "MB / 100k", title=title)
        for s in self.stages:
            numbers = (f"{n:,.0f}" for n in (s.seconds, s.cpu, s.rate, s.start, s.end, s.peak))
            table.add_row(s.name, *numbers, f"{s.slope:+.1f}")
        console.print(table)
        console.print(f"cache {self.cache_mb:,.0f} MB, row file {self.rows_mb:,.1f} MB; MB / 100k: second half of each")
        if self.index:
            console.print(
                f"{int(self.index['rows']):,} rows alone: {self.index['bytes_per_row']:.0f} bytes a row in memory, "
                f"{self.index['file_bytes_per_row']:.0f} in mapped files, {self.index['read_us']:.0f} CPU us a read"
            )


class Watch:
    """The process's resident memory, looked at in a thread."""

    def __init__(self) -> None:
        self.stages: list[Stage] = []

    @staticmethod
    def rss(kind: str = "VmRSS") -> float:
        """MB, of ``VmRSS`` (all) or ``RssAnon`` (without pages of files). The peak so far where there is no /proc."""
        status = Path("/proc/self/status")
        if not status.is_file():
            unit = 1 if sys.platform == "darwin" else 1024
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6
        line = next(line for line in status.read_text().splitlines() if line.startswith(f"{kind}:"))
        return int(line.split()[1]) * 1024 / 1e6

    @contextmanager
    def stage(self, name: str, pairs: int) -> Iterator[None]:
        """Time and memory of what is done inside."""
        gc.collect()
        curve: list[tuple[float, float]] = []
        ended, began, first = threading.Event(), time.perf_counter(), self.rss()
        worked = time.process_time()

        def look() -> None:
            while not ended.wait(INTERVAL):
                curve.append((time.perf_counter() - began, self.rss()))

        thread = threading.Thread(target=look, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
        seconds, cpu, last = time.perf_counter() - began, time.process_time() - worked, self.rss()
        curve.append((seconds, last))
        late = np.array([point for point in curve if point[0] >= seconds / 2])
        per_second = float(np.polyfit(late[:, 0], late[:, 1], 1)[0]) if len(late) > 3 else 0.0
        slope = per_second * seconds / pairs * 100_000
        peak = max(first, *(rss for _, rss in curve))
        self.stages.append(Stage(name, pairs, seconds, cpu, first, last, peak, slope, thin(curve)))


def thin(curve: list[tuple[float, float]], count: int = 60) -> list[tuple[float, float]]:
    """At most ``count`` points, evenly spread."""
    step = max(1, len(curve) // count)
    return [(round(t, 2), round(m, 1)) for t, m in curve[::step]]


def picture(number: int) -> bytes:
    """A JPEG of smooth noise, another one for each number."""
    from PIL import Image

    cells = np.random.default_rng(number).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(cells).resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def make_pairs(folder: Path, pairs: int, form: Form) -> Path:
    """``pairs`` pairs under ``folder``; what is whole already is not made again. Returns the path for ``data.path``."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    place = folder / f"pairs-{form}-{pairs}"
    if (place / "whole").is_file():
        return place
    place.mkdir(parents=True, exist_ok=True)
    numbers = range(pairs)
    prompts = [f"scene {n // PER_PROMPT} of coloured shapes" for n in numbers]
    if form == "parquet":
        schema = pa.schema([("prompt", pa.string()), ("chosen", pa.binary()), ("rejected", pa.binary())])
        with pq.ParquetWriter(place / "train.parquet", schema, compression="none") as writer:
            for start in range(0, pairs, PIECE):
                part = numbers[start : start + PIECE]
                sides = [[picture(2 * n + side) for n in part] for side in (0, 1)]
                writer.write_table(pa.table([prompts[start : start + PIECE], *sides], schema=schema))
    else:
        with open(place / "metadata.jsonl", "w", encoding="utf-8") as file:
            for n in numbers:
                names = [f"{n // PIECE:04d}/{n}-{side}.jpg" for side in "ab"]
                (place / f"{n // PIECE:04d}").mkdir(exist_ok=True)
                for side, name in enumerate(names):
                    (place / name).write_bytes(picture(2 * n + side))
                row = {"prompt": prompts[n], "chosen": names[0], "rejected": names[1]}
                file.write(json.dumps(row) + "\n")
    write_atomic(place / "whole", b"")
    return place


def measure_index(watch: Watch, rows: int, folder: Path) -> dict[str, float]:
    """Memory of ``rows`` rows and of the keys of their pictures, without any picture."""
    if not rows:
        return {}
    before = watch.rss("RssAnon")
    packed = PairRows(None, folder)
    with watch.stage(f"{rows:,} rows, index alone", rows):
        for n in range(rows):
            chosen, rejected = (
                ImageRef(
                    folder / f"{n // PIECE:04d}" / f"{n}-{side}.jpg", "", key_bytes(f"{side}{n}").hex(), (512, 512)
                )
                for side in "ab"
            )
            packed.append(PairRow(f"{n:020d}", f"scene {n // PER_PROMPT} of coloured shapes", chosen, rejected))
        index = KeyIndex()
        keys = np.stack([packed.digests("chosen"), packed.digests("rejected")], 1).reshape(-1, 2)
        index.add(keys, np.arange(len(keys)))
        del keys
        gc.collect()
    after = watch.rss("RssAnon")
    places = np.random.default_rng(0).integers(0, rows, 2000).tolist()
    began = time.process_time()
    for place in places:
        row = packed[place]
        index.find(key_array([row.chosen.digest, row.rejected.digest]))
    read = (time.process_time() - began) / len(places)
    files = sum(batch.nbytes for batch in packed.batches())
    return {
        "rows": float(rows),
        "bytes_per_row": (after - before) * 1e6 / rows,
        "file_bytes_per_row": files / rows,
        "read_us": read * 1e6,
    }


def measure_data(
    recipe: Recipe,
    pairs: int = 10_000,
    form: Form = "parquet",
    folder: Path | None = None,
    index: int = 0,
    say: Callable[[str], None] = lambda text: None,
) -> DataReport:
    """Make pairs, read and cache them with the recipe's model, open the cache again, and read one epoch in batches.

    Args:
        folder: where data and cache lie; kept, and used again. None is a temporary folder that is deleted.
        index: rows of a synthetic index whose memory is measured first.

    Raises:
        UserError: the folder cannot be written, or fewer than 100 pairs.
    """
    if pairs < 100:
        raise UserError(f"--pairs {pairs} is too few to measure; give 100 or more")
    place = folder or Path(tempfile.mkdtemp(prefix="diffalign-bench-"))
    try:
        return _measure(recipe, pairs, form, place, index, say)
    except OSError as error:
        raise UserError(f"'{place}' cannot be used ({error.strerror or error}); set --folder") from error
    finally:
        if folder is None:
            shutil.rmtree(place, ignore_errors=True)


def _measure(recipe: Recipe, pairs: int, form: Form, place: Path, index: int, say: Callable[[str], None]) -> DataReport:
    watch = Watch()
    place.mkdir(parents=True, exist_ok=True)
    found = measure_index(watch, index, place)
    say("making pairs")
    with watch.stage("make the pairs", pairs):
        path = make_pairs(place, pairs, form)
    recipe = recipe.model_copy(deep=True)
    recipe.data.path, recipe.data.cache, recipe.data.cache_dir = str(path), True, str(place / f"cache-{form}-{pairs}")
    recipe.data.max_pairs, recipe.data.format, recipe.data.streaming = None, "auto", False
    root = cache_root(recipe.data)
    model, _ = load_base(recipe, pick_device(recipe.train.device))

    say("reading rows")
    with watch.stage("read rows", pairs):
        rows, report = read_rows(recipe.data, "pair")
    say(report.summary())
    with watch.stage("encode and write", pairs):
        cache = open_cache(rows, model, recipe.data, root, progress=_telling(say))
    del rows, cache
    with watch.stage("open again", pairs):
        rows, _ = read_rows(recipe.data, "pair")
        cache = open_cache(rows, model, recipe.data, root)
    source = Source(cache, range(len(cache)), recipe.train.seed, cache.uncond, recipe.data.caption_dropout)
    with watch.stage(f"one epoch in batches of {recipe.train.batch}", len(source)):
        for start in range(0, len(source), recipe.train.batch):
            indices, visits = source.rows(start, min(recipe.train.batch, len(source) - start))
            for part in source.cut(indices, visits, recipe.train.micro_batch or recipe.train.batch):
                source.load(*part)
    data, cached, listed = (size_of(folder) for folder in (path, root, root / "rows"))
    return DataReport(pairs, form, SIDE, data, cached, listed, watch.stages, found)


def size_of(folder: Path) -> float:
    """MB of all files."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e6


def _telling(say: Callable[[str], None]) -> Callable[[int, int], None]:
    """Progress in lines, one for each tenth."""
    last = [-1]

    def show(done: int, total: int) -> None:
        tenth = 10 * done // max(1, total)
        if tenth > last[0]:
            last[0] = tenth
            say(f"encoding: {done} of {total}")

    return show
