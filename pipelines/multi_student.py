"""Multi-student distillation (MSD, arXiv 2410.23274) as a diffusers pipeline for SD1.x, SD2.x and SDXL: students that
each stand for a part of the prompts, as adapters on one base, and a partition that says which one a prompt is for.

Also usable as ``custom_pipeline``:

    pipe = DiffusionPipeline.from_pretrained("stable-diffusion-v1-5/stable-diffusion-v1-5", trust_remote_code=True,
                                             custom_pipeline="diffalign/pipelines/multi_student.py")
    pipe.load_students("parts")           # partition.json, and a student's run in a folder of each part's name
    found = pipe(["a red cat", "a blue dog"])
    found.images, found.parts

`diffalign pairs split` writes the partition and the prompts that each student is trained on. Every student is drawn as
it records. Students that are no adapters would be so many networks: give those to pipelines of their own.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.utils import BaseOutput

from diffalign.errors import UserError
from diffalign.facts import SamplingRecord, recorded
from diffalign.families.lora import find_lora, load_lora
from diffalign.families.schedulers import recorded_scheduler
from diffalign.partition import Partition, read_partition, text_features
from diffalign.pipelines import stock
from diffalign.pipelines.spec import allowed_guidance


@dataclass
class MultiStudentOutput(BaseOutput):
    """What a call gives.

    Args:
        images: as the family's own pipeline returns them, in the order of the prompts.
        parts: the part of each prompt.
    """

    images: Any
    parts: list[str]


class MultiStudentPipeline(stock.StockPipeline):
    """Draws each prompt by the student of its part; see the module's text."""

    partition: Partition | None = None

    def load_students(self, path: str | Path, weight: float = 1.0) -> MultiStudentPipeline:
        """The partition of a file or folder and the LoRA of each part (`partition.Partition.student`).

        Raises UserError when one of them is missing, is no LoRA that fits this base, or records no sampler."""
        partition, folder = read_partition(path)
        records: dict[str, SamplingRecord] = {}
        files: dict[str, Path] = {}
        for name in partition.names:  # all are looked at before one is loaded
            place = partition.student(name, folder)
            record = recorded(place)
            if record is None:
                raise UserError(f"part '{name}': '{place}' records no few-step sampler; is a student there?")
            record.check_base(self.scheduler.config, place)
            records[name], files[name] = record, find_lora(place)
        drawing = self.stock
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several are meant
            for name, file in files.items():
                load_lora(drawing, file, name)
        self.partition, self.records, self.weight = partition, records, weight
        return self

    def route(self, prompts: Sequence[str]) -> list[str]:
        """The part of each prompt.

        Raises UserError without students."""
        if self.partition is None:
            raise UserError("this pipeline has no students yet; load them by load_students(...)")
        return self.partition.part_of(prompts, lambda texts: text_features(self.tokenizer, self.text_encoder, texts))

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        **options: Any,
    ) -> MultiStudentOutput:
        """Draws one picture a prompt.

        Args:
            num_inference_steps: fewer than each student's recorded ones take as many of its times, evenly picked.
            guidance_scale: above 1 it is ignored, with a warning, for students that take none.
            generator: a list has one for each prompt, so that no picture depends on the others; a single one serves the
                parts one after another.
            latents: unit noise (N, C, h, w), one for each prompt.
            options: any other argument of the family's pipeline that is not a list of something for each prompt.

        Raises:
            UserError: no students, more steps than one has, lists of another length than the prompts.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if options.pop("num_images_per_prompt", 1) != 1:
            raise UserError("multi-student sampling draws one picture a prompt; repeat the prompt for more")
        for name, given in (("generator", generator), ("latents", latents)):
            many = isinstance(given, Sequence | torch.Tensor)
            if many and len(given) != len(prompts):  # type: ignore[arg-type]
                raise UserError(f"{name} has {len(given)} entries for {len(prompts)} prompts")  # type: ignore[arg-type]
        parts = self.route(prompts)
        options.pop("return_dict", None)
        drawing, found = self.stock, dict[int, Any]()
        for name in dict.fromkeys(parts):
            rows = [row for row, part in enumerate(parts) if part == name]
            record = self.records[name]
            drawing.set_adapters([name], [self.weight])
            drawing.scheduler = recorded_scheduler(record)
            call = record.call(num_inference_steps, allowed_guidance(record, guidance_scale))
            call["latents"] = None if latents is None else latents[rows]
            call["generator"] = [generator[row] for row in rows] if isinstance(generator, Sequence) else generator
            drawn = drawing([prompts[row] for row in rows], **{**call, **options}).images
            found |= dict(zip(rows, drawn, strict=True))
        self.maybe_free_model_hooks()
        images: Any = [found[row] for row in range(len(prompts))]
        if isinstance(images[0], np.ndarray):
            images = np.stack(images)
        elif isinstance(images[0], torch.Tensor):
            images = torch.stack(images)
        return MultiStudentOutput(images, parts)
