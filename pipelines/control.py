"""Controls on distilled students, and back (Gandikota and Bau 2025, arXiv 2503.10637): a LoRA or slider of the base
steers its student, and one of the student the base. How alike the two edits are is measured.

    base, student = StableDiffusionPipeline.from_pretrained(...), diffalign.Run.open("runs/sd15-tdm").pipeline()
    found = transfer(base, student, "runs/slider", ["a cat", "a dog"], strength=1.5)
    found.similarity                       # cosine of the two edits, a picture
    with controlled(student, "runs/slider") as strength:
        strength(1.5)
        student("a cat").images[0]
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from ..errors import UserError
from ..families.lora import find_lora, load_lora
from ..keyed import normal

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from torch import nn

CONTROL = "control"


@dataclass(frozen=True)
class Transfer:
    """Of each picture: the cosine of the edits that a control makes on two models, and the root mean square of either
    edit, in pixels from 0 to 1."""

    similarity: tuple[float, ...]
    effect: tuple[float, ...]
    other_effect: tuple[float, ...]

    def summary(self) -> str:
        """In a line, for people."""
        means = (float(np.mean(part)) for part in (self.similarity, self.effect, self.other_effect))
        return "edits' cosine {:.2f}, sizes {:.3f} and {:.3f}".format(*means)


@contextmanager
def controlled(pipe: DiffusionPipeline, path: str) -> Iterator[Callable[[float], None]]:
    """A LoRA (file, folder, run's folder or hub id) on a pipeline for a while, beside the adapters that are active
    there, such as a student's. What is yielded sets its strength: 1 at first, 0 is the model without it, below 0 the
    contrary.

    Raises UserError when there is no LoRA, or it does not fit."""
    stock: Any = getattr(pipe, "stock", pipe)
    if CONTROL in getattr(stock.unet, "peft_config", {}):
        raise UserError("this pipeline has a control already; leave its `with` block first")
    before = active(stock.unet)
    load_lora(stock, find_lora(path), CONTROL)
    for layer in tuners(stock.unet):
        layer.set_adapter([name for name in (*before, CONTROL) if name in layer.scaling])

    def strength(value: float) -> None:
        for layer in tuners(stock.unet):
            if CONTROL in layer.scaling:
                layer.set_scale(CONTROL, value)

    try:
        yield strength
    finally:
        if before:
            stock.unet.delete_adapters([CONTROL])
            for layer in tuners(stock.unet):
                layer.set_adapter([name for name in before if name in layer.scaling])
        else:
            stock.unload_lora_weights()


def transfer(
    one: DiffusionPipeline,
    other: DiffusionPipeline,
    path: str,
    prompts: Sequence[str],
    *,
    strength: float = 1.0,
    options: Mapping[str, Any] | None = None,
    other_options: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> Transfer:
    """How alike a control's edits are on two models, from the same noise: of each picture the difference that the LoRA
    makes there, and the cosine of the two.

    Args:
        strength: of the control, on both.
        options, other_options: of the calls (steps, guidance); a student's record is its default.

    Raises UserError without prompts, and when the LoRA does not fit either model."""
    if not prompts:
        raise UserError("edits are compared on pictures of prompts, and there are none; give some")
    edits = [
        edit(pipe, path, prompts, strength, given or {}, seed)
        for pipe, given in ((one, options), (other, other_options))
    ]
    norms = [np.linalg.norm(each, axis=1) for each in edits]
    cosine = (edits[0] * edits[1]).sum(1) / np.maximum(norms[0] * norms[1], 1e-12)
    sizes = [tuple((norm / edits[0].shape[1] ** 0.5).tolist()) for norm in norms]
    return Transfer(tuple(cosine.tolist()), *sizes)


def edit(
    pipe: DiffusionPipeline, path: str, prompts: Sequence[str], strength: float, options: Mapping[str, Any], seed: int
) -> np.ndarray:
    """What a control changes in the pictures of ``prompts``: (B, numbers) of pixels in [0, 1]."""
    side = int(pipe.unet.config.sample_size)
    shape = (int(pipe.unet.config.in_channels), side, side)
    noise = torch.stack([normal(shape, seed, "control", k) for k in range(len(prompts))])

    def draw() -> np.ndarray:
        latents = noise.to(pipe.device, pipe.unet.dtype)
        steps = [torch.Generator("cpu").manual_seed(seed + k) for k in range(len(prompts))]
        drawn: Any = pipe(list(prompts), latents=latents, generator=steps, output_type="np", **options)
        return np.asarray(drawn.images, dtype=np.float64).reshape(len(prompts), -1)

    with controlled(pipe, path) as set_strength:
        set_strength(strength)
        edited = draw()
    return edited - draw()


def tuners(unet: nn.Module) -> list[BaseTunerLayer]:
    """The layers of a network that have adapters."""
    return [module for module in unet.modules() if isinstance(module, BaseTunerLayer)]


def active(unet: nn.Module) -> list[str]:
    """The adapters that are switched on."""
    found: dict[str, None] = {}
    for layer in tuners(unet):
        if not layer.disable_adapters:
            found.update(dict.fromkeys(layer.active_adapters))
    return list(found)
