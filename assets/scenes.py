"""The drawn world: captioned scenes of one or two coloured shapes, 32x32 RGB.

A caption names colours, shapes and (for two objects) their layout. Size, position jitter, tint and the light or dark
background are *free*: no caption speaks of them. About 15 % of the two-object combinations
(top/left object, axis, bottom/right object) are held out by a hash: they are in no training caption of any model.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

SIZE = 32
PALETTE: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "green": (40, 175, 60),
    "blue": (50, 80, 225),
    "yellow": (240, 210, 40),
    "purple": (150, 60, 200),
    "cyan": (60, 205, 215),
}
COLOURS = tuple(PALETTE)
SHAPES = ("circle", "square", "triangle", "cross")
LAYOUTS = ("single", "vertical", "horizontal")
#: phrase of each axis when the top/left object is named first, and when it is named last
PHRASES = {"vertical": ("above", "below"), "horizontal": ("left of", "right of")}
HELDOUT_PERCENT = 15
WORDS = ("a", *COLOURS, *SHAPES, "above", "below", "left", "right", "of")

Thing = tuple[str, str]  # (colour, shape)


@dataclass(frozen=True)
class Scene:
    """One object (``second`` is None, axis "single") or two; ``first`` is the top or the left one."""

    first: Thing
    axis: str = "single"
    second: Thing | None = None

    @property
    def heldout(self) -> bool:
        """True for two-object combinations that no training caption or pair may contain."""
        if self.second is None:
            return False
        key = f"{' '.join(self.first)}|{self.axis}|{' '.join(self.second)}"
        return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") % 100 < HELDOUT_PERCENT


def caption(scene: Scene, phrasing: int = 0) -> str:
    """Phrasing 0 names the top/left object first, phrasing 1 last; single objects have one phrasing."""
    first = "a " + " ".join(scene.first)
    if scene.second is None:
        return first
    second, words = "a " + " ".join(scene.second), PHRASES[scene.axis]
    return f"{second} {words[1]} {first}" if phrasing else f"{first} {words[0]} {second}"


def parse(prompt: str) -> Scene | None:
    """The scene that a caption asks for, or None if the text is not one of this world's captions."""
    words = prompt.lower().replace(".", " ").replace(",", " ").split()
    thing, rest = _thing(words)
    if thing is None:
        return None
    if not rest:
        return Scene(thing)
    for axis, phrases in PHRASES.items():
        for reverse, phrase in enumerate(phrases):
            link = phrase.split()
            if rest[: len(link)] == link:
                other, tail = _thing(rest[len(link) :])
                if other is None or tail or other == thing:
                    return None
                return Scene(other, axis, thing) if reverse else Scene(thing, axis, other)
    return None


def _thing(words: list[str]) -> tuple[Thing | None, list[str]]:
    if len(words) >= 3 and words[0] == "a" and words[1] in COLOURS and words[2] in SHAPES:
        return (words[1], words[2]), words[3:]
    return None, words


def things() -> list[Thing]:
    return list(itertools.product(COLOURS, SHAPES))


def single_scenes() -> list[Scene]:
    return [Scene(t) for t in things()]


def pair_scenes(heldout: bool | None = None) -> list[Scene]:
    """All two-object scenes (None), only the held-out ones (True) or only those for training (False)."""
    scenes = [Scene(a, axis, b) for a, axis, b in itertools.product(things(), PHRASES, things()) if a != b]
    return [s for s in scenes if heldout is None or s.heldout == heldout]


def single_prompts() -> list[str]:
    return [caption(s) for s in single_scenes()]


def heldout_prompts() -> list[str]:
    """Both phrasings of every held-out combination, in an order that mixes them (deterministic)."""
    prompts = [caption(s, p) for s in pair_scenes(heldout=True) for p in (0, 1)]
    return sorted(prompts, key=lambda text: hashlib.sha256(text.encode()).digest())


def training_prompts() -> list[str]:
    """Single-object captions and both phrasings of the two-object combinations for training."""
    return single_prompts() + [caption(s, p) for s in pair_scenes(heldout=False) for p in (0, 1)]


def sample_scenes(count: int, rng: np.random.Generator, two: float = 0.7, heldout: bool | None = False) -> list[Scene]:
    """Random scenes, a share ``two`` of them with two objects. ``heldout`` as in :func:`pair_scenes`."""
    singles, pairs = single_scenes(), pair_scenes(heldout)
    return [(pairs if pick < two else singles)[_index(rng, pick < two, pairs, singles)] for pick in rng.random(count)]


def _index(rng: np.random.Generator, is_pair: bool, pairs: list[Scene], singles: list[Scene]) -> int:
    return int(rng.integers(len(pairs) if is_pair else len(singles)))


def labels(scenes: Sequence[Scene]) -> np.ndarray:
    """(N, 5) int64: layout, colour and shape of the first, colour and shape of the second (-100 where absent)."""
    out = np.full((len(scenes), 5), -100, np.int64)
    for row, s in zip(out, scenes, strict=True):
        row[:3] = LAYOUTS.index(s.axis), COLOURS.index(s.first[0]), SHAPES.index(s.first[1])
        if s.second is not None:
            row[3:] = COLOURS.index(s.second[0]), SHAPES.index(s.second[1])
    return out


@dataclass(frozen=True)
class Look:
    """The free attributes of N drawings. ``dark`` (N,) bool; ``back`` (N,) grey in 0..1; ``size`` (N, 2) in 0..1;
    ``shift`` (N, 2 objects, 2 axes) in -1..1; ``tint`` (N, 2, 3)."""

    dark: np.ndarray
    back: np.ndarray
    size: np.ndarray
    shift: np.ndarray
    tint: np.ndarray


def draw_look(count: int, rng: np.random.Generator) -> Look:
    dark = rng.random(count) < 0.5
    back = np.where(dark, rng.uniform(0.0, 0.2, count), rng.uniform(0.8, 1.0, count))
    shift, tint = rng.uniform(-1, 1, (count, 2, 2)), rng.uniform(-0.05, 0.05, (count, 2, 3))
    return Look(dark, back, rng.random((count, 2)), shift, tint)


def _distance(shape: np.ndarray, x: np.ndarray, y: np.ndarray, r: np.ndarray) -> np.ndarray:
    """Signed distance (negative inside) of shapes (N,) at centred coordinates (N, H, W) with radius (N, 1, 1)."""
    out = np.empty_like(x)
    for kind, name in enumerate(SHAPES):
        m = shape == kind
        ax, ay, yy, rr = np.abs(x[m]), np.abs(y[m]), y[m], r[m]
        if name == "circle":
            out[m] = np.hypot(ax, ay) - rr
        elif name == "square":
            out[m] = np.maximum(ax, ay) - 0.88 * rr
        elif name == "triangle":
            out[m] = np.maximum(yy - 0.75 * rr, 0.894 * ax - 0.447 * yy - 0.469 * rr)
        else:
            out[m] = np.minimum(np.maximum(ax - 0.34 * rr, ay - rr), np.maximum(ay - 0.34 * rr, ax - rr))
    return out


def paint(codes: np.ndarray, look: Look, blend: np.ndarray | None = None) -> np.ndarray:
    """Draw scene codes (N, 5) of :func:`labels` with the given look: uint8 (N, 32, 32, 3).

    ``blend`` (N, 2, 2) in 0..1 mixes colour (``[:, k, 0]``) and outline (``[:, k, 1]``) of object k with the other
    object's: the "merged" pictures that imperfect generators make. None draws clean scenes.
    """
    n = len(codes)
    axis, two = codes[:, 0], codes[:, 0] > 0
    colour, shape = np.maximum(codes[:, [1, 3]], 0), np.maximum(codes[:, [2, 4]], 0)
    rgb = np.array(list(PALETTE.values()))[colour] / 255 + look.tint
    yy, xx = np.meshgrid(np.arange(SIZE) + 0.5, np.arange(SIZE) + 0.5, indexing="ij")
    image = np.broadcast_to(look.back[:, None, None, None], (n, SIZE, SIZE, 3)).copy()
    for k in range(2):
        r = np.where(two, 4.5 + 2.5 * look.size[:, k], 6 + 5 * look.size[:, k])
        room = 0.4 * (SIZE - 2 * r - 2)  # how far a single object may leave the centre
        slot = 8 if k == 0 else 24
        cx = np.where(axis == 2, slot, 16) + look.shift[:, k, 0] * np.choose(axis, [room, 4 + 0 * room, 1 + 0 * room])
        cy = np.where(axis == 1, slot, 16) + look.shift[:, k, 1] * np.choose(axis, [room, 1 + 0 * room, 4 + 0 * room])
        x, y = xx - cx[:, None, None], yy - cy[:, None, None]
        fill, inside = rgb[:, k], _distance(shape[:, k], x, y, r[:, None, None])
        if blend is not None:
            fill = fill + blend[:, k, :1] * (rgb[:, 1 - k] - fill)
            other = _distance(shape[:, 1 - k], x, y, r[:, None, None])
            inside = inside + blend[:, k, 1, None, None] * (other - inside)
        alpha = np.clip(0.5 - inside, 0, 1)[..., None]
        if k == 1:
            alpha = alpha * two[:, None, None, None]
        image = image * (1 - alpha) + np.clip(fill, 0, 1)[:, None, None] * alpha
    return (np.clip(image, 0, 1) * 255).round().astype(np.uint8)


def render(scenes: Sequence[Scene], rng: np.random.Generator) -> np.ndarray:
    """Drawings of the scenes with random free attributes: uint8 (N, 32, 32, 3)."""
    return paint(labels(scenes), draw_look(len(scenes), rng))


def random_captions(scenes: Sequence[Scene], rng: np.random.Generator) -> list[str]:
    """One caption a scene, phrasing by coin."""
    return [caption(s, int(p)) for s, p in zip(scenes, rng.integers(0, 2, len(scenes)), strict=True)]
