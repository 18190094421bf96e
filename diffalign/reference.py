"""Reference errors ahead of time: what the base says of each training pair at its first K visits (DESIGN 5)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .data.source import Source
from .errors import UserError
from .methods.base import Columns, Method
from .methods.pair import PairMethod
from .recipe import Recipe

if TYPE_CHECKING:
    from .context import Context

CODE = "1"  # raised whenever the same inputs would give other numbers


def check_reference(recipe: Recipe, method: Method[Any]) -> PairMethod[Any]:
    """The method, if its base errors can be cached.

    Raises UserError for methods without a reference, and for those that build their noisy inputs with the student."""
    key = f"data.reference_errors={recipe.data.reference_errors}"
    if not isinstance(method, PairMethod) or not method.needs.reference:
        raise UserError(f"{key}: method '{recipe.method.name}' compares no pair with the base; set it to null")
    if recipe.data.curriculum is not None:
        raise UserError(f"{key}: the visits of a curriculum are not known ahead; set it to null")
    hooks = ("noise", "draw", "errors", "measure")
    if any(getattr(type(method), hook) is not getattr(PairMethod, hook) for hook in hooks):
        raise UserError(f"{key}: method '{recipe.method.name}' has its own way to the base's errors; set it to null")
    return method


def visits_needed(recipe: Recipe, rows: int) -> int:
    """How many of the K visits of each training row a run comes to."""
    assert recipe.data.reference_errors is not None
    return min(recipe.data.reference_errors, math.ceil(recipe.train.steps * recipe.train.batch / max(1, rows)))


def reference_note(recipe: Recipe, method: Method[Any], rows: int) -> str:
    """What the cached errors cost and save, for ``--plan``. Raises UserError as `check_reference`."""
    check_reference(recipe, method)
    visits = visits_needed(recipe, rows)
    images, count = 2 * visits * rows, rows * visits * 8
    return (
        f"reference errors of {visits} visits: {images:,} forward images of the base ahead of time (kept for other "
        f"runs, {count / 1e6:.3g} MB), then {2 * recipe.train.batch} fewer a step than counted here"
    )


def reference_errors(
    method: PairMethod[Any], ctx: Context, source: Source, recipe: Recipe, made_by: Mapping[str, str]
) -> Tensor:
    """Errors of the base (rows, V, 2), chosen and rejected, in the network's own units, for visits 0 .. V-1.

    They are kept beside the latent cache, a table a visit, shared by every run with the same base, rows, seed, caption
    dropout and precision: a sweep of beta or of the learning rate asks the base once. V is ``visits_needed``.
    """
    tables = []
    before = ctx.phase, ctx.repeat
    ctx.phase, ctx.repeat = method.phases[0].name, 0
    for visit in range(visits_needed(recipe, len(source))):

        def compute(rows: Sequence[int], visit: int = visit) -> Columns:
            batch = source.load(rows, [visit] * len(rows)).to(ctx.device)
            with torch.no_grad():
                errors = method.base_errors(ctx, method.noise(ctx, batch))
            return dict(zip(("chosen", "rejected"), errors.chunk(2), strict=True))

        by = {
            **made_by,
            "kind": "reference errors",
            "phase": ctx.phase,
            "visit": str(visit),
            "seed": str(source.seed),
            "caption_dropout": str(source.caption_dropout),
            "flip": str(recipe.data.flip),
            "compute": f"{ctx.autocast} over {recipe.model.dtype}, quantize {recipe.model.quantize}",
            "code": CODE,
        }
        found = source.cache.table(by, compute, recipe.data.encode_batch)
        tables.append(torch.stack([found["chosen"], found["rejected"]], 1))
    ctx.phase, ctx.repeat = before
    return torch.stack(tables, 1)
