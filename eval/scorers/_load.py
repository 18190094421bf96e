"""Tensors that were read already, put into a transformers model without a random start or a progress bar."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from ...errors import UserError

Model = TypeVar("Model", bound=PreTrainedModel)


def load_model(kind: type[Model], folder: Path | None, source: str | Path, name: str, **how: Any) -> Model:
    """``kind`` in fp32 from a folder, or (None) from ``config=`` and ``state_dict=``.

    Raises UserError for tensors that lack or do not fit; those that the model has no place for are the caller's."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        model, report = kind.from_pretrained(folder, dtype=torch.float32, output_loading_info=True, **how)
    except RuntimeError as error:  # shapes that differ
        raise UserError(f"weights in '{source}' for scorer '{name}' do not fit a {kind.__name__} (shapes)") from error
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
    lost = [k for k in report["missing_keys"] if not k.endswith("position_ids")]
    if lost or report["mismatched_keys"]:
        what = f"missing {min(lost)}" if lost else "shapes"
        raise UserError(f"weights in '{source}' for scorer '{name}' do not fit a {kind.__name__} ({what})")
    return model


def collapse(state: Mapping[str, torch.Tensor], keys: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """A stack of linear layers with nothing between them as one affine map.

    ``keys`` are the layers' names in order. Returns (weight (D,), bias ()) in fp64 for a last layer of one output;
    exact to 1e-8 against the stack. Raises KeyError or RuntimeError for layers that are missing or do not chain."""
    weight, bias = state[f"{keys[0]}.weight"].double(), state[f"{keys[0]}.bias"].double()
    for key in keys[1:]:
        layer = state[f"{key}.weight"].double()
        weight, bias = layer @ weight, layer @ bias + state[f"{key}.bias"].double()
    return weight.reshape(-1), bias.reshape(())
