"""What makes a result of ``diffalign bench methods``, as short hashes."""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import sys
from functools import cache
from importlib import resources
from pathlib import Path
from types import ModuleType
from typing import Any

from .. import denoiser
from ..methods import method_class, method_config
from ..recipe import Recipe
from . import judge, method_job, units
from .judge import ASSETS

FORMAT = 1  # of a result
SHARED = {"diffalign.methods.base", "diffalign.methods", "diffalign.methods.index"}  # the contract: no mathematics
UNSEEN = ("name", "description", "output", "validate")  # sections that change no weight of a result
BY_BUDGET = ("steps", "save_every")  # of the training: what the budget sets, whatever the recipe says


def job_key(recipe: Recipe | None, seed: int, budget: int, prompts: int | None, model: str) -> str:
    """12 hex digits of recipe (None: the base), seed, budget, prompts and the shipped files that are read."""
    made: dict[str, Any] = {"prompts": prompts, "assets": [asset_hash(name) for name in (model, *ASSETS)]}
    if recipe is not None:
        made["recipe"] = chosen(recipe)
        made |= {"format": FORMAT, "seed": seed, "budget": budget, "data": asset_hash(recipe.data.path)}
    return hashlib.sha256(json.dumps(made, sort_keys=True).encode()).hexdigest()[:12]


def chosen(recipe: Recipe) -> dict[str, Any]:
    """The settings that a recipe chooses: without those at their defaults, so that a new option changes no key."""
    made: dict[str, Any] = recipe.model_dump(mode="json", by_alias=True, exclude_defaults=True)
    options = {name: value for name, value in recipe.method.model_dump().items() if name != "name"}
    settings = method_config(recipe.method.name).model_validate(options)
    made["train"] = {name: value for name, value in made.get("train", {}).items() if name not in BY_BUDGET}
    made["method"] = {"name": recipe.method.name, **settings.model_dump(mode="json", exclude_defaults=True)}
    return {name: section for name, section in made.items() if name not in UNSEEN}


def job_code(recipe: Recipe | None, *further: ModuleType) -> str:
    """12 hex digits of the code: the method's with its parents', the denoiser's, the bench's own and ``further``."""
    if recipe is None:
        return code_hash(judge)
    return code_hash(judge, method_job, units, denoiser, *method_modules_of(recipe.method.name), *further)


def method_modules_of(name: str) -> list[ModuleType]:
    """The modules that a method's mathematics is in: its own, and those of methods that it takes anything from."""
    waiting, found = [method_class(name).__module__], {}  # type: list[str], dict[str, ModuleType]
    while waiting:
        module = sys.modules[waiting.pop()]
        found[module.__name__] = module
        homes = {getattr(value, "__module__", None) for value in vars(module).values()}
        waiting += [
            home
            for home in homes
            if isinstance(home, str) and home.startswith("diffalign.methods.") and home not in {*found, *SHARED}
        ]
    return [found[name] for name in sorted(found)]


@cache
def code_hash(*modules: ModuleType) -> str:
    """Of what the modules do: comments, docstrings and layout do not count."""
    digest = hashlib.sha256()
    for module in modules:
        tree = ast.parse(inspect.getsource(module))
        for node in ast.walk(tree):
            body = getattr(node, "body", None)
            first = body[0] if isinstance(body, list) and body else None
            value = first.value if isinstance(first, ast.Expr) else None
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                value.value = ""  # a docstring
        digest.update(ast.dump(tree).encode())
    return digest.hexdigest()[:12]


@cache
def asset_hash(name: str) -> str:
    """Of the files of a shipped asset, or of a path; of the name alone where there is no such file."""
    shipped = Path(str(resources.files("diffalign.assets"))) / name
    place = shipped if shipped.exists() else Path(name).expanduser()
    files = [place] if place.is_file() else sorted(file for file in place.rglob("*") if file.is_file())
    digest = hashlib.sha256(name.encode())
    for file in files:
        if "__pycache__" not in file.parts:
            digest.update(file.relative_to(place).as_posix().encode() + file.read_bytes())
    return digest.hexdigest()[:16]
