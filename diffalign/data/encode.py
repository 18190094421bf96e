"""Pictures and prompts through the model's encoders, with decoding ahead in threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from ..errors import RunError, UserError
from ..recipe import DataRecipe
from .batch import Cond
from .images import ImageError, Prepared, load_image, prepare
from .rows import ImageRef, digest_of
from .scan import workers

if TYPE_CHECKING:
    from ..families import Model

Piece = tuple[list[str], dict[str, Tensor]]
PROMPT_BATCH = 64
A = TypeVar("A")
B = TypeVar("B")


@dataclass(frozen=True)
class Job:
    """One picture to encode under ``key``; ``crop_key`` is the sample's id where crops are random."""

    key: str
    ref: ImageRef
    crop_key: str
    mirrored: bool = False


def picture_job(ref: ImageRef, sample: str, recipe: DataRecipe, mirrored: bool = False) -> Job:
    """The key holds the picture's content, the sample where the crop depends on it, and the orientation."""
    crop_key = sample if recipe.crop == "random" else ""
    crop = f".{digest_of(crop_key.encode())[:16]}" if crop_key else ""
    return Job(f"{ref.content_hash()}{crop}{'.m' if mirrored else ''}", ref, crop_key, mirrored)


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


def ready(job: Job, recipe: DataRecipe, resolution: int) -> Prepared:
    """Decoded, cropped and, where asked for, mirrored pixels.

    Raises RunError when the picture is no longer what its key says."""
    try:
        data = job.ref.read()
        if digest_of(data) != job.key[:32]:
            raise ImageError("changed since it was looked at")
        found = prepare(load_image(data, recipe.alpha), resolution, recipe.crop, job.crop_key)
    except ImageError as error:
        raise RunError(
            f"picture '{job.ref.name}': {error}; what is encoded is kept, start the command again"
        ) from error
    return Prepared(found.pixels.flip(-1), found.original, found.corner) if job.mirrored else found


def encode_pictures(jobs: Sequence[Job], model: Model, recipe: DataRecipe, resolution: int) -> Iterator[Piece]:
    """Keys and entries, ``recipe.encode_batch`` at a time: ``mean`` (n, C, h, w) fp32, ``std`` fp16 when the posterior
    is sampled, ``size`` (n, 4) int32. On the CPU.

    Raises:
        UserError: the VAE gives numbers that are not finite.
    """
    if not jobs:
        return
    with ThreadPoolExecutor(workers(), thread_name_prefix="decode") as pool:
        depth = 3 * recipe.encode_batch
        stream = ahead(lambda job: ready(job, recipe, resolution), jobs, pool, depth)
        for start in range(0, len(jobs), recipe.encode_batch):
            part = jobs[start : start + recipe.encode_batch]
            pictures = list(islice(stream, len(part)))
            mean, std = model.encode_images(torch.stack([p.pixels for p in pictures]), batch=recipe.encode_batch)
            mean, std = mean.float().cpu(), std.cpu()
            finite = torch.isfinite(mean).flatten(1).all(1) & torch.isfinite(std).flatten(1).all(1)
            if not bool(finite.all()):
                worst = part[int(finite.int().argmin())].ref.name
                raise UserError(
                    f"the VAE gives latents that are not finite for '{worst}': its activations overflow or its weights "
                    "are damaged; keep the VAE in fp32 (model.dtype=fp32) or use a VAE that is fixed for fp16"
                )
            entry = {
                "mean": mean,
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


def encode_prompts(prompts: Sequence[str], model: Model) -> Iterator[Piece]:
    """Keys and entries of prompts, a batch at a time, on the CPU."""
    for start in range(0, len(prompts), PROMPT_BATCH):
        part = list(prompts[start : start + PROMPT_BATCH])
        yield [prompt_key(text) for text in part], cond_entry(model.encode_prompts(part))
