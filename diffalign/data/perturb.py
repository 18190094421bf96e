"""Captions made worse by fixed rules: DCPO's perturbation where no language model is at hand, ours.

A share of the words is changed: 40, 60 or 80 % (weak, medium, strong: the lexical diversity that DCPO asks of its
paraphraser). Words are never reordered (its order diversity is 0). A word of `GROUPS` becomes another of its group, a
filler goes, any other word goes or becomes one of `GENERAL`, by a coin. Which words are changed follows from (seed,
text) alone, and a weaker level changes some of the words that a stronger one does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ..keyed import generator

LEVELS = {"weak": 0.4, "medium": 0.6, "strong": 0.8}
# Words that can stand for one another and say something else.
GROUPS: tuple[tuple[str, ...], ...] = tuple(
    tuple(line.split())
    for line in (
        "red green blue yellow purple cyan",
        "black white grey brown orange pink",
        "circle square triangle cross",
        "sphere cube cone cylinder pyramid",
        "above below",
        "over under",
        "left right",
        "front back",
        "inside outside",
        "two three four five six",
        "one many several no",
        "man woman boy girl",
        "men women boys girls",
        "cat dog horse bird fish rabbit",
        "cats dogs horses birds rabbits",
        "tree flower bush rock",
        "house castle tower bridge",
        "car bus train boat bicycle",
        "small large tiny huge",
        "old young new ancient",
        "day night morning evening",
        "sunny rainy snowy foggy",
        "summer winter spring autumn",
        "beach forest desert city mountain",
        "photo painting drawing sketch",
        "photograph illustration render",
        "bright dark",
        "happy sad angry calm",
        "standing sitting running sleeping",
        "wooden metal glass stone",
    )
)
FILLERS = {"a", "an", "the", "of", "in", "on", "at", "and", "with", "by", "to", "for", "from", "is", "are", "it", "its"}
FILLERS |= {"this", "that", "very"}
GENERAL = ("something", "object", "figure", "thing", "scene", "place", "shape", "view", "item", "part")
_GROUP = {word: group for group in GROUPS for word in group}


def perturb(text: str, share: float, seed: int = 0) -> str:
    """The text with ``share`` (0 to 1) of its words changed; 0 gives it back as it is.

    Of n words round(share n) are changed, at least one and, of several, at most n - 1. What a word becomes does not
    occur in the text, so that the word edit distance to it is just that number: it rises with the share."""
    words = text.split()
    if share <= 0 or not words:
        return text
    count = min(max(1, math.floor(share * len(words) + 0.5)), max(1, len(words) - 1))
    rng = generator(seed, "perturb", text)
    order = rng.permutation(len(words)).tolist()
    own = {_core(word) for word in words}
    # one draw a word whatever the share, so that a word becomes the same at every level
    choices = {position: _other(words[position], own, rng.random(2)) for position in order}
    for position in order[:count]:
        found = choices[position]
        words[position] = _general(own, 0.0) if found is None and len(words) == 1 else found or ""
    return " ".join(word for word in words if word)


def _core(word: str) -> str:
    return word.lower().strip(".,;:!?\"'()[]")


def _other(word: str, own: set[str], coins: np.ndarray) -> str | None:
    """What a word becomes; None: it goes."""
    core = _core(word)
    free = [other for other in _GROUP.get(core, ()) if other not in own]
    if free:
        return _dressed(word, core, _pick(free, float(coins[1])))
    if core in FILLERS or coins[0] < 0.5:
        return None
    return _dressed(word, core, _general(own, float(coins[1])))


def _general(own: set[str], coin: float) -> str:
    return _pick([word for word in GENERAL if word not in own] or ["..."], coin)


def _pick(words: Sequence[str], coin: float) -> str:
    return words[min(int(coin * len(words)), len(words) - 1)]


def _dressed(word: str, core: str, other: str) -> str:
    """``other`` with the capital and the punctuation of ``word``."""
    at = word.lower().find(core)
    new = other.capitalize() if word[at : at + 1].isupper() else other
    return word[:at] + new + word[at + len(core) :]
