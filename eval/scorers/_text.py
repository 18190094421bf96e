"""Text for CLIP: OpenCLIP's cleaning, and the full CLIP vocabulary for checkpoints that come without a tokenizer."""

from __future__ import annotations

import gzip
import html
from functools import cache
from importlib import resources
from pathlib import Path

from transformers import CLIPTokenizer

VOCABULARY = "bpe_simple_vocab_16e6.txt.gz"  # OpenAI's, MIT; sha256 924691ac...6804a
MERGES = 49152 - 256 - 2
START, END = "<start_of_text>", "<end_of_text>"  # as OpenCLIP writes them


def openclip_clean(text: str) -> str:
    """What OpenAI's and OpenCLIP's tokenizers do to a prompt first: repaired Unicode (curly quotes become straight,
    full-width letters narrow), HTML entities resolved twice, single spaces, lower case."""
    import ftfy

    return " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split()).lower()


@cache
def clip_tokenizer(max_length: int = 77) -> CLIPTokenizer:
    """CLIP's 49,408 tokens from the shipped merges: 256 bytes, the same at the end of a word, merges, start and end."""
    raw = resources.files(__package__).joinpath(VOCABULARY).read_bytes()
    lines = gzip.decompress(raw).decode("utf-8").split("\n")[1 : MERGES + 1]
    merges = [(a, b) for a, b in (line.split() for line in lines)]
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    symbols = [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    tokens = [*symbols, *(s + "</w>" for s in symbols), *(a + b for a, b in merges), START, END]
    return CLIPTokenizer(
        vocab={token: i for i, token in enumerate(tokens)},
        merges=merges,
        bos_token=START,
        eos_token=END,
        unk_token=END,
        pad_token=END,
        model_max_length=max_length,
    )


def load_tokenizer(folder: Path | None, max_length: int) -> CLIPTokenizer:
    """The tokenizer of a folder, or CLIP's own where there is none."""
    if folder is not None and any((folder / n).is_file() for n in ("tokenizer.json", "vocab.json")):
        return CLIPTokenizer.from_pretrained(folder)
    return clip_tokenizer(max_length)
