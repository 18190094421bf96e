"""The scorers of the eval suite that a method is given: by name, on its device, as functions of tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from .context import Reward
from .errors import UserError

if TYPE_CHECKING:
    from .eval.scorers import Scorer
    from .methods.base import Method


def check_rewards(method: Method[Any]) -> dict[str, str | None]:
    """Name and path of each scorer that a method's ``ctx.reward`` serves. Raises UserError for unknown ones."""
    from .eval.scorers import parse_scorers

    return parse_scorers(method.rewards()) if method.needs.reward else {}


def load_rewards(
    method: Method[Any], device: torch.device, autocast: torch.dtype | None, prompts: Sequence[str] = ()
) -> dict[str, Reward]:
    """The scorers that ``ctx.reward`` serves, by name, on the device; in bf16 where that computes, else fp32 (gradients
    of an fp16 tower vanish). ``prompts``: all that they will be asked; a text is then encoded beside the same others
    whenever a run comes to it. Where ``needs.scores_only`` those without gradients will do: they see what a file of the
    picture would hold. Raises UserError for one without weights, for one without gradients that has to have them, and
    for the oracle, which only judges."""
    from .eval.scorers import Scorer, load_scorer
    from .eval.scorers.spm import StepAwareScorer

    found: dict[str, Reward] = {}
    for name, path in check_rewards(method).items():
        if name == "oracle":
            raise UserError("method.reward: the oracle only judges; take another scorer, such as tiny-pickscore")
        scorer = load_scorer(name, path, device.type, "bf16" if autocast == torch.bfloat16 else "fp32")
        scorer.check_prompts(prompts)
        if type(scorer).reward is Scorer.reward and method.needs.scores_only:
            found[name] = scored(scorer)
            continue
        if type(scorer).reward is Scorer.reward:
            raise UserError(f"method.reward: scorer '{name}' gives no gradients; take one of CLIP's kind")
        scorer.plan_texts(prompts)
        found[name] = scorer.reward if isinstance(scorer, StepAwareScorer) else timeless(scorer.reward)
    return found


def scored(scorer: Scorer) -> Reward:
    """A scorer without gradients as a reward: it sees pictures of 256 levels."""
    return lambda images, prompts, t=None: scorer(images, prompts).to(images.device)


def timeless(reward: Reward) -> Reward:
    """A reward that may be told the images' times and does not look at them."""
    return lambda images, prompts, t=None: reward(images, prompts)
