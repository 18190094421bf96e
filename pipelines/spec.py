"""What to sample and how, as settings: one place for `diffalign sample`, `diffalign eval` and notebooks. No torch."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, replace
from typing import Any, Self

from ..errors import Note, UserError
from ..facts import SamplingRecord

DEFAULTS: dict[str, Any] = {"steps": 25, "guidance": 7.5, "scheduler": "ddim"}
BASE_STEPS, BASE_GUIDANCE = 20, 7.0  # of the base that makes a few-step student's first steps
RECORDED = "recorded"  # the scheduler that a few-step model carries


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to sample. None means: as the model records it (few-step students do), else the default of `DEFAULTS`, or
    the model's own ``height``/``width``.

    ``guidance`` as in diffusers: at most 1 means none, and one U-Net call a step instead of two. ``seed``: one number
    or several; each prompt is drawn ``per_prompt`` times from each."""

    steps: int | None = None
    guidance: float | None = None
    negative_prompt: str | None = None
    scheduler: str | None = None
    height: int | None = None
    width: int | None = None
    seed: int | tuple[int, ...] = 0
    per_prompt: int = 1
    long_prompts: int | None = None
    batch: int = 8
    device: str = "auto"
    dtype: str = "auto"
    revision: str | None = None
    variant: str | None = None

    @property
    def seeds(self) -> tuple[int, ...]:
        """Every seed, in order."""
        return (self.seed,) if isinstance(self.seed, int) else tuple(self.seed)

    def check(self) -> None:
        """UserError for a value out of range, before anything is loaded."""
        from ..families.schedulers import check_scheduler

        if self.scheduler not in {None, RECORDED}:
            check_scheduler(str(self.scheduler))
        for name in ("steps", "per_prompt", "batch"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} must be at least 1, not {value}")
        if self.long_prompts is not None and self.long_prompts < 2:
            raise UserError(f"long prompts need at least 2 places of text, not {self.long_prompts}; LongAlign has 240")
        if self.guidance is not None and not (math.isfinite(self.guidance) and self.guidance >= 0):
            raise UserError(f"guidance must be at least 0, not {self.guidance:g} (1 or less means none)")
        if not self.seeds or min(self.seeds) < 0:
            raise UserError(f"seed must be at least 0, not {', '.join(map(str, self.seeds)) or 'none'}")
        if len(set(self.seeds)) < len(self.seeds):
            raise UserError("a seed is given twice; each draws the same images again, name each once")
        for name in ("height", "width"):
            side = getattr(self, name)
            if side is not None and (side < 8 or side % 8):
                raise UserError(f"{name} {side} is not a positive multiple of 8")

    def filled(self, record: SamplingRecord | None) -> Self:
        """With what is None taken from the model's record, then from the defaults.

        A student that takes no guidance is sampled without, whatever is given (warned of), unless a scheduler is
        chosen by hand. Raises UserError when the recorded scheduler is asked for and there is none, or for more steps
        than its times."""
        if self.scheduler == RECORDED and record is None:
            raise UserError("the model carries no scheduler of its own; choose one, such as --scheduler ddim")
        if record is not None and self.scheduler in {None, RECORDED}:
            record.times(self.steps)
            guidance = allowed_guidance(record, self.guidance)
            self = replace(self, guidance=guidance)
        known = {"steps": record.steps, "guidance": record.guidance, "scheduler": RECORDED} if record else {}
        return replace(self, **{n: v for n, v in {**DEFAULTS, **known}.items() if getattr(self, n) is None})


@dataclass(frozen=True)
class SampleSpec(Sampling):
    """What to sample: a model, perhaps with a LoRA of weight ``lora_scale``; and how.

    ``base_first``: so many of a few-step student's steps are made by its base instead, which makes ``base_steps`` over
    the whole schedule under ``base_guidance`` (diversity distillation; see `few_step.FewStepPipeline`).

    ``search``: a search of `searches.options`, as text, for the picture that ``reward`` (a scorer's name) scores
    highest, with ``budget`` U-Net calls a picture; a guided step counts two."""

    model: str
    lora: str | None = None
    lora_scale: float = 1.0
    base_first: int | None = None
    base_steps: int | None = None
    base_guidance: float | None = None
    search: str | None = None
    reward: str | None = None
    budget: int | None = None

    def check(self) -> None:
        super().check()
        if not math.isfinite(self.lora_scale):
            raise UserError(f"lora scale must be a number, not {self.lora_scale}")
        for name, least in (("base_first", 1), ("base_steps", 1), ("base_guidance", 0)):
            value = getattr(self, name)
            if value is not None and not least <= value < math.inf:
                raise UserError(f"{name} must be at least {least}, not {value:g}")
            if value is not None and self.base_first is None:
                raise UserError(f"{name} is for pictures that the base begins; give base_first too")
        self._check_search()

    def _check_search(self) -> None:
        """UserError for a search that is not whole, or for what does not go with one."""
        given = {name: getattr(self, name) is not None for name in ("search", "reward", "budget")}
        if not any(given.values()):
            return
        missing = [name for name, there in given.items() if not there]
        if missing:
            raise UserError(f"a search needs --search, --reward and --budget together; {', '.join(missing)} is missing")
        from ..eval.scorers import parse_scorers
        from .searches.options import parse_search

        how = parse_search(str(self.search))
        if len(parse_scorers(str(self.reward))) > 1:
            raise UserError(f"--reward {self.reward}: a search goes by one scorer; name one")
        if self.budget is not None and self.budget < 1:
            raise UserError(f"--budget must be at least 1, not {self.budget}")
        if self.per_prompt > 1:
            raise UserError(
                "a search gives one picture a prompt and seed; leave --per-prompt out, or give several seeds"
            )
        if self.base_first is not None:
            raise UserError("base_first does not go with a search; leave one of them out")
        if how.noisy and self.scheduler not in {None, "ddim", RECORDED}:
            raise UserError(
                f"search '{how.name}' draws by DDIM steps that add noise; leave --scheduler {self.scheduler} out, or "
                "take best-of-n"
            )

    def filled(self, record: SamplingRecord | None) -> Self:
        found = super().filled(record)
        if found.base_first is None:
            return found
        if record is None or found.scheduler != RECORDED:
            raise UserError("base_first is for few-step students that carry their sampler; leave it out")
        steps = BASE_STEPS if found.base_steps is None else found.base_steps
        guidance = BASE_GUIDANCE if found.base_guidance is None else found.base_guidance
        return replace(found, base_steps=steps, base_guidance=guidance)


def allowed_guidance(record: SamplingRecord, guidance: float | None) -> float | None:
    """The guidance that a few-step student is sampled with: its own, where it was made for none; warns of the other,
    and of one that it was not trained to be told."""
    if record.told and guidance is not None and not record.told[0] <= guidance <= record.told[1]:
        warnings.warn(
            f"guidance {guidance:g} is outside of {record.told[0]:g} to {record.told[1]:g}, which this student was "
            "trained to be told",
            Note,
            stacklevel=3,
        )
    if guidance is None or guidance <= 1 or record.guided or record.told:
        return guidance
    warnings.warn(
        f"guidance {guidance:g} is ignored: this student was distilled to be sampled without", Note, stacklevel=3
    )
    return record.guidance


def parse_seeds(text: str) -> int | tuple[int, ...]:
    """``"3"`` or ``"0,1,2"``. Raises UserError for anything else."""
    try:
        seeds = tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        seeds = ()
    if not seeds:
        raise UserError(f"seed '{text}' is not a number, or several as 0,1,2")
    return seeds[0] if len(seeds) == 1 else seeds
