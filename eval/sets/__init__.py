"""Metrics of a whole set of pictures: one file each, found by file name. Listing them imports no torch.

A file holds a literal ``SETS`` (name -> :class:`AboutSet`'s fields) and one subclass of ``_base.SetMetric``."""

from __future__ import annotations

import ast
import importlib
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING

from ...errors import UserError, nearest

if TYPE_CHECKING:
    from ._base import SetMetric

__all__ = ["AboutSet", "list_sets", "load_set"]


@dataclass(frozen=True)
class AboutSet:
    """What a listing says. ``needs``: "reference" pictures, or "groups" (several pictures a prompt). ``extra``: what to
    install. ``weights`` None: a file has to be given, as ``name=FILE``. ``better``: high or low."""

    name: str
    module: str
    about: str
    needs: str
    better: str
    weights: str | None = None
    extra: str | None = None


@cache
def list_sets() -> dict[str, AboutSet]:
    """Every set metric by name, read from the ``SETS`` literal of each file of this folder."""
    found: dict[str, AboutSet] = {}
    for file in sorted(resources.files(__name__).iterdir(), key=lambda f: f.name):
        if not file.name.endswith(".py") or file.name.startswith("_"):
            continue
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id == "SETS":
                assert node.value is not None
                for name, fields in ast.literal_eval(node.value).items():
                    found[name] = AboutSet(name, file.name[:-3], **fields)
    return found


def load_set(name: str, path: str | None = None, device: str = "auto", dtype: str = "auto") -> SetMetric:
    """A set metric by name, or ``name=WEIGHTS``, ready to be called with pictures.

    Raises UserError for an unknown name, weights that are missing, or an extra that is not installed."""
    from ._base import SetMetric

    name, _, given = name.partition("=")
    if name not in (known := list_sets()):
        raise UserError(f"unknown set metric '{name}'{nearest(name, known)}")
    about = known[name]
    source = path or given or about.weights
    if source is None:
        raise UserError(f"set metric '{name}' needs its weights; say {name}=FILE")
    module = importlib.import_module(f"{__name__}.{about.module}")
    classes = [c for c in vars(module).values() if isinstance(c, type) and issubclass(c, SetMetric)]
    own = next(c for c in classes if c.__module__ == module.__name__)
    return own(about, source, device, dtype)
