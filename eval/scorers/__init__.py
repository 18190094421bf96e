"""Scorers: one file each, found by file name. Listing them reads the files and imports no torch.

A scorer's file holds a literal ``SCORERS`` (name -> :class:`About`'s fields) and one subclass of ``_base.Scorer``.
"""

from __future__ import annotations

import ast
import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING

from ...errors import UserError, nearest

if TYPE_CHECKING:
    from ._base import Scored, Scorer

__all__ = ["About", "Scored", "Scorer", "list_scorers", "load_scorer", "load_scorers", "parse_scorers"]

# Classes that this package hands on without importing torch before they are asked for.
CLASSES = {"Scorer": "_base", "Scored": "_base", "Clip": "clip", "PickScore": "pickscore", "HPS": "hps"}
CLASSES |= {"ImageReward": "imagereward", "Aesthetic": "aesthetic", "OpenClip": "openclip"}
# Scorers that people ask for and that their packages keep out.
ABSENT = {
    "hpsv3": "its package (hpsv3 1.0.0) needs transformers==4.45.2, diffalign 4.57 or newer",
    "vqascore": "its package (t2v-metrics 3.0) needs torch==2.5.1 and transformers==4.49.0",
}


@dataclass(frozen=True)
class About:
    """What a listing says about a scorer. ``weights`` None: a path has to be given, as ``name=path``."""

    name: str
    module: str
    about: str
    weights: str | None = None
    band: tuple[float, float] | None = None  # set means outside it hint at a wrong pairing or a wrong scale


def __getattr__(name: str) -> object:
    if name in CLASSES:
        return getattr(importlib.import_module(f"{__name__}.{CLASSES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@cache
def list_scorers() -> dict[str, About]:
    """Every scorer by name, read from the ``SCORERS`` literal of each file of this folder."""
    found: dict[str, About] = {}
    for file in sorted(resources.files(__name__).iterdir(), key=lambda f: f.name):
        if not file.name.endswith(".py") or file.name.startswith("_"):
            continue
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            target = node.target if isinstance(node, ast.AnnAssign) else None
            if (
                isinstance(target, ast.Name)
                and target.id == "SCORERS"
                and isinstance(node, ast.AnnAssign)
                and node.value
            ):
                for name, fields in ast.literal_eval(node.value).items():
                    found[name] = About(name, file.name[:-3], **fields)
    return found


def parse_scorers(names: str | Sequence[str]) -> dict[str, str | None]:
    """``"oracle,pickscore=/models/pick"`` or a list of such -> {name: path or None}, in order.

    Raises UserError for an unknown name, a name that comes twice, or none at all."""
    parts = names.split(",") if isinstance(names, str) else [part for text in names for part in text.split(",")]
    known = list_scorers()
    result: dict[str, str | None] = {}
    for part in (p.strip() for p in parts):
        name, _, path = part.partition("=")
        if not part:
            continue
        if name in ABSENT:
            raise UserError(f"scorer '{name}' cannot run here: {ABSENT[name]}; score in its own environment")
        if name not in known:
            raise UserError(f"unknown scorer '{name}'{nearest(name, known)}")
        if name in result:
            raise UserError(f"scorer '{name}' is given twice; name each once")
        result[name] = path or None
    if not result:
        raise UserError(f"no scorer given; choose from {', '.join(known)}")
    return result


def load_scorer(name: str, path: str | None = None, device: str = "auto", dtype: str = "auto") -> Scorer:
    """A scorer by name, ready to be called.

    Args:
        name: one of :func:`list_scorers`, or ``name=path``.
        path: a folder or hub id with its weights; None takes the scorer's own.
        device: auto | cuda | mps | cpu.
        dtype: of the towers: auto (fp16 on CUDA, fp32 elsewhere) | fp32 | bf16 | fp16. Scores always end in fp32.

    Raises:
        UserError: unknown name, or weights that are missing or of another architecture.
    """
    from ._base import Scorer

    ((name, given),) = parse_scorers(name).items()
    about = list_scorers()[name]
    module = importlib.import_module(f"{__name__}.{about.module}")
    classes = [c for c in vars(module).values() if isinstance(c, type) and issubclass(c, Scorer)]
    own = next(c for c in classes if c.__module__ == module.__name__)
    return own.from_pretrained(path or given, device=device, dtype=dtype, name=name)


def load_scorers(names: str | Sequence[str], device: str = "auto", dtype: str = "auto") -> list[Scorer]:
    """:func:`load_scorer` for a list such as ``"oracle,clip_l14"``; names are checked before any weights are read."""
    return [load_scorer(name, path, device, dtype) for name, path in parse_scorers(names).items()]
