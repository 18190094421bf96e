"""Sheets of samples from fixed prompts and seeds, drawn at every look, and what their pixels say about a run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from .families.guidance import GuidanceAdapters, embedding_width, tell
from .validate import averaged

if TYPE_CHECKING:
    from PIL.Image import Image

    from .setup import Parts

STATISTICS = ("brightness", "saturation", "diversity")
SIDE = 64  # pictures are compared at this size: what they show, not how finely


class Sheets:
    """Draws ``validate.per_prompt`` pictures of each of ``validate.images`` prompts by the student.

    Prompts are the recipe's, else those of held-out rows (of training rows where none are held out). The noise depends
    on (validate.seed, prompt, place) alone: the same at every step of every run."""

    def __init__(self, parts: Parts) -> None:
        self.parts, self.recipe = parts, parts.recipe.validate_
        self.prompts = self._prompts()[: self.recipe.images]
        self.cond = parts.model.encode_prompts(self.prompts)
        self._release()

    def _prompts(self) -> list[str]:
        wanted = self.recipe.prompts
        if isinstance(wanted, str):
            from .eval.prompts import read_prompts

            return [p.prompt for p in read_prompts(wanted)]
        if wanted:
            return wanted
        rows = self.parts.heldout.indices if self.parts.heldout else range(len(self.parts.rows))
        found: dict[str, None] = {}
        for i in rows:  # of millions of rows only the first few are read
            found[self.parts.rows[int(i)].prompt] = None
            if len(found) == self.recipe.images:
                break
        return list(found)

    def _release(self) -> None:
        if self.parts.recipe.data.cache:
            self.parts.model.release_encoders()

    def draw(self, folder: Path) -> dict[str, float]:
        """A sheet as ``folder``/step-NNNNNN.png, and the statistics of its pictures; nothing without a student.

        The PNG's text chunk ``tiles`` lists [left, top, width, height, prompt] of each picture, for the report."""
        if not self.prompts or "student" not in self.parts.trainer.roles.networks:
            return {}
        images = self.sample("student")
        if self.parts.trainer.rank:  # came along because the network is sharded
            return {}
        folder.mkdir(exist_ok=True)
        labels = [prompt for prompt in self.prompts for _ in range(self.recipe.per_prompt)]
        write_sheet(images, labels, folder / f"step-{self.parts.trainer.step:06d}.png")
        return picture_statistics(images, self.recipe.per_prompt)

    def sample(self, role: str) -> list[Image]:
        """The pictures by a role, prompt by prompt, with EMA weights where there are any."""
        from .data.batch import Cond
        from .pipelines.sample import sample_model

        trainer, model, recipe, times = self.parts.trainer, self.parts.model, self.recipe, self.recipe.per_prompt

        record = self.parts.method.sampling(model.scheduler_config) if role == "student" else None
        guidance = recipe.guidance if record is None else max(1.0, record.guidance)
        extra = trainer.roles.extras.get(role)
        if isinstance(extra, GuidanceAdapters):  # told it, and never guided besides
            extra.choose(guidance)
            guidance = 1.0

        told = guidance if record is not None and record.told else None

        def call(x: torch.Tensor, t: torch.Tensor, rows: Cond) -> torch.Tensor:
            if told is None:
                return trainer.ctx.model(role, x, t, rows, guidance)
            w = torch.full((len(x),), told, device=x.device)
            return trainer.ctx.model(role, x, t, tell(rows, w, embedding_width(model.unet)))

        ids = [f"{i}:{prompt}" + (f"#{k}" if k else "") for i, prompt in enumerate(self.prompts) for k in range(times)]
        cond = self.cond.take([i for i in range(len(self.prompts)) for _ in range(times)])
        side = self.parts.recipe.data.resolution or model.default_resolution
        with torch.no_grad(), averaged(trainer):
            images = sample_model(
                model,
                call,
                cond,
                ids,
                size=(side, side),
                steps=recipe.steps,
                seed=recipe.seed,
                batch=min(8, trainer.micro),
                record=record,
            )
        self._release()
        return images


def write_sheet(images: Sequence[Image], labels: Sequence[str], path: Path) -> None:
    """A labelled sheet that knows where its pictures are."""
    from PIL.PngImagePlugin import PngInfo

    from .pipelines.grid import grid

    sheet = grid(images, min(4, len(images)), labels)
    facts = PngInfo()
    places = zip(sheet.info["tiles"], labels, strict=True)
    facts.add_text("tiles", json.dumps([[*place, label] for place, label in places]))
    sheet.save(path, pnginfo=facts)


def picture_statistics(images: Sequence[Image], per_prompt: int = 1) -> dict[str, float]:
    """Mean brightness (V of HSV) and saturation (S), and the diversity within a prompt, all in [0, 1].

    Diversity: the mean absolute difference of RGB values between pictures of one prompt, over all their pairs, then
    over prompts; pictures are averaged down to 64 x 64 first. Light, needs no network, and falls to 0 where samples
    become alike; it says nothing about what differs (that is what LPIPS or CLIP distances of the eval suite are for).
    It is left out where every prompt has one picture."""
    from PIL.Image import Resampling

    small = [image.convert("RGB").resize((SIDE, SIDE), Resampling.BOX) for image in images]
    hsv = np.stack([np.asarray(image.convert("HSV"), dtype=np.float32) / 255 for image in small])
    found = {"brightness": float(hsv[..., 2].mean()), "saturation": float(hsv[..., 1].mean())}
    if per_prompt > 1:
        rgb = np.stack([np.asarray(image, dtype=np.float32) / 255 for image in small])
        groups = rgb.reshape(-1, per_prompt, rgb[0].size)
        apart = [np.abs(groups[:, i] - groups[:, j]).mean() for i in range(per_prompt) for j in range(i)]
        found["diversity"] = float(np.mean(apart))
    return found
