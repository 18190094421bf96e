"""One pass over pictures: decoded ahead in threads, prepared once for each preprocessing, scored in fixed batches."""

from __future__ import annotations

import hashlib
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .items import Item
from .rows import Key, Row, RowLog, key_of

if TYPE_CHECKING:
    import numpy as np

    from .scorers import Scorer

AHEAD = 2  # chunks that are decoded while one is scored


@dataclass(frozen=True)
class Loaded:
    """One image: its hash, and prepared pixels by preprocessing id, or the reason why there are none.

    ``flags``: what was done to every picture; ``scorer_flags``: what a scorer's pixels do to this one."""

    sha256: str | None
    prepared: dict[str, np.ndarray]
    flags: tuple[str, ...] = ()
    scorer_flags: Mapping[str, tuple[str, ...]] | None = None
    error: str | None = None


def load(item: Item, scorers: Sequence[Scorer]) -> Loaded:
    """Read, hash, decode and prepare one image, once for all scorers that share a preprocessing."""
    from .preprocess import decode

    try:
        data = item.read()
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
    own = {s.name: s.picture_flags(*picture.image.size) for s in scorers}
    return Loaded(sha256, prepared, picture.flags, own)


def hash_item(item: Item) -> str | None:
    """sha256 of an image's bytes; None when it cannot be read (its row says why when it is loaded)."""
    try:
        return hashlib.sha256(item.read()).hexdigest()
    except OSError:
        return None


def run_chunks(
    chunks: Sequence[Sequence[Item]],
    scorers: Sequence[Scorer],
    done: Mapping[Key, Row],
    pool: ThreadPoolExecutor,
    log: RowLog,
    progress: Callable[[int], None],
) -> Iterator[Row]:
    """New rows, chunk by chunk. A chunk with anything missing is computed whole, so that values do not depend on
    where a run was cut; only the missing rows are kept."""
    work: list[tuple[Sequence[Item], list[Scorer]]] = []
    for chunk in chunks:
        need = [s for s in scorers if any((i.id, i.k, s.name) not in done for i in chunk)]
        if need:
            work.append((chunk, need))
        else:
            progress(len(chunk))
    queue: deque[list[Future[Loaded]]] = deque()
    upcoming = iter(work)

    def submit() -> None:
        following = next(upcoming, None)
        if following is not None:
            queue.append([pool.submit(load, item, following[1]) for item in following[0]])

    for _ in range(AHEAD):
        submit()
    for chunk, need in work:
        pictures = [future.result() for future in queue.popleft()]
        submit()
        rows = [r for s in need for r in score_chunk(chunk, pictures, s) if key_of(r) not in done]
        log.append(rows)
        progress(len(chunk))
        yield from rows


def score_chunk(chunk: Sequence[Item], pictures: Sequence[Loaded], scorer: Scorer) -> list[Row]:
    """A row for each image of a chunk; those that could not be read carry the reason."""
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
        own = (picture.scorer_flags or {}).get(scorer.name, ())
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
                flags=[*picture.flags, *own, *(["truncated"] if cut[i] else [])],
                error=error,
            )
        )
    return rows


def _short(value: float) -> float:
    """Nine digits: all that an fp32 number holds."""
    return float(f"{value:.9g}")
