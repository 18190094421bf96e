"""``diffalign pairs teacher``: noise and what the teacher makes of it, for DMD's regression.

The folder is an ordinary one of captioned pictures, as `diffalign sample` leaves it; the noise is not stored, since it
is a function of (seed, prompt's id, draw), which each row's own id says.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError
from ..keyed import normal

if TYPE_CHECKING:
    from torch import Tensor

    from ..eval.prompts import Prompt
    from ..pipelines.sample import SampleSpec

MARK = "teacher"
TABLE = "metadata.jsonl"
ODE = ("ddim", "dpm++", "unipc")  # samplers without noise of their own that start from unit noise


def teacher_pairs(spec: SampleSpec, prompts: Sequence[Prompt], out: Path, progress: bool = True) -> Path:
    """Samples the teacher's ODE from keyed noise into ``out`` and lists it in ``out/metadata.jsonl``, which it returns.

    A run that was stopped goes on. Raises UserError for a sampler that adds noise, and what `sample` raises."""
    from ..checkpoint import write_atomic
    from ..pipelines.sample import sample

    if spec.scheduler not in (None, *ODE):
        raise UserError(f"--scheduler {spec.scheduler} is no ODE from unit noise; take one of {', '.join(ODE)}")
    manifest = sample(spec, prompts, out, progress)
    rows = [json.loads(line) for line in manifest.read_text(encoding="utf-8").splitlines()]
    lines = []
    for row in rows:
        key = "|".join((MARK, str(row["seed"]), str(row["k"] % spec.per_prompt), row["id"]))
        lines.append(json.dumps({"file_name": row["image"], "prompt": row["prompt"], "id": key}))
    write_atomic(out / TABLE, "\n".join(lines) + "\n")
    return out / TABLE


def teacher_noise(ids: Sequence[str], shape: tuple[int, ...]) -> Tensor:
    """The noise (B, C, h, w) that the pictures of these rows were sampled from; ``shape`` is that of their latents.

    Raises UserError for rows of other data."""
    import torch

    found = []
    for name in ids:
        mark, _, rest = name.partition("|")
        seed, _, rest = rest.partition("|")
        draw, _, prompt = rest.partition("|")
        if mark != MARK or not seed.isdigit() or not draw.isdigit():
            raise UserError(
                f"row '{name}' is no noise with the teacher's picture; make them with `diffalign pairs teacher`, "
                "or set method.regression_weight=0"
            )
        found.append(normal(shape, int(seed), "sample", prompt, int(draw)))
    return torch.stack(found)
