"""Near misses: scenes and pictures that almost fit a caption. Clean near misses stay inside the training split."""

from __future__ import annotations

import numpy as np
import torch
from diffusers import AutoencoderKL

from . import scenes
from .common import to_signed, to_tensor, to_uint8
from .scenes import COLOURS, SHAPES, Scene, Thing
from .train_oracle import soften


def _other(options: tuple[str, ...], than: str, rng: np.random.Generator) -> str:
    return str(rng.choice([o for o in options if o != than]))


def change_thing(thing: Thing, rng: np.random.Generator) -> Thing:
    """Another colour or another shape."""
    colour, shape = thing
    return (_other(COLOURS, colour, rng), shape) if rng.random() < 0.5 else (colour, _other(SHAPES, shape, rng))


#: shares of the nine kinds of near misses of two objects, see :func:`_one_miss`
KINDS = (0.2, 0.15, 0.15, 0.1, 0.1, 0.1, 0.05, 0.05, 0.1)
#: the same with the order turned more often: what tiny-sd gets wrong most
ORDER_KINDS = (0.2, 0.1, 0.1, 0.25, 0.08, 0.08, 0.04, 0.05, 0.1)


def near_miss(scene: Scene, rng: np.random.Generator, kinds: tuple[float, ...] = KINDS) -> Scene:
    """A different scene of the training split: attributes changed, copied or swapped, order or axis turned, an object
    missing or added."""
    for _ in range(100):
        miss = _one_miss(scene, rng, kinds)
        if miss != scene and miss.first != miss.second and not miss.heldout:
            return miss
    return Scene(change_thing(scene.first, rng))


def _one_miss(scene: Scene, rng: np.random.Generator, kinds: tuple[float, ...]) -> Scene:
    a, b = scene.first, scene.second
    if b is None:
        if rng.random() < 0.8:
            return Scene(change_thing(a, rng))
        return Scene(a, str(rng.choice(list(scenes.PHRASES))), change_thing(a, rng))
    axis, kind = scene.axis, rng.choice(9, p=kinds)
    if kind == 0:  # one attribute changed
        return Scene(change_thing(a, rng), axis, b) if rng.random() < 0.5 else Scene(a, axis, change_thing(b, rng))
    if kind == 1:  # colours swapped
        return Scene((b[0], a[1]), axis, (a[0], b[1]))
    if kind == 2:  # shapes swapped
        return Scene((a[0], b[1]), axis, (b[0], a[1]))
    if kind == 3:  # order turned
        return Scene(b, axis, a)
    if kind == 4:  # one colour leaks to both
        return Scene((b[0], a[1]), axis, b) if rng.random() < 0.5 else Scene(a, axis, (a[0], b[1]))
    if kind == 5:  # one shape leaks to both
        return Scene((a[0], b[1]), axis, b) if rng.random() < 0.5 else Scene(a, axis, (b[0], a[1]))
    if kind == 6:  # axis turned
        return Scene(a, "horizontal" if axis == "vertical" else "vertical", b)
    if kind == 7:  # one object missing
        return Scene(a if rng.random() < 0.5 else b)
    return Scene(change_thing(a, rng), axis, change_thing(b, rng))


def random_blend(count: int, rng: np.random.Generator) -> np.ndarray:
    """Strengths (N, 2, 2) for :func:`scenes.paint`: one or both objects take colour and/or outline of the other."""
    strength = rng.uniform(0.4, 0.8, (count, 2, 2))
    on = rng.random((count, 2, 2)) < 0.4
    on[~on.any((1, 2)), 0, 0] = True
    return strength * on


def worn(images: np.ndarray, vae: AutoencoderKL, rng: np.random.Generator) -> torch.Tensor:
    """Drawings as an imperfect generator would show them: two of three through the autoencoder with noise on the
    latents, then noise and blur. uint8 (N, 32, 32, 3) -> float (N, 3, 32, 32) in about -1..1."""
    x = to_signed(to_tensor(images))
    through = torch.from_numpy(rng.random(len(x)) < 0.67)
    with torch.no_grad():
        z = vae.encode(x[through]).latent_dist.mean
        level = torch.from_numpy(rng.uniform(0, 0.3, (len(z), 1, 1, 1)).astype(np.float32))
        x[through] = vae.decode(z + level / vae.config.scaling_factor * torch.randn_like(z)).sample
    return to_signed(to_uint8(soften(x, rng, noise=0.08)))


def blended(good: np.ndarray, bad: np.ndarray, vae: AutoencoderKL, rng: np.random.Generator) -> np.ndarray:
    """Decoded mixtures of the latents of two pictures, 50 to 100 % bad. uint8 (N, 32, 32, 3) both and out."""
    share = torch.from_numpy(rng.uniform(0.5, 1.0, (len(good), 1, 1, 1)).astype(np.float32))
    with torch.no_grad():
        z, w = (vae.encode(to_signed(to_tensor(i))).latent_dist.mean for i in (good, bad))
        mixed = vae.decode(z + share * (w - z)).sample
    return to_uint8(mixed).permute(0, 2, 3, 1).numpy()
