"""Score images: one decode for all scorers, fixed batches, every result kept, and a killed run goes on where it was."""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError
from .items import MANIFEST, Item, ItemSet, read_items
from .progress import progress_bar
from .prompts import prompts_sha256
from .rows import SUFFIXES, Meta, Row, RowLog, read_meta, read_rows, write_meta, write_rows
from .scorers import list_scorers, load_scorers, parse_scorers

if TYPE_CHECKING:
    import numpy as np
    from rich.console import Console

    from .scorers import Scorer

AHEAD = 2  # chunks that are decoded while one is scored


@dataclass
class ScoreResult:
    """What `score_images` did. ``means`` over the images that got a score; ``errors`` as (image, reason)."""

    out: Path
    images: int
    means: dict[str, float]
    scored: int
    reused: int
    errors: list[tuple[str, str]]
    seconds: float
    notes: list[str] = field(default_factory=list)

    def render(self, console: Console) -> None:
        """A short table for a person."""
        from rich.table import Table

        table = Table("scorer", "mean", "what it is")
        for name, mean in self.means.items():
            table.add_row(name, f"{mean:.4f}", list_scorers()[name].about)
        console.print(table)
        rate = f", {self.scored / len(self.means) / self.seconds:.1f} images/s" if self.scored else ""
        console.print(f"{self.images} images: {self.scored} scores new, {self.reused} reused{rate}", highlight=False)
        for note in self.notes:
            console.print(f"note: {note}", highlight=False)
        for image, reason in self.errors[:5]:
            console.print(f"skipped {image}: {reason}", highlight=False)
        if len(self.errors) > 5:
            console.print(f"... and {len(self.errors) - 5} more; their rows carry the error", highlight=False)
        console.print(f"scores: {self.out}", highlight=False)


@dataclass(frozen=True)
class Loaded:
    """One image: its hash, and prepared pixels by preprocessing id, or the reason why there are none."""

    sha256: str | None
    prepared: dict[str, np.ndarray]
    flags: tuple[str, ...] = ()
    error: str | None = None


def score_images(
    images: str | Path,
    prompts: str | Path | None = None,
    scorers: str | Sequence[str] | Sequence[Scorer] = "clip_l14",
    out: str | Path = "scores.jsonl",
    *,
    batch: int = 32,
    device: str = "auto",
    dtype: str = "auto",
    progress: bool = True,
    strict: bool = False,
    workers: int | None = None,
) -> ScoreResult:
    """Score every image with every scorer and write one row each.

    Args:
        images: a folder with ``manifest.jsonl``, a manifest, or a plain folder (then ``prompts`` is needed).
        prompts: a prompt file, set or text; with a manifest it selects prompts.
        scorers: names, ``"oracle,pickscore=FOLDER"``, or loaded scorers.
        out: ``.jsonl`` or ``.parquet``; ``<name>.meta.json`` beside it holds the fingerprints. Rows that are there
            already (same image bytes, prompt and scorer fingerprint) are not computed again.
        batch: images a forward. Batches are cut by the manifest, so a resumed run computes the very same ones.
        strict: unreadable images raise UserError after everything else was written.

    Raises:
        UserError: bad input, an ``out`` that holds something else, or not one image that could be scored.
    """
    target = Path(out)
    if target.suffix not in SUFFIXES:
        raise UserError(f"scores go to a .jsonl or .parquet file, not '{out}'")
    if batch < 1:
        raise UserError(f"batch {batch} is not a number of images; give 1 or more")
    known = [s for s in scorers if not isinstance(s, str)]
    if not known:
        parse_scorers([s for s in scorers if isinstance(s, str)] if not isinstance(scorers, str) else scorers)
    source = read_items(images, prompts)
    log_path = target if target.suffix == ".jsonl" else target.with_suffix(".partial.jsonl")
    before = [row for path in dict.fromkeys((target, log_path)) if path.is_file() for row in read_rows(path)]
    _check_same_images(before, source, target)
    loaded = known or load_scorers(
        [s for s in scorers if isinstance(s, str)] if not isinstance(scorers, str) else scorers, device, dtype
    )
    began = time.monotonic()
    texts = [p.prompt for p in source.prompts]
    for scorer in loaded:
        scorer.check_prompts(texts)
        scorer.plan_texts(texts)
    meta = _meta(Path(images), source, loaded, read_meta(target), target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_meta(target, meta)
        log = RowLog(log_path, before)
    except OSError as error:
        raise UserError(f"cannot write '{target}' ({error.strerror}); choose another place for the scores") from error
    wanted = {s.name: s.fingerprint_id for s in loaded}
    with ThreadPoolExecutor(workers or min(8, os.cpu_count() or 1)) as pool:
        hashes = list(pool.map(_hash, source.items)) if before else [None] * len(source.items)
        kept = _kept(before, source.items, hashes, meta)
        done = {k: r for k, r in kept.items() if r.error is None}
        fresh = list(_run(source.items, loaded, done, pool, batch, log, progress))
    log.close()
    final = _final(
        source.items,
        list(wanted) + [n for n in meta.scorers if n not in wanted],
        {**kept, **{_key(r): r for r in fresh}},
    )
    write_rows(target, final)
    if log_path != target:
        log_path.unlink()
    scored = {row.scorer for row in final}
    meta.scorers = {name: fingerprint for name, fingerprint in meta.scorers.items() if name in scored}
    meta.complete = True
    write_meta(target, meta)
    return _summary(final, fresh, wanted, source, target, time.monotonic() - began, strict)


Key = tuple[str, int, str]  # id, k, scorer


def _key(row: Row) -> Key:
    return row.id, row.k, row.scorer


def _hash(item: Item) -> str | None:
    try:
        return hashlib.sha256(item.path.read_bytes()).hexdigest()
    except OSError:
        return None  # reported as this image's row when it is loaded


def _load(item: Item, scorers: Sequence[Scorer]) -> Loaded:
    """Read, hash, decode and prepare one image, once for all scorers that share a preprocessing."""
    from .preprocess import decode

    try:
        data = item.path.read_bytes()
    except OSError as error:
        return Loaded(None, {}, error=f"not readable: {error.strerror or error}")
    sha256 = hashlib.sha256(data).hexdigest()
    try:
        picture = decode(data)
    except (OSError, ValueError, SyntaxError) as error:  # PIL raises SyntaxError for some broken PNGs
        return Loaded(sha256, {}, error=f"not an image that can be decoded: {type(error).__name__}")
    prepared: dict[str, np.ndarray] = {}
    for scorer in scorers:
        if scorer.preprocess_id not in prepared:
            prepared[scorer.preprocess_id] = scorer.prepare(picture.image)
    return Loaded(sha256, prepared, picture.flags)


def _run(
    items: Sequence[Item],
    scorers: Sequence[Scorer],
    done: dict[Key, Row],
    pool: ThreadPoolExecutor,
    batch: int,
    log: RowLog,
    progress: bool,
) -> Iterator[Row]:
    """New rows, chunk by chunk. A chunk with anything missing is computed whole, so that values do not depend on
    where a run was cut; only the missing rows are kept."""
    chunks: list[tuple[Sequence[Item], list[Scorer]]] = []
    for start in range(0, len(items), batch):
        chunk = items[start : start + batch]
        need = [s for s in scorers if any((i.id, i.k, s.name) not in done for i in chunk)]
        if need:
            chunks.append((chunk, need))
    queue: deque[list[Future[Loaded]]] = deque()
    upcoming = iter(chunks)

    def submit() -> None:
        following = next(upcoming, None)
        if following is not None:
            queue.append([pool.submit(_load, item, following[1]) for item in following[0]])

    for _ in range(AHEAD):
        submit()
    with progress_bar("scoring", sum(len(c) for c, _ in chunks), enabled=progress) as advance:
        for chunk, need in chunks:
            pictures = [future.result() for future in queue.popleft()]
            submit()
            rows = [r for s in need for r in _score_chunk(chunk, pictures, s) if _key(r) not in done]
            log.append(rows)
            advance(len(chunk))
            yield from rows


def _score_chunk(chunk: Sequence[Item], pictures: Sequence[Loaded], scorer: Scorer) -> list[Row]:
    readable = [i for i, picture in enumerate(pictures) if picture.error is None]
    values: dict[int, float] = {}
    parts: dict[int, dict[str, float]] = {}
    if readable:
        prepared = [pictures[i].prepared[scorer.preprocess_id] for i in readable]
        result = scorer.score_prepared(prepared, [chunk[i].prompt for i in readable])
        columns = {name: part.tolist() for name, part in result.parts.items()}
        for place, (i, value) in enumerate(zip(readable, result.values.tolist(), strict=True)):
            values[i] = value
            parts[i] = {name: _short(column[place]) for name, column in columns.items()}
    cut = scorer.truncated([item.prompt for item in chunk])
    rows = []
    for i, (item, picture) in enumerate(zip(chunk, pictures, strict=True)):
        value, error = values.get(i), picture.error
        if value is not None and not math.isfinite(value):
            value, error = None, f"the score is {value}"
        rows.append(
            Row(
                id=item.id,
                prompt=item.prompt,
                k=item.k,
                seed=item.seed,
                category=item.category,
                image=item.image,
                image_sha256=picture.sha256,
                scorer=scorer.name,
                fingerprint=scorer.fingerprint_id,
                value=None if value is None else _short(value),
                parts=parts.get(i, {}),
                flags=[*picture.flags, *(["truncated"] if cut[i] else [])],
                error=error,
            )
        )
    return rows


def _short(value: float) -> float:
    """Nine digits: all that an fp32 number holds."""
    return float(f"{value:.9g}")


def _kept(before: Iterable[Row], items: Sequence[Item], hashes: Sequence[str | None], meta: Meta) -> dict[Key, Row]:
    """Earlier rows that still hold: same image bytes, prompt and scorer fingerprint. Names and seeds are taken anew."""
    from .scorers._base import fingerprint_id

    ids = {name: fingerprint_id(fingerprint) for name, fingerprint in meta.scorers.items()}
    table = {
        (r.image_sha256, r.prompt, r.scorer): r for r in before if r.image_sha256 and r.fingerprint == ids.get(r.scorer)
    }
    kept: dict[Key, Row] = {}
    for item, sha256 in zip(items, hashes, strict=True):
        for name in ids:
            row = table.get((sha256, item.prompt, name)) if sha256 else None
            if row is not None:
                kept[item.id, item.k, name] = replace(
                    row, id=item.id, k=item.k, seed=item.seed, category=item.category, image=item.image
                )
    return kept


def _final(items: Sequence[Item], names: Sequence[str], rows: dict[Key, Row]) -> list[Row]:
    keys = ((item.id, item.k, name) for item in items for name in names)
    return [rows[key] for key in keys if key in rows]


def _meta(images: Path, source: ItemSet, scorers: Sequence[Scorer], old: Meta | None, out: Path) -> Meta:
    folder = images if images.is_dir() else images.parent
    sample = folder / "sample.json"
    sampling = (
        json.loads(sample.read_text(encoding="utf-8")) if (folder / MANIFEST).is_file() and sample.is_file() else {}
    )
    return Meta(
        prompts_sha256=prompts_sha256(source.prompts),
        prompts=len(source.prompts),
        images=len(source.items),
        scorers={**(old.scorers if old else {}), **{s.name: s.fingerprint for s in scorers}},
        sampling=sampling,
        notes=source.notes,
        folder=os.path.relpath(folder, out.parent),
    )


def _check_same_images(before: Sequence[Row], source: ItemSet, out: Path) -> None:
    """Scores of other images are not thrown away."""
    have = {(r.id, r.k, r.image) for r in before}
    if have and have.isdisjoint((i.id, i.k, i.image) for i in source.items):
        raise UserError(f"'{out}' holds the scores of other images; choose another file, or delete it")


def _summary(
    final: Sequence[Row],
    fresh: Sequence[Row],
    wanted: dict[str, str],
    source: ItemSet,
    out: Path,
    seconds: float,
    strict: bool,
) -> ScoreResult:
    values: dict[str, list[float]] = {name: [] for name in wanted}
    errors: dict[str, str] = {}
    for row in final:
        if row.scorer in values and row.value is not None:
            values[row.scorer].append(row.value)
        elif row.scorer in values:
            errors.setdefault(row.image, row.error or "no score")
    empty = [name for name, found in values.items() if not found]
    if empty:
        image, reason = next(iter(errors.items()))
        raise UserError(
            f"none of the {len(source.items)} images got a score from '{empty[0]}' (first: {image}: {reason})"
        )
    means = {name: math.fsum(found) / len(found) for name, found in values.items()}
    notes = list(source.notes)
    for name, mean in means.items():
        band = list_scorers()[name].band
        if band and not band[0] <= mean <= band[1]:
            notes.append(
                f"mean of {name} is {mean:.2f}, outside {band[0]:g} to {band[1]:g}: check that prompts and images match"
            )
    cut = len({row.id for row in final if row.scorer in values and "truncated" in row.flags})
    if cut:
        notes.append(f"{cut} prompts are longer than a scorer reads and were cut (flag 'truncated')")
    if strict and errors:
        image, reason = next(iter(errors.items()))
        raise UserError(f"{len(errors)} images could not be scored (first: {image}: {reason}); the rest is in '{out}'")
    reused = sum(map(len, values.values())) - sum(r.value is not None for r in fresh)
    return ScoreResult(out, len(source.items), means, len(fresh), reused, list(errors.items()), seconds, notes)
