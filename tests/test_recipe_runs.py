"""Recipes for SD1.5, SD2.1 and SDXL: planned without weights, and trained on the tiny model of their make."""

from __future__ import annotations

import json
import math
import shutil
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from small import write_pairs

from diffalign import list_methods, load_recipe, train
from diffalign.data.teacher import MARK
from diffalign.plan import make_plan
from diffalign.recipe import builtin_recipes

GROUPS = {row["name"]: row["group"] for row in list_methods()}
REAL = {name: load_recipe(name).method.name for name in builtin_recipes() if not name.startswith("tiny/")}
TURBO = [name for name in REAL if "turbo" in load_recipe(name).model.path]  # of which no config is known
PLANNED = [name for name in REAL if not name.startswith("spm/") and name not in TURBO]
NAMES = [name for name in REAL if name.startswith(("sd15/", "sdxl/"))]
ASSETS = Path(str(resources.files("diffalign.assets")))
MODELS = {"sd15": "tiny-sd", "sdxl": "tiny-sdxl"}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six pairs with whatever further columns a method may ask for."""
    folder = write_pairs(tmp_path_factory.mktemp("recipes") / "pairs", 6)
    table = folder / "metadata.jsonl"
    rows = [json.loads(line) for line in table.read_text().splitlines()]
    for number, row in enumerate(rows):
        row |= {"chosen_score": 0.5 + number / 20, "rejected_score": 0.2, "user": f"user {number % 2}"}
        row["rejected_prompt"] = f"{row['prompt']}, but worse"
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    teacher = [
        {"file_name": f"../pairs/{row['chosen']}", "prompt": row["prompt"], "id": f"{MARK}|0|0|{number}"}
        for number, row in enumerate(rows)
    ]
    (folder.parent / "teacher").mkdir()
    (folder.parent / "teacher" / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in teacher))
    return folder


def data_of(name: str, pairs: Path) -> Path:
    """Pairs are pictures and prompts too; DMD's regression wants the teacher's noise besides."""
    return pairs.parent / "teacher" if REAL[name] == "dmd" else pairs


def few_step(folder: Path) -> Path:
    """The tiny model with the scheduler of a few-step one."""
    if not folder.exists():
        shutil.copytree(ASSETS / "tiny-sdxl", folder)
        config = folder / "scheduler" / "scheduler_config.json"
        config.write_text(
            json.dumps(json.loads(config.read_text()) | {"_class_name": "EulerAncestralDiscreteScheduler"})
        )
    return folder


def sampling(method: dict[str, Any]) -> dict[str, object]:
    """Few and short samples, where a method makes its own."""
    values: dict[str, object] = {} if "timesteps" in method else {"method.steps": 3}
    if "members" in method:
        values["method.members"] = 2
    few = {"tree_rpo": {"depth": 1}, "dro": {"kept": 3, "updates": 3}, "spo": {"start_step": 1, "segment": 1}}
    few["draft"] = {"through": 1, "spread": 0.0, "guard": "tiny-hps"}
    return values | {f"method.{key}": value for key, value in few.get(method["name"], {}).items()}


def overrides(name: str, pairs: Path, out: Path) -> list[str]:
    """A recipe's own settings but for its size: the tiny model, these pairs, two steps of two rows."""
    values: dict[str, object] = {
        "model.path": MODELS[name.split("/")[0]],
        "model.vae": "null",
        "data.path": data_of(name, pairs),
        "data.resolution": 32,
        "data.cache_dir": pairs.parent / "cache",
        "train.steps": 2,
        "train.batch": 2,
        "train.micro_batch": "null",
        "train.warmup": 0,
        "train.log_every": 1,
        "validate.pairs": 0,
        "validate.images": 1,
        "validate.steps": 1,
        "output.dir": out,
        "output.trackers": "[]",
    }
    recipe = load_recipe(name)
    if recipe.data.scorer is not None:
        values["data.scorer"] = "null"  # the rows have scores
    if recipe.data.rewards:
        values["data.rewards"] = "[]"
    if recipe.method.name == "softrepa":
        values |= {"train.batch": recipe.method.model_dump()["group"]}
    if "inversion_steps" in recipe.method.model_dump():
        values["method.inversion_steps"] = 2
    if GROUPS[recipe.method.name] == "online":
        values |= sampling(recipe.method.model_dump()) | {"train.optimizer": "adamw"}
        if recipe.method.name not in ("dro", "pso_pictures"):
            values["method.reward"] = "tiny-pickscore"
    if name in TURBO:
        values["model.path"] = few_step(pairs.parent / "turbo")
    if "reward" in recipe.method.model_dump():
        values["method.reward"] = "tiny-pickscore"
    return [f"{key}={value}" for key, value in values.items()]


def one_a_method() -> list[Any]:
    """The recipes, slow but for one of each preference method, SDXL's where there is one, one distillation and one that
    samples while it trains."""
    few = ("sdxl/dmd2", "sdxl/tree_rpo")
    chosen = {REAL[name]: name for name in NAMES if GROUPS[REAL[name]] == "preference" or name in few}
    return [pytest.param(name, marks=[] if name in chosen.values() else pytest.mark.slow) for name in NAMES]


@pytest.mark.parametrize("name", one_a_method())
def test_a_recipe_trains_on_the_tiny_model_of_its_make(name: str, pairs: Path, tmp_path: Path) -> None:
    run = train(load_recipe(name, overrides(name, pairs, tmp_path / "run")), progress=False)
    assert run.step == 2
    row = [row for row in run.log if row["kind"] == "train"][-1]
    moved = [value for key, value in row.items() if key.startswith("grad_norm")]
    assert moved and all(math.isfinite(value) and value > 0 for value in moved), row
    numbers = [value for value in row.values() if isinstance(value, float)]
    assert all(map(math.isfinite, numbers)) and "skipped" not in row, row
    assert (run.model / "README.md").is_file() and any(run.model.rglob("*.safetensors"))


@pytest.mark.slow
@pytest.mark.parametrize("name", PLANNED)
def test_a_recipe_is_planned_without_its_weights(name: str, pairs: Path, tmp_path: Path) -> None:
    where = [f"data.path={data_of(name, pairs)}", f"data.cache_dir={tmp_path}", f"output.dir={tmp_path / 'run'}"]
    if load_recipe(name).data.rewards:
        where.append("data.rewards=[]")  # pairs have none
    plan = make_plan(load_recipe(name, where))
    assert not plan.weights_known and plan.steps > 2 and plan.memory["peak"] > 0
    assert plan.memory["whole"], plan.notes
    assert set(plan.memory["phases"]) == {phase["name"] for phase in plan.phases}
    assert plan.calls["student"] >= plan.batch and plan.calls_per_step == sum(plan.calls.values())
