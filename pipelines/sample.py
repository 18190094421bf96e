"""Images for a list of prompts: the same noise for every model, batched, resumable image by image."""

from __future__ import annotations

import errno
import inspect
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo
from torch import Tensor, nn

from ..data.batch import Cond
from ..denoiser import Predict
from ..errors import Interrupted, RunError, UserError
from ..eval.progress import progress_bar
from ..eval.prompts import Prompt, prompts_sha256
from ..eval.ranks import join_ranks
from ..facts import SamplingRecord, find_facts, recorded
from ..families.base import Model
from ..families.device import pick_device, pick_dtype
from ..families.schedulers import recorded_scheduler
from ..keyed import generator, normal
from ..recipe import ModelRecipe
from .extras import told_guidance
from .grid import grid
from .loading import Opened, long_prompts_of, open_pipeline
from .long_prompts import segment_embeds
from .spec import RECORDED, SampleSpec

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

__all__ = ["SampleSpec", "grid", "sample", "sample_model", "to_images"]

T = TypeVar("T")

MANIFEST, SETTINGS, IMAGES = "manifest.jsonl", "sample.json", "images"
SEARCHED, FOUND = "search.jsonl", "diffalign-search"  # what searches took: in a file, and in each picture
ENCODED_TOGETHER = 32  # prompts through the text encoder at once
EMBEDS = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")


@dataclass(frozen=True)
class Job:
    """One image: prompt ``index`` of the list, its ``k``-th image, which is the ``draw``-th of its seed."""

    index: int
    prompt: Prompt
    k: int
    seed: int
    draw: int

    @property
    def file(self) -> str:
        """Path of the image relative to the output folder."""
        return f"{IMAGES}/{self.index:06d}-{self.k}.png"

    @property
    def key(self) -> str:
        """What the PNG says it shows; tells a finished image from one of another prompt list."""
        further = {} if self.draw == self.k else {"draw": self.draw}
        known = {"id": self.prompt.id, "prompt": self.prompt.prompt, "k": self.k, "seed": self.seed}
        return json.dumps(known | further)

    def row(self) -> dict[str, str | int | None]:
        """Its line in the manifest."""
        prompt = self.prompt
        return {
            "id": prompt.id,
            "prompt": prompt.prompt,
            "category": prompt.category,
            "k": self.k,
            "seed": self.seed,
            "image": self.file,
        }


def sample(
    spec: SampleSpec, prompts: Sequence[Prompt], out: Path, progress: bool = True, set_name: str | None = None
) -> Path:
    """Samples ``spec.per_prompt`` images a prompt and seed into ``out``; returns the path of ``out/manifest.jsonl``.

    The noise of an image depends on (seed, prompt id, draw) alone: it is the same for every model, batch size and list
    of prompts. With a search it is the best picture that was found, and ``search.jsonl`` says what that took. Settings
    that are None are taken from the model's record. A run that was stopped goes on from the images
    that are there, and ends with the same bytes; so does one whose batches several processes share under a launcher.
    ``set_name``: what the list of prompts is called.

    Raises:
        UserError: a setting out of range, no prompts, an unusable model or LoRA, images of other settings in ``out``.
        Interrupted: by Ctrl-C, after the finished images were listed.
        RunError: the disk is full, or the device's memory.
    """
    spec.check()
    prompts = list(prompts)
    if not prompts:
        raise UserError("there are no prompts to sample; give a text, a file or a built-in set with --prompts")
    if len({p.id for p in prompts}) < len(prompts):
        raise UserError("two prompts share one id; ids name the images, make them differ")
    device = pick_device(spec.device)
    dtype = pick_dtype(spec.dtype, device)
    record = recorded(spec.model, spec.lora, spec.revision)
    spec = replace(spec.filled(record), long_prompts=spec.long_prompts or long_prompts_of(spec.model, spec.lora))
    spec.check()
    if record is not None and record.told and spec.negative_prompt:
        raise UserError("a student that is told its guidance has no branch for a negative prompt; leave it out")
    if spec.scheduler != RECORDED:
        record = None
    ranks = join_ranks(spec.device)
    opened = open_pipeline(
        spec.model, spec.lora, spec.lora_scale, str(spec.scheduler), device, dtype, spec.revision, spec.variant, record
    )
    size = _size(spec, opened.pipeline)
    assert spec.guidance is not None
    asked = replace(spec, guidance=told_guidance(opened.extra, spec.guidance, spec.negative_prompt))
    about = {"set": set_name, "count": len(prompts), "sha256": prompts_sha256(prompts)}
    if ranks.main:
        _claim(out, {**_settings(spec, opened, size, dtype, record), "prompts": about})
    ranks.barrier()
    draws = [(seed, draw) for seed in spec.seeds for draw in range(spec.per_prompt)]
    jobs = [Job(i, p, k, seed, draw) for i, p in enumerate(prompts) for k, (seed, draw) in enumerate(draws)]
    batches = list(_chunks(jobs, spec.batch))[ranks.rank :: ranks.world]
    missing = {job.file for batch in batches for job in batch if not _finished(out, job)}
    try:
        total, label, unit = len(missing), "sampling", "images"
        if spec.budget is not None:
            total = spec.budget * sum(len(batch) for batch in batches if any(job.file in missing for job in batch))
            label, unit = "searching", "calls"
        with progress_bar(label, total, unit, enabled=progress and ranks.main) as advance:
            _run(asked, opened.pipeline, prompts, batches, missing, size, out, advance, record)
    except KeyboardInterrupt as error:
        done = _list(out, jobs) if ranks.main else 0
        raise Interrupted(
            f"stopped after {done} of {len(jobs)} images in '{out}'; the same command goes on from there"
        ) from error
    except torch.OutOfMemoryError as error:
        raise RunError(
            f"out of memory with --batch {spec.batch} at {size[0]}x{size[1]} px; lower --batch (finished images stay)"
        ) from error
    except OSError as error:
        raise RunError(f"images cannot be written to '{out}': {error}; the same command goes on from there") from error
    ranks.barrier()
    if ranks.main:
        _list(out, jobs)
    ranks.barrier()
    return out / MANIFEST


def _run(
    spec: SampleSpec,
    pipeline: DiffusionPipeline,
    prompts: Sequence[Prompt],
    batches: Sequence[Sequence[Job]],
    missing: set[str],
    size: tuple[int, int],
    out: Path,
    advance: Callable[[int], None],
    record: SamplingRecord | None,
) -> None:
    """Batches and text groups are cut from the whole list, so that a resumed run computes what the first would have."""
    from .searches.diffusion import reward_of

    assert spec.guidance is not None
    texts = [p.prompt for p in prompts]
    reward = reward_of(spec.reward, str(pipeline.device)) if spec.reward else None
    guided = max(spec.guidance, spec.base_guidance or 0) > 1
    text = TextCache(pipeline, texts, spec.negative_prompt, guided, spec.long_prompts)
    height, width = size
    factor = pipeline.vae_scale_factor
    plain = {"num_inference_steps": spec.steps, "guidance_scale": spec.guidance}
    options = record.call(spec.steps, spec.guidance) if record else plain
    shape = (pipeline.unet.config.in_channels, height // factor, width // factor)
    if record and spec.base_first:
        pipeline = begun_by_base(pipeline, record, spec)
        plain |= {name: getattr(spec, name) for name in ("base_first", "base_steps", "base_guidance")}
        options = plain
    for batch in batches:
        wanted = [job for job in batch if job.file in missing]
        if not wanted:
            continue
        if reward is not None:
            searched(spec, pipeline, batch, missing, text, reward, size, out, advance, record)
            continue
        noise = torch.stack([normal(shape, job.seed, "sample", job.prompt.id, job.draw) for job in batch])
        images = pipeline(
            **text.rows([job.index for job in batch]),
            latents=noise.to(pipeline.device, pipeline.unet.dtype),
            generator=[step_noise(job.seed, job.prompt.id, job.draw) for job in batch],
            height=height,
            width=width,
            **options,
        ).images
        for job, image in zip(batch, images, strict=True):
            if job.file in missing:
                _save(image, out / job.file, job.key)
        advance(len(wanted))


def searched(
    spec: SampleSpec,
    pipeline: DiffusionPipeline,
    jobs: Sequence[Job],
    missing: set[str],
    text: TextCache,
    reward: Any,
    size: tuple[int, int],
    out: Path,
    advance: Callable[[int], None],
    record: SamplingRecord | None,
) -> None:
    """The best picture of each job by the reward, saved where it is missing. By Ctrl-C the best so far are saved, but
    not as finished ones."""
    from .searches.diffusion import DiffusionWorld
    from .searches.options import parse_search
    from .searches.run import search

    assert spec.steps is not None and spec.guidance is not None and spec.budget is not None
    how = parse_search(str(spec.search))
    world = DiffusionWorld(
        pipeline,
        [job.prompt.prompt for job in jobs],
        [(job.seed, job.prompt.id) for job in jobs],
        text.rows([job.index for job in jobs]),
        reward,
        size=size,
        steps=spec.steps,
        guidance=spec.guidance,
        eta=how.eta,
        record=record,
    )
    found = search(world, how, spec.budget, spec.batch, advance)
    advance(spec.budget * len(jobs) - sum(one.calls for one in found))
    for job, one in zip(jobs, found, strict=True):
        if one.picture is not None and job.file in missing:
            _save(one.picture, out / job.file, "" if one.interrupted else job.key, one.json())
    if any(one.interrupted for one in found):
        raise KeyboardInterrupt


def begun_by_base(pipeline: DiffusionPipeline, record: SamplingRecord, spec: SampleSpec) -> DiffusionPipeline:
    """The few-step pipeline over these networks; of a whole student with the U-Net that it was trained from."""
    from .few_step import FewStepPipeline

    base = None if spec.lora or getattr(pipeline.unet, "peft_config", None) else base_unet(spec, pipeline)
    made = FewStepPipeline.of(pipeline, record, base)
    made.set_progress_bar_config(disable=True)
    return made


def base_unet(spec: SampleSpec, pipeline: DiffusionPipeline) -> nn.Module:
    """The U-Net that a whole student was trained from, as its record names it. Raises UserError where it does not."""
    from ..families import load_model

    facts = find_facts(spec.model, spec.revision)
    if facts is None or not facts.recipe.get("model"):
        raise UserError(f"'{spec.model}' does not say which base it was trained from; leave base_first out")
    recipe = ModelRecipe.model_validate(facts.recipe["model"]).model_copy(update={"quantize": "none"})
    return load_model(recipe, pipeline.unet.device, pipeline.unet.dtype).unet


class TextCache:
    """Each prompt is encoded once, in fixed groups; two groups are kept, as the jobs go through the list in order."""

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        texts: Sequence[str],
        negative: str | None,
        guided: bool,
        long_prompts: int | None = None,
    ) -> None:
        self.pipeline, self.texts, self.long_prompts = pipeline, texts, long_prompts
        self.groups: dict[int, dict[str, Tensor]] = {}
        # The pipeline's own guided call decides what the unconditional branch is (SDXL zeroes an empty prompt).
        both = self._encode([""], negative or None, True) if guided else {}
        self.negative = {name: tensor for name, tensor in both.items() if name.startswith("negative")}

    def rows(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """Conditioning of prompts by position, as keyword arguments of the pipeline."""
        picked = [self._row(index) for index in indices]
        rows = {name: torch.stack([row[name] for row in picked]) for name in picked[0]}
        for name, tensor in self.negative.items():
            rows[name] = tensor.expand(len(indices), *tensor.shape[1:])
        return rows

    def _row(self, index: int) -> dict[str, Tensor]:
        group = index // ENCODED_TOGETHER
        if group not in self.groups:
            self.groups.pop(group - 2, None)
            start = group * ENCODED_TOGETHER
            self.groups[group] = self._encode(self.texts[start : start + ENCODED_TOGETHER], None, False)
        return {name: tensor[index % ENCODED_TOGETHER] for name, tensor in self.groups[group].items()}

    @torch.no_grad()
    def _encode(self, texts: Sequence[str], negative: str | None, guided: bool) -> dict[str, Tensor]:
        if self.long_prompts:
            return segment_embeds(self.pipeline, texts, negative, self.long_prompts, guided)
        encoded = self.pipeline.encode_prompt(
            prompt=list(texts),
            device=self.pipeline.device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=guided,
            negative_prompt=None if negative is None else [negative] * len(texts),
        )
        return {name: tensor for name, tensor in zip(EMBEDS, encoded, strict=False) if tensor is not None}


def sample_model(
    model: Model,
    call: Callable[[Tensor, Tensor, Cond], Tensor],
    cond: Cond,
    ids: Sequence[str],
    *,
    size: tuple[int, int] | None = None,
    steps: int = 20,
    seed: int = 0,
    batch: int = 8,
    record: SamplingRecord | None = None,
) -> list[Image.Image]:
    """One image a row of ``cond``, for grids while training: by DDIM (eta 0) on the model's own schedule, or as a
    few-step student's ``record`` says.

    Args:
        call: (x (B,C,h,w) fp32, t (B,) int64, cond of B rows) -> the network's own prediction, guided if so wished.
        cond: B rows; ``ids`` (B) key the noise, as in `sample`.
        size: (height, width) in pixels, default the model's own.
    """
    height, width = size or (model.default_resolution, model.default_resolution)
    h, w = model.latent_size(height, width)
    shape = (model.unet.config.in_channels, h, w)
    denoiser = model.denoiser()
    config = model.scheduler_config
    times = denoiser.timesteps(steps, config.get("timestep_spacing", "leading"), config.get("steps_offset", 0))
    images: list[Image.Image] = []
    with torch.no_grad():
        for rows in _chunks(range(len(ids)), batch):
            part = model.sized(cond.take(list(rows)), height, width).to(model.device)
            noise = torch.stack([normal(shape, seed, "sample", ids[row], 0) for row in rows]).to(model.device)
            if record is None:
                latents = denoiser.sample(partial(_called, call, part), noise, times)
            else:
                latents = _recorded(record, partial(_called, call, part), noise, [(seed, ids[row], 0) for row in rows])
            images += to_images(model.decode(latents, batch=min(2, batch)))
    return images


def _recorded(record: SamplingRecord, predict: Predict, noise: Tensor, keys: Sequence[tuple[int, str, int]]) -> Tensor:
    """Latents by diffusers' own scheduler of the record, each with the step noise that `sample` gives it."""
    scheduler = recorded_scheduler(record)
    call = record.call()
    scheduler.set_timesteps(
        **({"timesteps": call["timesteps"]} if "timesteps" in call else {"num_inference_steps": record.steps})
    )
    known = inspect.signature(scheduler.step).parameters
    options = {"generator": [step_noise(*key) for key in keys], "eta": record.eta}
    options = {name: value for name, value in options.items() if name in known}
    x = noise * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        output = predict(scheduler.scale_model_input(x, t), t.to(x.device).expand(len(x)))
        x = scheduler.step(output, t, x, **options).prev_sample
    return x


def _called(call: Callable[[Tensor, Tensor, Cond], Tensor], cond: Cond, x: Tensor, t: Tensor) -> Tensor:
    return call(x, t, cond)


def to_images(pixels: Tensor) -> list[Image.Image]:
    """Pixels (B, 3, H, W) in [-1, 1] as RGB images; rounded as diffusers rounds, non-finite values black."""
    scaled = (pixels.float() / 2 + 0.5).clamp(0, 1).nan_to_num(0).mul(255).round().to(torch.uint8)
    return [Image.fromarray(array) for array in scaled.permute(0, 2, 3, 1).cpu().numpy()]


def _chunks(items: Iterable[T], size: int) -> Iterator[list[T]]:
    iterator = iter(items)
    while part := list(islice(iterator, size)):
        yield part


def step_noise(seed: int, name: str, draw: int) -> torch.Generator:
    """For schedulers that add noise at each step; on the CPU, so that every device draws the same."""
    key = generator(seed, "sample-steps", name, draw).integers(2**31)
    return torch.Generator("cpu").manual_seed(int(key))


def _size(spec: SampleSpec, pipeline: DiffusionPipeline) -> tuple[int, int]:
    factor = math.lcm(int(pipeline.vae_scale_factor), 8)
    own = pipeline.unet.config.sample_size * pipeline.vae_scale_factor
    size = (spec.height or own, spec.width or own)
    for name, side in zip(("height", "width"), size, strict=True):
        if side % factor:
            raise UserError(f"{name} {side} is not a multiple of {factor}, which this model's VAE needs")
    return size


def _settings(
    spec: SampleSpec, opened: Opened, size: tuple[int, int], dtype: torch.dtype, record: SamplingRecord | None
) -> dict[str, object]:
    """What decides the pixels: two folders with equal ``settings`` hold equal images under equal names."""
    optional = {"base_first", "base_steps", "base_guidance", "search", "reward", "budget"}
    settings = {name: value for name, value in asdict(spec).items() if value is not None or name not in optional}
    for name in ("batch", "device", "per_prompt", "model", "lora", "revision", "variant"):
        del settings[name]
    if opened.lora is None:
        settings["lora_scale"] = None
    settings.update(height=size[0], width=size[1], dtype=str(dtype).removeprefix("torch."))
    settings["hashes"] = opened.hashes
    if record is not None:
        settings["recorded"] = record.model_dump(mode="json")
    return {
        "model": opened.source,
        "lora": opened.lora,
        "family": opened.family,
        "settings": settings,
        "batch": spec.batch,
        "per_prompt": spec.per_prompt,
        "device": str(opened.pipeline.device),
    }


def _claim(out: Path, settings: dict[str, object]) -> None:
    """Makes the folder and writes sample.json; UserError when it holds images of other settings."""
    file = out / SETTINGS
    try:
        (out / IMAGES).mkdir(parents=True, exist_ok=True)
        if not os.access(out / IMAGES, os.W_OK):
            raise PermissionError(errno.EACCES, "not writable")
    except OSError as error:
        raise UserError(f"folder '{out}' cannot be used ({error.strerror}); choose another --out") from error
    if file.is_file():
        try:
            before = json.loads(file.read_text(encoding="utf-8"))["settings"]
            now = json.loads(json.dumps(settings["settings"]))
            odd = sorted(name for name in now.keys() | before.keys() if now.get(name) != before.get(name))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise UserError(f"'{file}' is not readable ({error}); remove the folder or choose another --out") from error
        if odd:
            what = "the model or LoRA" if odd[0] == "hashes" else f"{odd[0]} {before.get(odd[0])}"
            raise UserError(f"'{out}' holds images of other settings ({what}); remove it or choose another --out")
    _write(file, json.dumps(settings, indent=2) + "\n")


def _finished(out: Path, job: Job) -> bool:
    try:
        with Image.open(out / job.file) as image:
            return image.info.get("diffalign") == job.key
    except (OSError, UnidentifiedImageError):
        return False


def _save(image: Image.Image, file: Path, key: str, search: dict[str, Any] | None = None) -> None:
    info = PngInfo()
    info.add_text("diffalign", key)
    if search is not None:
        info.add_text(FOUND, json.dumps(search))
    partial = file.with_suffix(".partial")
    image.save(partial, "PNG", pnginfo=info)
    os.replace(partial, file)


def _list(out: Path, jobs: Sequence[Job]) -> int:
    """Writes the manifest of the finished images, and what their searches took; returns their number."""
    done = [job for job in jobs if _finished(out, job)]
    _write(out / MANIFEST, "".join(json.dumps(job.row(), ensure_ascii=False) + "\n" for job in done))
    took = []
    for job in done:
        with Image.open(out / job.file) as image:
            if FOUND in image.info:
                took.append({"id": job.prompt.id, "seed": job.seed, "image": job.file, **json.loads(image.info[FOUND])})
    if took:
        _write(out / SEARCHED, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in took))
    return len(done)


def _write(file: Path, text: str) -> None:
    partial = file.with_suffix(".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, file)
