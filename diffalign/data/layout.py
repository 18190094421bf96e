"""Where a cache lies, what makes it, and how large it will be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError
from ..recipe import DataRecipe
from .buckets import buckets_of
from .encode import cond_entry
from .store import fingerprint_of, maker_of

if TYPE_CHECKING:
    from ..families import Model

# To be raised whenever the same inputs would give other numbers than before.
CODE = "2"
SEGMENTS = "1"  # the same for prompts that are encoded by segments
TEXT = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")


@dataclass(frozen=True)
class CachePlan:
    """What a cache takes: ``bytes`` in all, ``missing_bytes`` not yet written, ``free`` on the disk of ``folder``."""

    folder: Path
    pictures: int
    prompts: int
    bytes: int
    missing_bytes: int
    free: int

    def check(self) -> None:
        """Raises UserError when the disk is too small."""
        if self.missing_bytes > self.free:
            raise UserError(
                f"disk too small for the cache in '{self.folder}': {self.missing_bytes:,} bytes needed, {self.free:,} "
                "free; free some space, or set data.cache_dir or data.cache=false"
            )


def resolution_of(model: Model, recipe: DataRecipe) -> int:
    """Side of the square pictures in pixels. Raises UserError when the VAE cannot take it."""
    side = recipe.resolution or model.default_resolution
    if side % model.factor:
        low = max(model.factor, side // model.factor * model.factor)
        raise UserError(f"data.resolution {side} is no multiple of {model.factor}, the VAE's factor; set {low}")
    return side


def made_by_of(model: Model, recipe: DataRecipe, resolution: int) -> dict[str, dict[str, str]]:
    """Everything that a store's numbers depend on, by store."""
    encoders = [name for name in TEXT if name in model.folder.components()]
    text = model.fingerprint(*encoders)
    pictures = {
        "vae": model.fingerprint("vae")["vae"],
        "resolution": str(resolution),
        "crop": recipe.crop,
        "alpha": recipe.alpha,
        "posterior": recipe.posterior,
        "dtype": str(next(model.vae.parameters()).dtype),
        "code": CODE,
        **({} if recipe.latents == "fp32" else {"latents": recipe.latents}),
    }
    dtype = str(next(model.text_encoder.parameters()).dtype)
    prompts = {**text, "dtype": dtype, "family": model.family, "code": CODE}
    if model.long_prompts:
        prompts["segments"] = f"{model.long_prompts} places, version {SEGMENTS}"
    if model.zero_uncond:
        prompts["unconditional"] = "zeros"
    return {"pictures": pictures, "prompts": prompts}


def is_flat(root: Path) -> bool:
    """Whether the cache lies straight in this folder."""
    return (root / "pictures").is_dir() and (root / "prompts").is_dir()


def store_folder(root: Path, kind: str, made_by: Mapping[str, str]) -> Path:
    """Where a store lies under a cache folder."""
    if is_flat(root) and kind in ("pictures", "prompts"):
        return root / kind
    return root / f"{kind}-{fingerprint_of(made_by)[:16]}"


def refuse_other(folder: Path, made_by: Mapping[str, Mapping[str, str]]) -> None:
    """Raises UserError when a flat cache in ``folder`` was made by something else."""
    if not is_flat(folder):
        return
    for kind, now in made_by.items():
        then = maker_of(folder / kind)
        if then is None or then == now:
            continue
        differ = [name for name in sorted(now.keys() | then.keys()) if now.get(name) != then.get(name)]
        told = [
            f"{name} {then.get(name)}, now {now.get(name)}" if len(now.get(name, "")) < 24 else f"other {name} weights"
            for name in differ
        ]
        raise UserError(
            f"'{folder}' is a cache of other weights or settings ({'; '.join(told)}); "
            "set data.cache_dir to another folder"
        )


def entry_bytes(model: Model, recipe: DataRecipe) -> tuple[int, int]:
    """Bytes of one picture (at most, with buckets) and of one prompt, with their share of the header."""
    sizes = buckets_of(model, recipe, resolution_of(model, recipe)).sizes
    latents = [model.latent_size(height, width) for height, width in sizes]
    numbers = model.vae.config.latent_channels * max(height * width for height, width in latents)
    cond = cond_entry(model.uncond())
    each = (4 if recipe.latents == "fp32" else 2) + (2 if recipe.posterior == "sample" else 0)
    picture = numbers * each + 76
    return picture, sum(t.numel() * t.element_size() for t in cond.values()) + 40
