"""What there is: methods, recipes, scorers, prompts."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from .common import AsJson, app, out, print_rows


@app.command()
def methods(as_json: AsJson = False) -> None:
    """The methods that can be trained."""
    from ..methods import list_methods

    print_rows(list_methods(), ["name", "group", "needs", "arxiv", "title"], as_json)


@app.command()
def recipes(as_json: AsJson = False) -> None:
    """The built-in recipes."""
    from ..recipe import builtin_recipes, describe_recipe

    print_rows([{"name": n, "about": describe_recipe(n)} for n in builtin_recipes()], ["name", "about"], as_json)


@app.command()
def scorers(as_json: AsJson = False) -> None:
    """The scorers of the eval suite."""
    from ..eval.scorers import list_scorers

    print_rows([{"name": s.name, "about": s.about} for s in list_scorers().values()], ["name", "about"], as_json)


@app.command()
def prompts(
    source: Annotated[str | None, typer.Argument(help="A set or a prompt file: what it holds.")] = None,
    as_json: AsJson = False,
) -> None:
    """The built-in prompt sets; or one set or file: categories, counts and hash."""
    from ..eval.prompts import builtin_sets, describe_set

    if source is not None:
        found = describe_set(source)
        print(json.dumps(found.json(), indent=1)) if as_json else found.render(out())
        return
    rows = [describe_set(name).json() for name in sorted(builtin_sets())]
    if not as_json:
        rows = [{**row, "categories": f"{len(row['categories'])} categories"} for row in rows]  # type: ignore[arg-type]
    print_rows(rows, ["name", "prompts", "categories", "sha256"], as_json)
