"""Full fine-tuning over several GPUs with weights, gradients and optimiser states in shards (FSDP2, DESIGN 8)."""

from __future__ import annotations

from typing import Any

from .errors import UserError
from .methods.base import Method
from .recipe import Recipe


def check_parallel(recipe: Recipe, method: Method[Any], world: int = 0) -> None:
    """Raises UserError, in one line, for what does not go with ``train.parallel=fsdp``.

    Args:
        world: processes; 0 where they are not known yet.
    """
    model, train = recipe.model, recipe.train
    if train.parallel != "fsdp":
        return
    wrong: list[tuple[bool, str, str]] = [
        (model.storage != "copies", "model.storage=adapters", "adapters are small: train.parallel=ddp, or copies"),
        (len(method.roles) > 1, f"method '{recipe.method.name}'", "it trains several networks; use train.parallel=ddp"),
        (model.quantize != "none", f"model.quantize={model.quantize}", "set model.quantize=none"),
        (model.compile, "model.compile=true", "set model.compile=false"),
        (model.offload, "model.offload=true", "set model.offload=false"),
        (train.optimizer != "adamw", f"train.optimizer={train.optimizer}", "set train.optimizer=adamw"),
        (train.precision == "fp16", "train.precision=fp16", "set train.precision=bf16 or fp32"),
    ]
    for found, what, mend in wrong:
        if found:
            raise UserError(f"train.parallel=fsdp does not go with {what}; {mend}")
    if world == 1:
        raise UserError(
            "train.parallel=fsdp needs several processes; start it with torchrun --nproc_per_node N -m diffalign train "
            "..., or set train.parallel=ddp"
        )
