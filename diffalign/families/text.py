"""CLIP tokenizers: loaded from a model's folder, applied as the pipelines do."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from transformers import BatchEncoding, CLIPTokenizer, PreTrainedTokenizerBase

from ..errors import UserError
from .folder import ModelFolder


def load_tokenizer(folder: ModelFolder, component: str = "tokenizer") -> CLIPTokenizer:
    """A tokenizer of a model folder. Raises UserError when its files are missing or damaged."""
    place = folder.part(component)
    if not any((place / name).is_file() for name in ("vocab.json", "tokenizer.json")):
        raise UserError(f"model '{folder.source}' has no vocab.json in {component}/; download the folder again")
    try:
        return CLIPTokenizer.from_pretrained(str(place), local_files_only=True)
    except (OSError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"model '{folder.source}': {component} cannot be loaded: {reason}") from error


def tokenize(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> BatchEncoding:
    """``input_ids`` and ``attention_mask`` (B, L), padded to the encoder's length, longer texts cut."""
    return tokenizer(
        list(texts),
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    )


def overflow(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[int]:
    """Tokens that each text loses to the tokenizer's length; 0 = it fits."""
    if not texts:
        return []
    ids: list[list[int]] | list[Tensor] = tokenizer(list(texts), padding=False, truncation=False, verbose=False)[
        "input_ids"
    ]
    return [max(0, len(row) - tokenizer.model_max_length) for row in ids]
