"""Prompts of any length, encoded segment by segment (LongAlign, Liu et al. 2024, arXiv 2410.11817).

As the authors' code does: a prompt is split into sentences, each goes through the text encoder alone, and what stands
at its start token and its words is put one after another; end and padding tokens are left out. The row is cut or filled
to a fixed length (240 there) with one vector, the mean of what the empty prompt has at its last 60 of 77 places. So
prompts of all lengths stack, and the unconditional branch is the start token of an empty prompt and filling.

Ours: sentences end at . ! ? ; (the authors' pattern looks for quotation marks beside some of these), a sentence longer
than the encoder takes is split further instead of cut, and SDXL, which they do not have, gets the segments' mean as
its pooled text. Short prompts are encoded the same way, so they are not what the base was trained on: train with it.

Of the paper there is this encoding, for any method of training and in sampling, and its reward with the reweighting
(`eval.scorers.denscore`), which scores pairs (``data.scorer``, `pairs score`, `pairs make`) and judges. Its own
training, by the reward's gradient through the last steps of a sampler, is not here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.batch import Cond
from ..errors import UserError
from ..sentences import sentences

HEAD = 17  # places of the empty prompt that the filling leaves out: 77 - 60


@dataclass(frozen=True)
class Tower:
    """A text encoder and its tokenizer. ``penultimate``: its last layer but one is read, and its pooled output."""

    tokenizer: PreTrainedTokenizerBase
    encoder: PreTrainedModel
    penultimate: bool = False

    def __call__(self, pieces: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor | None]:
        """States (n, L, D) of pieces of at most L - 2 tokens without their special ones, and pooled text (n, P)."""
        words, length = self.tokenizer, self.tokenizer.model_max_length
        ids = torch.full((len(pieces), length), int(words.pad_token_id or 0))
        mask = torch.zeros_like(ids)
        for row, piece in enumerate(pieces):
            whole = [words.bos_token_id, *piece, words.eos_token_id]
            ids[row, : len(whole)], mask[row, : len(whole)] = torch.tensor(whole), 1
        ids, mask = ids.to(self.encoder.device), mask.to(self.encoder.device)
        if self.penultimate:
            output = self.encoder(ids, output_hidden_states=True)
            return output.hidden_states[-2], output[0]
        use_mask = getattr(self.encoder.config, "use_attention_mask", False)
        return self.encoder(ids, attention_mask=mask if use_mask else None)[0], None

    def pieces(self, text: str) -> list[list[int]]:
        """Token ids of a prompt's segments, without special tokens; one empty piece for an empty prompt."""
        found: list[list[int]] = []
        room = self.tokenizer.model_max_length - 2
        for sentence in sentences(text):
            ids = self.tokenizer(sentence, add_special_tokens=False, truncation=False, verbose=False)["input_ids"]
            found += [ids[start : start + room] for start in range(0, len(ids), room)]
        return found or [[]]


def towers_of(parts: Any) -> list[Tower]:
    """The towers of a pipeline, or of anything that has its text encoders and tokenizers."""
    if getattr(parts, "text_encoder_2", None) is None:
        return [Tower(parts.tokenizer, parts.text_encoder)]
    return [
        Tower(parts.tokenizer, parts.text_encoder, True),
        Tower(parts.tokenizer_2, parts.text_encoder_2, True),
    ]


def count_tokens(towers: Sequence[Tower], text: str) -> int:
    """Places that a prompt takes: its words and a start token a segment."""
    return max(sum(1 + len(piece) for piece in tower.pieces(text)) for tower in towers)


@torch.no_grad()
def encode_segments(towers: Sequence[Tower], prompts: Sequence[str], length: int, batch: int = 64) -> Cond:
    """Prompts as conditioning (B, ``length``, D), the towers side by side; pooled text where the last tower has it.

    Raises UserError when the towers' tokenizers cut a prompt differently."""
    # an empty list goes through as one empty text, for the shapes
    texts = list(prompts) or [""]
    cut = [[_fitting(tower.pieces(text), length) for text in texts] for tower in towers]
    for i, text in enumerate(texts):
        if len({tuple(map(len, pieces[i])) for pieces in cut}) > 1:
            raise UserError(f"the two tokenizers cut '{text[:40]}' differently: no long prompts with this model")
    rows: list[list[Tensor]] = [[] for _ in texts]
    pooled: list[Tensor] = []
    for tower, pieces in zip(towers, cut, strict=True):
        flat = [piece for own in pieces for piece in own]
        outputs = [tower(flat[start : start + batch]) for start in range(0, len(flat), batch)]
        states = torch.cat([states for states, _ in outputs])
        filling = tower([[]])[0][0, HEAD if states.shape[1] > HEAD else -1 :].mean(0, keepdim=True)
        at = 0
        for row, own in zip(rows, pieces, strict=True):
            kept = [states[at + k, : 1 + len(piece)] for k, piece in enumerate(own)]
            line = torch.cat(kept)[:length]
            row.append(torch.cat([line, filling.expand(length - len(line), -1)]))
            at += len(own)
        if tower is towers[-1] and outputs[0][1] is not None:
            every = torch.cat([pool for _, pool in outputs if pool is not None])
            pooled = [part.mean(0) for part in every.split([len(own) for own in pieces])]
    embeds = torch.stack([torch.cat(row, -1) for row in rows])
    found = Cond(embeds, {"text_embeds": torch.stack(pooled)} if pooled else {})
    return found.take(slice(0, len(prompts)))


def _fitting(pieces: list[list[int]], length: int) -> list[list[int]]:
    """The segments that have a place in ``length``."""
    kept, used = [], 0
    for piece in pieces:
        if used >= length:
            break
        kept.append(piece)
        used += 1 + len(piece)
    return kept
