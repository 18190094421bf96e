"""Methods, found by file name; one outside the package through the entry-point group ``diffalign.methods``."""

from __future__ import annotations

import importlib
import json
from importlib import metadata, resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError, nearest

if TYPE_CHECKING:
    from .base import Method, MethodConfig

GROUPS = ("preference", "distillation", "online")
ENTRY_POINTS = "diffalign.methods"


def method_modules() -> dict[str, str]:
    """Method name -> module path of the methods in this package, read from the file names alone."""
    here = Path(__file__).parent
    return {
        file.stem: f"{__name__}.{group}.{file.stem}"
        for group in GROUPS
        for file in sorted((here / group).glob("*.py"))
        if not file.stem.startswith("_")
    }


def list_methods() -> list[dict[str, Any]]:
    """What ``diffalign methods`` shows, from ``index.json`` (made by ``make index``): no method is imported.

    Plug-ins are listed by name."""
    rows: list[dict[str, Any]] = json.loads(resources.files(__name__).joinpath("index.json").read_text())
    known = {row["name"] for row in rows}
    rows += [
        {"name": point.name, "group": "plug-in", "title": point.value, "arxiv": "", "needs": "", "options": {}}
        for point in metadata.entry_points(group=ENTRY_POINTS)
        if point.name not in known
    ]
    return rows


def method_class(name: str) -> type[Method[Any]]:
    """The class of a method.

    Raises UserError for an unknown name, with the nearest known one."""
    from .base import Method

    modules = method_modules()
    points = {point.name: point for point in metadata.entry_points(group=ENTRY_POINTS)}
    if name in points and name not in modules:
        found = points[name].load()
    elif name in modules:
        module = importlib.import_module(modules[name])
        found = next(
            (
                value
                for value in vars(module).values()
                if isinstance(value, type) and issubclass(value, Method) and value.__module__ == module.__name__
            ),
            None,
        )
    else:
        raise UserError(f"unknown method '{name}'{nearest(name, {*modules, *points})}")
    if not (isinstance(found, type) and issubclass(found, Method)):
        raise UserError(f"method '{name}' defines no subclass of diffalign.methods.base.Method; see docs/methods.md")
    return found


def method_config(name: str) -> type[MethodConfig]:
    """The settings class of a method."""
    return method_class(name).Config


def make_method(name: str, options: dict[str, Any]) -> Method[Any]:
    """A method with its settings checked."""
    cls = method_class(name)
    return cls(cls.Config.model_validate(options))
