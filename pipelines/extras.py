"""Soft tokens, user attention and guidance adapters on a plain diffusers pipeline: what a SoftREPA, PPD or AGD run
leaves, for sampling.

pipe = StableDiffusionPipeline.from_pretrained(...)
extra = apply_extra(pipe, "runs/ppd", user="ann", scale=0.8)   # pipe(...) follows her taste from now on
extra.on = False                                               # and is the base again
extra = apply_extra(pipe, "runs/agd")                          # see distilled_guidance for a pipeline that takes w
pipe("a cat", guidance_scale=told_guidance(extra, 7.5))        # one forward a step, as guided by 7.5
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from ..errors import UserError
from ..families.extras import Extra, find_extra, load_extra
from ..families.guidance import GuidanceAdapters
from ..families.users import UserAttention

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

User = str | Mapping[str, float] | Tensor


def apply_extra(pipe: DiffusionPipeline, path: str | Path, user: User | None = None, scale: float = 1.0) -> Extra:
    """Puts a run's parts on a pipeline's U-Net; both branches of guidance get them, as the authors of SoftREPA do.
    Guidance adapters stand for the branches: sample with ``guidance_scale=1``, and the guidance by their ``choose``.

    Args:
        path: a run's folder, its ``model/``, an exported folder or the file itself; ``RUN#USER`` names the user too.
        user: of a PPD run: a name, ``"ann:0.3,bob:0.7"`` or a mapping (a mix), or an embedding (T, V). None is the only
            user there is, or nobody in particular where there are several.
        scale: strength of the user attention or adapters; 0 is the base. Soft tokens are on (1) or off (0).

    Returns:
        The parts: ``on`` switches them, ``scale`` and ``choose(user)`` change them, ``detach()`` takes them off.

    Raises UserError when there are none, they were made for another U-Net, or the user is not known.
    """
    place, named = split_user(str(path))
    file = find_extra(place)
    if file is None:
        raise UserError(
            f"'{place}' holds no soft tokens, user attention or adapters; give the folder of a SoftREPA, PPD or AGD run"
        )
    extra = load_extra(file, pipe.unet)
    wanted = named if user is None else user
    if isinstance(extra, UserAttention):
        extra.choose(parse_user(wanted, extra.users) if isinstance(wanted, str) else wanted)
    elif wanted is not None:
        what = "guidance adapters" if isinstance(extra, GuidanceAdapters) else "soft tokens"
        raise UserError(f"'{place}' holds {what}, which know no users; leave the user out")
    elif isinstance(extra, GuidanceAdapters):
        predicts = str(pipe.scheduler.config.get("prediction_type", "epsilon"))
        if predicts != extra.prediction:
            raise UserError(
                f"the adapters '{place}' were made for a model of prediction {extra.prediction} and this base has "
                f"{predicts}; take the base that they were made for"
            )
    elif scale not in (0, 1):
        raise UserError(f"soft tokens are on (scale 1) or off (0), and have no strength {scale:g}")
    extra.scale, extra.on = scale, scale != 0
    extra.to(pipe.unet.device).attach(pipe.unet)
    return extra


def told_guidance(extra: Extra | None, guidance: float, negative: str | None = None) -> float:
    """The ``guidance_scale`` of a pipeline with these parts: guidance adapters are told ``guidance``, and it is 1 then,
    which is one branch; without such it stays as it is.

    Warns of a guidance that the adapters were not trained for. Raises UserError for a negative prompt, which needs the
    branch that they stand for."""
    if not isinstance(extra, GuidanceAdapters) or not extra.on:
        return guidance
    if negative:
        raise UserError("distilled guidance has no unconditional branch for a negative prompt; leave it out")
    extra.choose(guidance)
    return 1.0


def split_user(text: str) -> tuple[str, str | None]:
    """``runs/ppd#ann`` as ("runs/ppd", "ann"); a path that exists is taken as it is."""
    place, mark, user = text.rpartition("#")
    return (text, None) if not mark or Path(text).expanduser().exists() else (place, user)


def parse_user(text: str, users: tuple[str, ...]) -> str | dict[str, float]:
    """A name, or a mix such as ``"ann:0.3,bob:0.7"``.

    Raises UserError when a weight is no number."""
    if text in users or ":" not in text:
        return text
    mix = {}
    for part in text.split(","):
        name, _, weight = part.rpartition(":")
        try:
            mix[name] = float(weight)
        except ValueError as error:
            raise UserError(f"'{part}' in user '{text}' is not NAME:WEIGHT, such as ann:0.3") from error
    return mix
