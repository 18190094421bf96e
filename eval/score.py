"""Score images: one decode for all scorers, fixed batches, every result kept, and a killed run goes on where it was."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import Interrupted, UserError
from .items import MANIFEST, Item, ItemSet, read_items
from .progress import progress_bar
from .prompts import prompts_sha256
from .ranks import Ranks, join_ranks
from .rows import (
    SUFFIXES,
    Key,
    Meta,
    Row,
    RowLog,
    key_of,
    read_meta,
    read_rows,
    read_score_file,
    write_meta,
    write_rows,
)
from .scorers import list_scorers, load_scorers, parse_scorers
from .scoring import hash_item, run_chunks

if TYPE_CHECKING:
    from rich.console import Console

    from .scorers import Scorer


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
    texts: dict[str, int] = field(default_factory=dict)  # prompts that each scorer encoded

    def render(self, console: Console) -> None:
        """A short table for a person."""
        from rich.table import Table

        table = Table("scorer", "mean", "what it is")
        for name, mean in self.means.items():
            table.add_row(name, f"{mean:.4f}", list_scorers()[name].about)
        console.print(table)
        rate = f", {self.scored / len(self.means) / self.seconds:.1f} images/s" if self.scored else ""
        console.print(f"{self.images} images: {self.scored} scores new, {self.reused} reused{rate}", highlight=False)
        if any(self.texts.values()):
            counts = ", ".join(f"{name} {count}" for name, count in self.texts.items() if count)
            console.print(f"prompts encoded, each once: {counts}", highlight=False)
        for note in self.notes:
            console.print(f"note: {note}", highlight=False)
        for image, reason in self.errors[:5]:
            console.print(f"skipped {image}: {reason}", highlight=False)
        if len(self.errors) > 5:
            console.print(f"... and {len(self.errors) - 5} more; their rows carry the error", highlight=False)
        console.print(f"scores: {self.out}", highlight=False)


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
    reuse: Sequence[str | Path] = (),
) -> ScoreResult:
    """Score every image with every scorer and write one row each. Under a launcher the processes share the batches and
    the first one merges; the result is the same for any number of them.

    Args:
        images: a folder with ``manifest.jsonl``, a table of images and prompts (.jsonl, .csv, .parquet, .tar shards,
            or a folder of shards), or a plain folder (then ``prompts`` is needed).
        prompts: a prompt file, set or text; with a manifest it selects prompts.
        scorers: names, ``"oracle,pickscore=FOLDER"``, or loaded scorers.
        out: ``.jsonl`` or ``.parquet``; ``<name>.meta.json`` beside it holds the fingerprints. Rows that are there
            already (same image bytes, prompt and scorer fingerprint) are not computed again.
        batch: images a forward. Batches are cut by the list of images, so a resumed run computes the very same ones.
        strict: unreadable images raise UserError after everything else was written.
        reuse: further score files or folders whose rows count as computed where they hold.

    Raises:
        UserError: bad input, an ``out`` that holds something else, or not one image that could be scored.
        Interrupted: by Ctrl-C; what was scored stays.
    """
    _check_settings(scorers, Path(out), batch)
    return score_items(
        read_items(images, prompts),
        Path(images),
        scorers,
        out,
        batch=batch,
        device=device,
        dtype=dtype,
        progress=progress,
        strict=strict,
        workers=workers,
        reuse=reuse,
    )


def _check_settings(scorers: str | Sequence[str] | Sequence[Scorer], target: Path, batch: int) -> None:
    """Raises UserError for what no image is needed to see."""
    if target.suffix not in SUFFIXES:
        raise UserError(f"scores go to a .jsonl or .parquet file, not '{target}'")
    if batch < 1:
        raise UserError(f"batch {batch} is not a number of images; give 1 or more")
    named = scorers if isinstance(scorers, str) else [s for s in scorers if isinstance(s, str)]
    if isinstance(named, str) or len(named) == len(scorers):
        parse_scorers(named)


def score_items(
    source: ItemSet,
    images: Path,
    scorers: str | Sequence[str] | Sequence[Scorer],
    out: str | Path,
    *,
    batch: int = 32,
    device: str = "auto",
    dtype: str = "auto",
    progress: bool = True,
    strict: bool = False,
    workers: int | None = None,
    reuse: Sequence[str | Path] = (),
) -> ScoreResult:
    """`score_images` of a list of items; ``images`` is the folder or file that they come from."""
    target = Path(out)
    _check_settings(scorers, target, batch)
    known = [s for s in scorers if not isinstance(s, str)]
    named = scorers if isinstance(scorers, str) else [s for s in scorers if isinstance(s, str)]
    ranks = join_ranks(device)
    logs = [log_path(target, 0), *sorted(target.parent.glob(f"{target.stem}.rank*.partial.jsonl"))]
    before = [row for path in dict.fromkeys((target, *logs)) if path.is_file() for row in read_rows(path)]
    _check_same_images(before, source, target)
    lent = [row for place in reuse for row in read_score_file(place).rows]
    loaded = known or load_scorers(named, device, dtype)
    began = time.monotonic()
    texts = [p.prompt for p in source.prompts]
    encoded = {s.name: s.texts_encoded for s in loaded}
    for scorer in loaded:
        scorer.check_prompts(texts)
        scorer.plan_texts(texts)
    meta = _meta(images, source, loaded, read_meta(target), target)
    log = _open_log(target, before, meta, ranks, logs)
    chunks = [source.items[start : start + batch] for start in range(0, len(source.items), batch)]
    mine = chunks[ranks.rank :: ranks.world]
    items = [item for chunk in mine for item in chunk]
    with ThreadPoolExecutor(workers or min(8, os.cpu_count() or 1)) as pool:
        hashes = list(pool.map(hash_item, items)) if before or lent else [None] * len(items)
        kept = _kept([*lent, *before], items, hashes, meta)
        done = {k: r for k, r in kept.items() if r.error is None}
        try:
            with progress_bar("scoring", len(items), enabled=progress and ranks.main) as advance:
                fresh = list(run_chunks(mine, loaded, done, pool, log, advance))
        except KeyboardInterrupt as error:
            pool.shutdown(cancel_futures=True)
            raise Interrupted(f"stopped; what was scored is in '{log.path}', the same command goes on") from error
    log.close()
    found = {**kept, **{key_of(r): r for r in fresh}}
    wanted = {s.name: s.fingerprint_id for s in loaded}
    names = [*wanted, *(n for n in meta.scorers if n not in wanted)]
    if not ranks.main:
        write_rows(log.path, _in_order(items, names, found))
    ranks.barrier()
    if ranks.main:
        for rank in range(1, ranks.world):
            found |= {key_of(row): row for row in read_rows(log_path(target, rank))}
        _finish(target, _in_order(source.items, names, found), meta)
        for path in logs + [log_path(target, rank) for rank in range(1, ranks.world)]:
            if path != target:
                path.unlink(missing_ok=True)
    ranks.barrier()
    counts = {s.name: s.texts_encoded - encoded[s.name] for s in loaded}
    final = read_rows(target)
    made = ranks.total(len(fresh))
    return _summary(final, made, wanted, source, target, time.monotonic() - began, strict, counts)


def log_path(target: Path, rank: int) -> Path:
    """Where a process writes rows as they come; rank 0 of a .jsonl writes the file itself."""
    if rank == 0:
        return target if target.suffix == ".jsonl" else target.with_suffix(".partial.jsonl")
    return target.with_name(f"{target.stem}.rank{rank}.partial.jsonl")


def _open_log(target: Path, before: Sequence[Row], meta: Meta, ranks: Ranks, logs: Sequence[Path]) -> RowLog:
    """The log of this process. Rank 0 takes over all that earlier runs left before the others begin."""
    ranks.barrier()  # everyone has read what is there
    try:
        if ranks.main:
            target.parent.mkdir(parents=True, exist_ok=True)
            write_meta(target, meta)
            log = RowLog(log_path(target, 0), before)
            for stale in logs[1:]:
                stale.unlink(missing_ok=True)
        ranks.barrier()
        return log if ranks.main else RowLog(log_path(target, ranks.rank), [])
    except OSError as error:
        raise UserError(f"cannot write '{target}' ({error.strerror}); choose another place for the scores") from error


def _finish(target: Path, rows: Sequence[Row], meta: Meta) -> None:
    write_rows(target, rows)
    scored = {row.scorer for row in rows}
    meta.scorers = {name: fingerprint for name, fingerprint in meta.scorers.items() if name in scored}
    meta.conventions = {name: text for name, text in meta.conventions.items() if name in scored}
    meta.complete, meta.rows = True, len(rows)
    write_meta(target, meta)


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


def _in_order(items: Sequence[Item], names: Sequence[str], rows: dict[Key, Row]) -> list[Row]:
    keys = ((item.id, item.k, name) for item in items for name in names)
    return [rows[key] for key in keys if key in rows]


def _meta(images: Path, source: ItemSet, scorers: Sequence[Scorer], old: Meta | None, out: Path) -> Meta:
    folder = images if images.is_dir() else images.parent
    sample = folder / "sample.json"
    sampling: dict[str, object] = {}
    if (folder / MANIFEST).is_file() and sample.is_file():
        sampling = json.loads(sample.read_text(encoding="utf-8"))
    about = sampling.get("prompts")
    notes = {s.name: "; ".join(filter(None, (s.note, s.weights_note))) for s in scorers}
    return Meta(
        prompts_sha256=prompts_sha256(source.prompts),
        prompts=len(source.prompts),
        images=len(source.items),
        scorers={**(old.scorers if old else {}), **{s.name: s.fingerprint for s in scorers}},
        sampling=sampling,
        notes=source.notes,
        folder=os.path.relpath(folder, out.parent),
        prompt_set=source.set_name or (about.get("set") if isinstance(about, dict) else None),
        conventions={**(old.conventions if old else {}), **notes},
    )


def _check_same_images(before: Sequence[Row], source: ItemSet, out: Path) -> None:
    """Scores of other images are not thrown away."""
    have = {(r.id, r.k, r.image) for r in before}
    if have and have.isdisjoint((i.id, i.k, i.image) for i in source.items):
        raise UserError(f"'{out}' holds the scores of other images; choose another file, or delete it")


def _summary(
    final: Sequence[Row],
    fresh: int,
    wanted: dict[str, str],
    source: ItemSet,
    out: Path,
    seconds: float,
    strict: bool,
    texts: dict[str, int],
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
    reused = max(0, sum(row.scorer in values for row in final) - fresh)
    return ScoreResult(out, len(source.items), means, fresh, reused, list(errors.items()), seconds, notes, texts)
