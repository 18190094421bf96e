"""Stage "tokenizer": the real CLIP byte-pair vocabulary cut down to what this world's captions need.

512 byte symbols, the merges that spell the words of :data:`scenes.WORDS`, and the two special tokens: about 567
tokens. Any other text still encodes, as bytes. The merges come from ``bpe_simple_vocab_16e6.txt.gz`` (MIT, OpenAI
CLIP; the open-clip-torch wheel carries it). The small result is committed; the large file is needed only to cut again.
"""

from __future__ import annotations

import gzip
import itertools
from collections.abc import Iterable
from pathlib import Path

from transformers import CLIPTokenizer

from .scenes import WORDS

MAX_LENGTH = 24
START, END = "<|startoftext|>", "<|endoftext|>"
Merge = tuple[str, str]


def read_merges(path: Path) -> list[Merge]:
    """The 48,894 merges of the real tokenizer, in order of rank."""
    lines = gzip.decompress(path.read_bytes()).decode("utf-8").split("\n")
    return [(a, b) for a, b in (line.split() for line in lines[1 : 49152 - 256 - 2 + 1])]


def needed(words: Iterable[str], merges: list[Merge]) -> list[Merge]:
    """The merges that the real tokenizer applies on its way to each of the words."""
    rank = {m: i for i, m in enumerate(merges)}
    used: set[Merge] = set()
    for word in words:
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            pairs = list(itertools.pairwise(parts))
            best = min(range(len(pairs)), key=lambda i: rank.get(pairs[i], len(rank)))
            if pairs[best] not in rank:
                break
            used.add(pairs[best])
            parts[best : best + 2] = ["".join(pairs[best])]
    return sorted(used, key=rank.__getitem__)


def byte_symbols() -> list[str]:
    """CLIP's printable stand-ins for the 256 bytes, in its order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    rest = [b for b in range(256) if b not in printable]
    return [chr(b) for b in printable] + [chr(256 + i) for i in range(len(rest))]


def cut(merges: list[Merge], words: Iterable[str] = WORDS, max_length: int = MAX_LENGTH) -> CLIPTokenizer:
    """A CLIPTokenizer over bytes and the needed merges only. (transformers 5 silently breaks on ``vocab_file=``.)"""
    kept, symbols = needed(words, merges), byte_symbols()
    tokens = symbols + [s + "</w>" for s in symbols] + ["".join(m) for m in kept] + [START, END]
    return CLIPTokenizer(
        vocab={t: i for i, t in enumerate(tokens)},
        merges=kept,
        bos_token=START,
        eos_token=END,
        unk_token=END,
        pad_token=END,
        model_max_length=max_length,
    )


def make(folder: Path, bpe: Path) -> None:
    """Cut the vocabulary file ``bpe`` and save the tokenizer."""
    cut(read_merges(bpe)).save_pretrained(folder)
