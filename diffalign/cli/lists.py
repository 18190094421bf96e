"""What there is: methods, recipes, scorers, prompts."""

from __future__ import annotations

from .common import AsJson, app, print_rows


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
def prompts(as_json: AsJson = False) -> None:
    """The built-in prompt sets."""
    from ..eval.prompts import builtin_sets, read_prompts

    rows = [{"name": name, "prompts": len(read_prompts(name))} for name in sorted(builtin_sets())]
    print_rows(rows, ["name", "prompts"], as_json)
