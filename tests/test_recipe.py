"""Recipes: what ships loads and comes back; what is wrong is said in one line with the nearest name."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import diffalign
from diffalign.errors import UserError
from diffalign.methods import make_method, method_modules
from diffalign.recipe import Recipe, builtin_recipes, data_recipe, describe_recipe, known_keys, load_recipe

BUILTIN = builtin_recipes()


def refused(*overrides: str, source: str | Path = "tiny/dpo", **values: Any) -> str:
    with pytest.raises(UserError) as caught:
        load_recipe(source, list(overrides), **values)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 300
    return message


@pytest.mark.parametrize("name", BUILTIN)
def test_a_builtin_recipe_loads_and_comes_back(name: str, tmp_path: Path) -> None:
    """Through plain data, through YAML, and with its method's options checked."""
    import yaml

    recipe = load_recipe(name)
    assert recipe.name == name and recipe.description == describe_recipe(name) != ""
    assert str(recipe.output_dir()) == f"runs/{name.replace('/', '-')}"
    options = {k: v for k, v in recipe.method.model_dump().items() if k != "name"}
    config = make_method(recipe.method.name, options).config.model_dump(mode="json")
    assert {key: config[key] for key in options} == options
    assert load_recipe(recipe) == recipe
    (tmp_path / "copy.yaml").write_text(yaml.safe_dump(recipe.dump(), sort_keys=False))
    assert load_recipe(tmp_path / "copy.yaml") == recipe
    assert json.loads(json.dumps(recipe.dump())) == recipe.dump()


def test_every_method_has_a_recipe_for_a_real_model_and_the_tiny_world() -> None:
    groups = {row["name"]: row["group"] for row in diffalign.list_methods()}
    for method in method_modules():
        real = {f"sd15/{method}", f"sdxl/{method}", f"{method}/sd15"} & set(BUILTIN)
        assert len(real) == 2 if groups[method] == "distillation" else real, method
        # the shipped pairs have labels and no scores
        assert f"tiny/{method}" in BUILTIN or "chosen_score" in make_method(method, {}).needs.columns, method
    assert set(diffalign.list_recipes()) == set(BUILTIN)


def test_overrides_are_read_as_yaml() -> None:
    recipe = load_recipe(
        "tiny/dpo",
        [
            "train.lr=1e-5",
            "train.betas=[0.8,0.99]",
            "train.max_grad_norm=null",
            "model.lora.targets=[to_q,to_k]",
            "train.role_lr.student=2e-6",
            "data.flip=true",
            "validate.prompts=[a red cat, 'two: dogs']",
            "model.loras=[{path: x, scale: 0.5}]",
            "method.loss=ipo",
            "output.dir=a=b",
            "train.steps=7",
            "train.steps=8",
        ],
    )
    train = recipe.train
    assert (train.lr, train.betas, train.max_grad_norm, train.steps) == (1e-5, (0.8, 0.99), None, 8)
    assert recipe.model.lora.targets == ["to_q", "to_k"] and train.role_lr == {"student": 2e-6}
    assert recipe.data.flip is True and recipe.validate_.prompts == ["a red cat", "two: dogs"]
    assert recipe.model.loras[0].scale == 0.5 and recipe.method.model_dump()["loss"] == "ipo"
    assert recipe.output.dir == "a=b"
    assert recipe.train.batch == load_recipe("tiny/dpo").train.batch, "what is not named stays"


def test_keywords_of_a_notebook() -> None:
    recipe = diffalign.load_recipe("tiny/dpo", steps=5, beta=7, **{"train.lr": 3e-5}, data={"flip": True})
    assert (recipe.train.steps, recipe.train.lr, recipe.data.flip) == (5, 3e-5, True)
    assert recipe.method.model_dump() == {**load_recipe("tiny/dpo").method.model_dump(), "beta": 7}
    assert load_recipe(recipe, steps=6).train.steps == 6 and recipe.train.steps == 5
    assert "key of data and model" in refused(path="x")
    assert "did you mean 'validate.every'?" in refused(every=3)
    assert load_recipe("tiny/dpo", validate={"every": 3}).validate_.every == 3


UNKNOWN = {
    "train.step=5": "'train.step' in recipe 'tiny/dpo'; did you mean 'train.steps'?",
    "method.bta=5": "'method.bta' in recipe 'tiny/dpo'; did you mean 'method.beta'?",
    "model.lora.ranks=5": "did you mean 'model.lora.rank'?",
    "lr=1e-4": "'lr' in recipe 'tiny/dpo'; did you mean 'train.lr'?",
    "validate_.every=3": "did you mean 'validate'?",
    "xyz=1": "known: data, description, method, model, name, output, train, validate",
    "method.name=dpoo": "unknown method 'dpoo'; did you mean 'dpo'?",
    "model.loras=[{path: x, scael: 2}]": "'model.loras.0.scael'",
}


@pytest.mark.parametrize("override", UNKNOWN)
def test_unknown_names_get_the_nearest(override: str) -> None:
    message = refused(override)
    assert message.startswith("unknown ") and UNKNOWN[override] in message


def test_unknown_recipes_get_the_nearest() -> None:
    assert refused(source="sd15/dop") == "unknown recipe 'sd15/dop'; did you mean 'sd15/dpo'?"
    assert "did you mean 'tiny/dpo'?" in refused(source="tinydpo")
    assert "does not exist" in refused(source="nowhere.yaml")


WRONG = {
    "train.steps=abc": "'train.steps' in recipe 'tiny/dpo': input should be a valid integer",
    "train.steps=1.5": "got 1.5",
    "train.steps=0": "greater than 0, got 0",
    "train.batch=true": "'train.batch'",
    "train.steps.x=3": "'train.steps'",
    "train=5": "'train'",
    "method=dpo": "'method'",
    "train.lr=-1": "greater than 0, got -1",
    "train.lr=.nan": "'train.lr'",
    "train.lr=1e400": "finite number",
    "train.ema=1": "less than 1, got 1",
    "train.betas=[0.9]": "'train.betas.1'",
    "train.role_lr.student=0": "'train.role_lr.student'",
    "train.schedule=cosin": "'constant', 'linear' or 'cosine', got \"cosin\"",
    "train.micro_batch=99": "recipe 'tiny/dpo': train.micro_batch 99 is larger than train.batch 16",
    "train.seed=-1": "'train.seed'",
    "data.caption_dropout=1.5": "less than or equal to 1",
    "data.ties=skipp": "'skip', 'keep' or 'random'",
    "data.path=": "'data.path'",
    "model.lora.targets=5": "'model.lora.targets' in",
    "model.loras=[{scale: 2}]": "lacks 'model.loras.0.path'",
    "output.trackers=[foo]": "'output.trackers.0'",
    "method.beta=x": "'method.beta' in recipe 'tiny/dpo': input should be a valid number",
    "method.beta=-1": "greater than 0",
    "method.error_space=x": "'network' or 'epsilon'",
    "train.steps": "not of the form key.sub=value",
    "=5": "not of the form key.sub=value",
    "train.steps=[": "not valid YAML",
    "validate.prompts=['${b}']": "Interpolation key 'b' not found",
}


@pytest.mark.parametrize("override", WRONG)
def test_wrong_types_and_ranges(override: str) -> None:
    assert WRONG[override] in refused(override)


FILES = {
    "latin": (b"name: \xff\xfe", "cannot be read"),
    "list": (b"- 1", "holds no mapping"),
    "scalar": (b"5", "not valid YAML"),
    "open": (b"a: [", "not valid YAML"),
    "twice": (b"name: 1\nname: 2", "duplicate key name"),
    "empty": (b"", "lacks 'model'; set it, for example model=... (2 more)"),
    "part": (b"model: {path: x}\n", "lacks 'method'"),
}


@pytest.mark.parametrize("kind", FILES)
def test_broken_files(kind: str, tmp_path: Path) -> None:
    content, expected = FILES[kind]
    (tmp_path / "r.yaml").write_bytes(content)
    assert expected in refused(source=tmp_path / "r.yaml")


def test_a_file_takes_its_name_and_overrides(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("model: {path: m}\nmethod: {name: sft}\ndata: {path: d}\n")
    recipe = load_recipe(file, ["train.lr=2e-6", "name=other"])
    assert load_recipe(file).name == "mine" and recipe.name == "other" and recipe.train.lr == 2e-6


def test_data_options_alone() -> None:
    found = data_recipe("a=b: c", ["ties=keep", "resolution=64"])
    assert (found.path, found.ties) == ("a=b: c", "keep"), "a path is taken as it is"
    for text, expected in (("tyes=keep", "did you mean 'ties'?"), ("resolution=-1", "'resolution'")):
        with pytest.raises(UserError, match="data options") as caught:
            data_recipe("x", [text])
        assert expected in str(caught.value)


def test_the_schema_names_every_key() -> None:
    schema = Recipe.model_json_schema()
    sections = {
        key: schema["$defs"][part["$ref"].rpartition("/")[2]]
        for key, part in schema["properties"].items()
        if "$ref" in part
    }
    named = {f"{section}.{key}" for section, part in sections.items() for key in part.get("properties", {})}
    assert {key for key in known_keys(Recipe) if key.count(".") == 1} <= named | {"method.name"}
    for name in method_modules():
        assert make_method(name, {}).Config.model_json_schema()["additionalProperties"] is False
    json.dumps(schema)


def test_reading_recipes_imports_nothing_heavy() -> None:
    """All but the method's own settings: those stand beside the method, which computes with torch."""
    code = (
        "import sys, diffalign, diffalign.cli, diffalign.recipe as r; r.data_recipe('x', []); r.builtin_recipes(); "
        "diffalign.list_methods(); assert not {'torch', 'diffusers', 'transformers', 'datasets'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
