"""diffalign: align and distil text-to-image diffusion models, and judge the result.

>>> import diffalign
>>> run = diffalign.train("tiny/dpo", steps=50)
>>> run.curve("accuracy"), run.pipeline()

Nothing heavy is imported before a function is called.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .recipe import Recipe
    from .run import Run

__version__ = "0.1.0"
__all__ = ["list_methods", "list_recipes", "load_recipe", "open_run", "train"]


def train(
    recipe: str | Path | Recipe,
    overrides: Sequence[str] = (),
    *,
    resume: str = "auto",
    progress: bool = True,
    **values: Any,
) -> Run:
    """Train a recipe and return the run.

    Args:
        recipe: a built-in name such as ``"sd15/dpo"``, a YAML file, or a Recipe.
        overrides: ``["train.steps=200"]`` as on the command line.
        resume: ``auto`` goes on from the newest checkpoint of the output folder, ``never`` refuses to, or a path.
        progress: show how far it is.
        values: overrides as keywords: ``steps=50``, ``beta=2000``, ``train={"lr": 1e-5}``.

    Raises:
        diffalign.errors.UserError: wrong input, in one line.
        diffalign.errors.RunError: a failure while running; says what was saved.
    """
    from .run import train as run_recipe

    return run_recipe(load_recipe(recipe, overrides, **values), resume, progress)


def load_recipe(recipe: str | Path | Recipe, overrides: Sequence[str] = (), **values: Any) -> Recipe:
    """A recipe with overrides, checked; see ``train`` for the arguments."""
    from .recipe import load_recipe as load

    return load(recipe, list(overrides), **values)


def open_run(folder: str | Path) -> Run:
    """An earlier run by its folder."""
    from .run import Run

    return Run.open(folder)


def list_methods() -> list[dict[str, Any]]:
    """The methods with their papers, needs and options."""
    from .methods import list_methods as listing

    return listing()


def list_recipes() -> list[str]:
    """Names of the built-in recipes."""
    from .recipe import builtin_recipes

    return builtin_recipes()
