"""``--preset 24gb``: settings that make a recipe fit a card of that size. Resolution, batch and method stay.

The numbers come from the plan's estimates at the family's own resolution with adapters of rank 64 (tests hold each of
them below its card); they were not measured on cards. Imports no torch until a model's folder must be looked at.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .errors import UserError, nearest
from .recipe import Recipe, load_recipe

CARDS = (8, 12, 16, 24, 48, 80)
GIB = 1 << 30


@dataclass(frozen=True)
class Setting:
    """How a run is held: rows of a micro-batch, recomputed activations, the base's bits, idle parts, optimiser."""

    micro: int
    checkpointing: bool = True
    quantize: str = "none"
    offload: bool = False
    optimizer: str | None = None


ADAPTERS: dict[str, dict[int, Setting]] = {
    "sd": {
        8: Setting(4, offload=True),
        12: Setting(8),
        16: Setting(4, checkpointing=False),
        24: Setting(8, checkpointing=False),
        48: Setting(16, checkpointing=False),
        80: Setting(32, checkpointing=False),
    },
    "sd2": {
        8: Setting(2, offload=True),
        12: Setting(4, offload=True),
        16: Setting(8),
        24: Setting(4, checkpointing=False),
        48: Setting(8, checkpointing=False),
        80: Setting(16, checkpointing=False),
    },
    "sdxl": {
        8: Setting(1, quantize="4bit", offload=True, optimizer="adamw8bit"),
        12: Setting(1, offload=True),
        16: Setting(4, offload=True),
        24: Setting(8, offload=True),
        48: Setting(2, checkpointing=False),
        80: Setting(4, checkpointing=False),
    },
}
# full fine-tuning: the smaller cards are left out where not even one pair fits
COPIES: dict[str, dict[int, Setting]] = {
    "sd": {
        12: Setting(1, offload=True, optimizer="adamw8bit"),
        16: Setting(1, offload=True, optimizer="adamw8bit"),
        24: Setting(4),
        48: Setting(16),
        80: Setting(8, checkpointing=False),
    },
    "sd2": {16: Setting(1, offload=True, optimizer="adamw8bit"), 24: Setting(2), 48: Setting(8), 80: Setting(16)},
    "sdxl": {48: Setting(1, offload=True, optimizer="adamw8bit"), 80: Setting(2)},
}


def preset_names() -> list[str]:
    """``8gb`` and so on."""
    return [f"{card}gb" for card in CARDS]


def card_of(name: str) -> int:
    """Gigabytes of a preset's card. Raises UserError for an unknown name."""
    if name.lower() not in preset_names():
        raise UserError(f"unknown preset '{name}'{nearest(name.lower(), preset_names())}")
    return int(name.lower().removesuffix("gb"))


def preset_overrides(name: str, recipe: Recipe, family: str) -> list[str]:
    """A preset as ``key=value`` texts for a recipe on a model of ``family``.

    Raises UserError for an unknown preset, and where full fine-tuning does not fit the card."""
    card, model, train = card_of(name), recipe.model, recipe.train
    kind = {"sd1": "sd"}.get(family, family)
    copies = model.storage == "copies"
    if copies and train.parallel == "fsdp":  # the shards make room, and take neither offload nor 8-bit states
        setting: Setting | None = Setting(1)
    else:
        setting = (COPIES if copies else ADAPTERS)[kind].get(card)
    if setting is None:
        least = min(COPIES[kind])
        raise UserError(
            f"full fine-tuning of {family} does not fit a card of {card} GB; set model.storage=adapters, take a card "
            f"of {least} GB, or several with train.parallel=fsdp"
        )
    values: dict[str, Any] = {
        "train.micro_batch": min(setting.micro, train.batch),
        "model.gradient_checkpointing": setting.checkpointing,
        "model.dtype": "auto",
        "model.quantize": setting.quantize,
        "model.offload": setting.offload,
    }
    if setting.optimizer:
        values["train.optimizer"] = setting.optimizer
    return [f"{key}={str(value).lower()}" for key, value in values.items()]


def family_of(recipe: Recipe) -> str:
    """sd1, sd2 or sdxl, from the recipe, the known addresses or the model's folder."""
    from .families.known import known_by

    known = known_by(recipe.model.path, recipe.model.family)
    if known is not None:
        return known.family
    from .families import detect

    return detect(recipe.model)[1]


def load_with_preset(source: str, overrides: list[str], name: str) -> tuple[Recipe, list[str]]:
    """A recipe under a preset, and the preset's settings; explicit overrides win over them."""
    card_of(name)
    plain = load_recipe(source, overrides)
    settings = preset_overrides(name, plain, family_of(plain))
    given = {text.partition("=")[0].strip() for text in overrides}
    settings = [text for text in settings if text.partition("=")[0] not in given]
    return load_recipe(source, [*settings, *overrides]), settings
