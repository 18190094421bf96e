"""Pictures and prompts through the model's encoders, with decoding ahead in threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby, islice
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from torch import Tensor

from ..errors import RunError, UserError
from ..recipe import DataRecipe
from .batch import Cond
from .buckets import Buckets
from .images import ImageError, Prepared, load_image, prepare
from .keyindex import key_array
from .rows import ImageRef, Row, digest_of
from .rowtable import Rows
from .scan import workers

if TYPE_CHECKING:
    from ..families import Model

Piece = tuple[list[str], dict[str, Tensor]]
PROMPT_BATCH = 64
WINDOW = 16  # batches among which pictures are sorted by their bucket
A = TypeVar("A")
B = TypeVar("B")


@dataclass(frozen=True)
class Job:
    """One picture to encode under ``key`` at ``size`` (height, width); ``crop_key`` is the sample's id where crops are
    random."""

    key: str
    ref: ImageRef
    size: tuple[int, int]
    crop_key: str = ""
    mirrored: bool = False


def _key(digest: str, size: tuple[int, int], sample: str, recipe: DataRecipe, mirrored: bool) -> str:
    """The picture's content, its bucket, the sample where the crop depends on it, and the orientation."""
    bucket = f".{size[0]}x{size[1]}" if recipe.buckets else ""
    crop = f".{digest_of(sample.encode())[:16]}" if recipe.crop == "random" else ""
    return f"{digest}{bucket}{crop}{'.m' if mirrored else ''}"


def picture_job(
    ref: ImageRef, sample: str, recipe: DataRecipe, size: tuple[int, int] = (0, 0), mirrored: bool = False
) -> Job:
    """What to do for one picture of a sample."""
    key = _key(ref.content_hash(), size, sample, recipe, mirrored)
    return Job(key, ref, size, sample if recipe.crop == "random" else "", mirrored)


def row_jobs(row: Row, recipe: DataRecipe, buckets: Buckets, mirrored: bool = False) -> dict[str, Job]:
    """The pictures of a row by name, all in the bucket of the first (a pair's winner)."""
    if not row.images:
        return {}
    size = next(iter(row.images.values())).size or (1, 1)
    target = buckets.of(size)
    return {name: picture_job(ref, row.id, recipe, target, mirrored) for name, ref in row.images.items()}


def orientations(recipe: DataRecipe) -> tuple[bool, ...]:
    """Whether mirrored: once, or both ways with ``data.flip``."""
    return (False, True) if recipe.flip else (False,)


def picture_keys(rows: Rows, recipe: DataRecipe, buckets: Buckets) -> np.ndarray:
    """(n, 2) uint64: the keys of every row's pictures, by row, side and orientation."""
    if not rows.sides:
        return np.zeros((0, 2), np.uint64)
    digests = np.stack([rows.digests(side) for side in rows.sides], 1)
    if not recipe.buckets and recipe.crop == "center" and not recipe.flip:
        return digests.reshape(-1, 2)
    places = buckets.assign(rows.sizes(rows.sides[0]))

    def keys() -> Iterator[str]:
        for n, sample in enumerate(rows.ids):
            size = buckets.sizes[places[n]]
            for digest in digests[n]:
                for mirrored in orientations(recipe):
                    yield _key(digest.tobytes().hex(), size, sample, recipe, mirrored)

    return key_array(keys())


def prompt_keys(rows: Rows) -> np.ndarray:
    """(n, 2) uint64: the keys of every row's prompts, by row; two a row where some row has a second one."""

    def keys() -> Iterator[str]:
        for batch in rows.batches():
            columns = [batch.column("prompt").to_pylist()]
            if rows.two_prompts:
                columns.append(batch.column("rejected_prompt").to_pylist())
            for first, *other in zip(*columns, strict=True):
                yield prompt_key(first)
                for text in other:
                    yield prompt_key(first if text is None else text)

    return key_array(keys())


def prompt_key(text: str) -> str:
    """Key of a prompt."""
    return digest_of(text.encode())


def ahead(work: Callable[[A], B], items: Iterable[A], pool: ThreadPoolExecutor, depth: int) -> Iterator[B]:
    """``map`` in threads, at most ``depth`` results ahead of the consumer."""
    source = iter(items)
    waiting: deque[Future[B]] = deque(pool.submit(work, item) for item in islice(source, depth))
    while waiting:
        result = waiting.popleft().result()
        for item in islice(source, 1):
            waiting.append(pool.submit(work, item))
        yield result


def ready(job: Job, recipe: DataRecipe) -> Prepared:
    """Decoded, cropped and, where asked for, mirrored pixels.

    Raises RunError when the picture is no longer what its key says."""
    try:
        data = job.ref.read()
        if digest_of(data) != job.key[:32]:
            raise ImageError("changed since it was looked at")
        found = prepare(load_image(data, recipe.alpha), job.size, recipe.crop, job.crop_key)
    except ImageError as error:
        raise RunError(
            f"picture '{job.ref.name}': {error}; what is encoded is kept, start the command again"
        ) from error
    return found.mirrored() if job.mirrored else found


def batches_of(jobs: Iterable[Job], count: int, buckets: bool) -> Iterator[list[Job]]:
    """Jobs in lists of at most ``count`` of one size, in order but for a window in which sizes are brought together.

    Without buckets there is one size, and no more is drawn ahead than a batch: a stream keeps only so much."""
    rest = iter(jobs)
    while window := list(islice(rest, (WINDOW if buckets else 1) * count)):
        window.sort(key=lambda job: job.size)
        for _, same in groupby(window, lambda job: job.size):
            while part := list(islice(same, count)):
                yield part


def encode_pictures(jobs: Iterable[Job], model: Model, recipe: DataRecipe) -> Iterator[Piece]:
    """Keys and entries, at most ``recipe.encode_batch`` at a time: ``mean`` (n, C, h, w) in ``data.latents``, ``std``
    fp16 when the posterior is sampled, ``size`` (n, 4) int32. On the CPU. Jobs are drawn as they are needed.

    Raises:
        UserError: the VAE gives numbers that are not finite.
    """
    planned: deque[list[Job]] = deque()

    def plan() -> Iterator[Job]:
        for part in batches_of(jobs, recipe.encode_batch, bool(recipe.buckets)):
            planned.append(part)
            yield from part

    with ThreadPoolExecutor(workers(), thread_name_prefix="decode") as pool:
        stream = ahead(lambda job: ready(job, recipe), plan(), pool, 3 * recipe.encode_batch)
        for first in stream:
            part = planned.popleft()
            pictures = [first, *islice(stream, len(part) - 1)]
            mean, std = model.encode_images(torch.stack([p.pixels for p in pictures]), batch=recipe.encode_batch)
            mean, std = mean.float().cpu(), std.cpu()
            kept = mean.half() if recipe.latents == "fp16" else mean
            finite = torch.isfinite(kept).flatten(1).all(1) & torch.isfinite(std).flatten(1).all(1)
            if not bool(finite.all()):
                worst = part[int(finite.int().argmin())].ref.name
                raise UserError(
                    f"the VAE gives latents that are not finite for '{worst}': its activations overflow or its weights "
                    "are damaged; keep the VAE in fp32 (model.dtype=fp32) or use a VAE that is fixed for fp16"
                )
            entry = {
                "mean": kept,
                "size": torch.tensor([(*p.original, *p.corner) for p in pictures], dtype=torch.int32),
            }
            if recipe.posterior == "sample":
                entry["std"] = std.half()
            yield [job.key for job in part], entry


def cond_entry(cond: Cond) -> dict[str, Tensor]:
    """Conditioning as the tensors of an entry."""
    return {"embeds": cond.embeds.cpu(), **{f"added.{k}": v.cpu() for k, v in cond.added.items()}}


def entry_cond(entry: dict[str, Tensor]) -> Cond:
    """An entry as conditioning of one sample."""
    added = {k[6:]: v[None] for k, v in entry.items() if k.startswith("added.")}
    return Cond(entry["embeds"][None], added)


def encode_prompts(prompts: Iterable[str], model: Model) -> Iterator[Piece]:
    """Keys and entries of prompts, a batch at a time, on the CPU."""
    rest = iter(prompts)
    while part := list(islice(rest, PROMPT_BATCH)):
        yield [prompt_key(text) for text in part], cond_entry(model.encode_prompts(part))
