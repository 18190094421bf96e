"""`diffalign bench methods`: budgets are counted, results are kept, failures are rows, and verdicts follow the rule."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from diffalign.bench import methods
from diffalign.bench.judge import SCORERS
from diffalign.bench.method_job import run_job, stay_with
from diffalign.bench.method_keys import code_hash, job_key, method_modules_of
from diffalign.bench.methods import TIMES, Plan, find_entries, is_asked, make_jobs, measure_methods
from diffalign.bench.methods_page import rounds
from diffalign.bench.methods_report import MethodsReport
from diffalign.bench.units import Spent
from diffalign.bench.verdict import Estimate, Row, decide, fill
from diffalign.cli import app
from diffalign.data.files import write_atomic
from diffalign.errors import UserError
from diffalign.recipe import Recipe
from diffalign.setup import build

FEW = ("data.max_pairs=24",)
BUDGET = 2 * 16 * 8  # two steps of tiny/dpo


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """Base and dpo, run in this process into the folder of a plan."""
    plan = Plan(tmp_path_factory.mktemp("bench"), (0,), BUDGET, 3, 1, ("dpo",), FEW)
    (plan.out / "results").mkdir()
    for entry in find_entries(FEW, ("dpo",)):
        if entry.name in {"base", "dpo"}:
            for job in make_jobs(entry, plan):
                write_atomic(Path(job.result), json.dumps(run_job(job)).encode())
    return plan


def result(plan: Plan, name: str) -> dict[str, Any]:
    (file,) = (plan.out / "results").glob(f"{name}-0-*.json")
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def test_a_training_takes_its_budget_and_is_judged(done: Plan) -> None:
    dpo, base = result(done, "dpo"), result(done, "base")
    assert (dpo["steps"], dpo["units"]) == (2, BUDGET)
    assert dpo["per_step"] == {
        "base": {"calls": 1, "forward": 32, "backward": 0},
        "student": {"calls": 1, "forward": 32, "backward": 32},
    }
    assert dpo["seconds"] > 0 and dpo["peak_mb"] > 1
    for found in (dpo, base):
        assert {name: len(values) for name, values in found["judged"]["scores"].items()} == dict.fromkeys(SCORERS, 3)
        assert set(found["judged"]["scores"]["oracle"]) <= {0.0, 1.0}
        assert 0.8 < found["judged"]["shapes"] <= 1 and 0.2 < found["judged"]["diversity"] < 0.5
    assert dpo["judged"]["ids"] == base["judged"]["ids"]
    # the same noise: after two steps the pictures are nearly the base's, so the scores are
    gap = np.subtract(dpo["judged"]["scores"]["tiny-clip"], base["judged"]["scores"]["tiny-clip"])
    assert 0 < np.abs(gap).max() < 0.1 * np.abs(base["judged"]["scores"]["tiny-clip"]).max()


def test_what_is_there_is_not_run_again(done: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[str] = []

    def start(job: Any) -> Any:
        started.append(f"{job.name}-{job.seed}")
        raise KeyboardInterrupt

    monkeypatch.setattr(methods, "start", start)
    report = measure_methods(done)
    assert not started and not report.failed
    assert [row.name for row in report.rows] == ["base", "dpo"]
    row = report.rows[1]
    assert (row.seeds, row.steps, row.units) == ([0], 2, BUDGET) and row.verdict in {"open", "not learning"}
    page, table = ((done.out / name).read_text() for name in ("report.html", "table.md"))
    assert page.count("<svg") == 4 and page.count("data:image/png") == 2 * 3 and "| dpo |" in table
    assert json.loads((done.out / "results.json").read_text())["rows"][1]["name"] == "dpo"
    for change in ({"seeds": (0, 1)}, {"budget": BUDGET + 8}, {"overrides": (*FEW, "train.lr=1e-3")}):
        with pytest.raises(methods.Interrupted):
            measure_methods(replace(done, **change))
    assert started == ["dpo-1", "dpo-0", "dpo-0"], "base is judged once"


def test_results_of_earlier_code_are_marked(done: Plan, tmp_path: Path) -> None:
    shutil.copytree(done.out / "results", tmp_path / "results")
    (file,) = (tmp_path / "results").glob("dpo-0-*.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"code": "another"}))
    report = measure_methods(replace(done, out=tmp_path, shown=True))
    assert [row.why.endswith("made by earlier code") for row in report.rows] == [False, True]
    assert "made by earlier code" in report.markdown()


def test_a_method_that_fails_is_a_row(done: Plan) -> None:
    args = ["bench", "methods", "--only", "mapo", "--seeds", "0", "--budget", str(BUDGET), "--prompts", "3"]
    # mapo has no reference whose errors could be cached
    run = CliRunner().invoke(app, [*args, "--out", str(done.out), "--json", *FEW, "data.reference_errors=1"])
    assert run.exit_code == 1
    rows = {row["name"]: row for row in json.loads(run.stdout)["rows"]}
    assert rows["mapo"]["verdict"] == "failed" and "reference" in rows["mapo"]["why"]
    assert "Traceback" not in rows["mapo"]["why"] and rows["base"]["verdict"] == "base"
    assert not list((done.out / "results").glob("mapo*")), "a failure is tried again"


def test_rows_are_found() -> None:
    entries = {entry.name: entry for entry in find_entries()}
    assert list(entries)[:3] == ["base", "shuffled", "sft"] and "sdxl-dpo" not in entries
    shuffled, dpo = entries["shuffled"].recipe, entries["dpo"].recipe
    assert shuffled and dpo and shuffled.data.shuffle_labels and not dpo.data.shuffle_labels
    known = {row["name"] for row in methods.list_methods()} - {"spm"}  # it makes no pictures
    assert entries["disback"].recipe is None and "disback-path" not in entries  # two runs, one after the other
    assert not {name for name in entries if name.startswith("hypersd")}  # later stages, which go on from a run
    assert "spm" not in entries and known <= {entry.method for entry in entries.values()}
    assert all(entry.recipe or "no tiny recipe" in entry.note or entry.kind == "base" for entry in entries.values())
    with pytest.raises(UserError, match="did you mean 'dpo'"):
        find_entries((), ("dpoo",))
    assert methods.trained_on(dpo) == ("tiny-pickscore",) == methods.trained_on(entries["smpo"].recipe)
    assert methods.trained_on(entries["capo"].recipe) == ("tiny-pickscore", "tiny-hps")
    asked = {name for name, entry in entries.items() if is_asked(entry, ["preference"])}
    assert {"base", "sft", "shuffled", "dpo"} <= asked and not asked & {"dmd2", "ddpo"}
    assert not is_asked(entries["sft"], ["dpo"])
    changed = {e.name: e.recipe.train.lr for e in find_entries(["train.lr=1"], ["dpo"]) if e.recipe}
    assert changed["dpo"] == 1 and changed["shuffled"] != 1 and changed["mapo"] != 1


def test_some_methods_have_a_multiple_of_the_budget_and_the_title_says_so(tmp_path: Path) -> None:
    plan = Plan(tmp_path, (0,), 100)
    jobs = {entry.name: make_jobs(entry, plan) for entry in find_entries() if entry.recipe}
    assert {name: of[0].budget for name, of in jobs.items() if of[0].budget != 100} == {
        name: 100 * TIMES[name] for name in TIMES
    }
    settings = {"prompts": 3, "seeds": [0], "budget": 100, "times": {"dmd2": 2, "ddpo": 4, "sid": 2}}
    title = MethodsReport(settings, []).title()
    assert title.endswith("100 units of U-Net work each; 2 times that for dmd2, sid; 4 times that for ddpo")


def test_bad_numbers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--budget 0"):
        measure_methods(Plan(tmp_path, budget=0))
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write"):
        measure_methods(Plan(tmp_path / "file" / "out"))


def test_keys_follow_what_makes_a_result(tmp_path: Path) -> None:
    recipe = next(e.recipe for e in find_entries() if e.name == "inpo")
    assert recipe is not None

    def key(change: str | None = None, value: Any = None, seed: int = 0) -> str:
        other = recipe.model_copy(deep=True)
        if change:
            section, _, name = change.partition(".")
            setattr(getattr(other, section), name, value) if name else setattr(other, section, value)
        return job_key(other, seed, BUDGET, None, "tiny-sd")

    assert key() == key("description", "another") == key("validate_.pairs", 7) == key("train.lr", recipe.train.lr)
    assert key() == key("train.steps", 7), "the budget sets the steps"
    assert len({key(), key("train.lr", 1.0), key("data.shuffle_labels", True), key(seed=1)}) == 4
    names = [module.__name__.rpartition(".")[2] for module in method_modules_of("inpo")]
    assert names == ["inverted", "pair", "dpo", "inpo"]
    import importlib.util

    hashes = []
    for i, text in enumerate(('"""One."""\nx = 1\n', '"""Two."""\n\n# why\nx = 1\n', '"""One."""\nx = 2\n')):
        file = tmp_path / f"code{i}.py"
        file.write_text(text)
        spec = importlib.util.spec_from_file_location(f"code{i}", file)
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        hashes.append(code_hash(module))
    assert hashes[0] == hashes[1] != hashes[2]


def test_recomputed_calls_are_counted(tiny_model_folder: Path, tmp_path: Path) -> None:
    from diffalign.families.random_sd1 import write_random_pairs

    pairs = write_random_pairs(tmp_path / "pairs", 4, 64)
    recipe = Recipe.model_validate(
        {
            "model": {"path": str(tiny_model_folder), "lora": {"rank": 4}},
            "method": {"name": "inversion_dpo", "inversion_steps": 2, "guidance": 2.0},
            "data": {"path": str(pairs), "cache_dir": str(tmp_path / "cache")},
            "train": {"batch": 2, "device": "cpu"},
            "validate": {"pairs": 0},
        }
    )
    trainer = build(recipe, lambda text: None).trainer
    spent = Spent(trainer)
    trainer.train_step()
    trainer.close()
    # 2 pairs are 4 pictures, 8 with guidance, in 2 steps; the student's call is made again in the backward pass
    student, base = spent.per_step()["student"], spent.per_step()["base"]
    assert (student["forward"], student["backward"]) == (8 * 2 * 2, 8 * 2)
    assert (base["forward"], base["backward"]) == (8 * 2 * 2, 0)
    assert spent.units == 32 + 32 + 2 * 16


# ---- verdicts on made-up numbers ------------------------------------------------------------------------------------


def judged(seed: int, right: list[float], shapes: float = 0.99, diversity: float = 0.35) -> dict[str, Any]:
    scores = {"oracle": right} | {name: [v + 0.1 * i for i, v in enumerate(right)] for name in SCORERS[1:]}
    facts = {
        "steps": 3,
        "batch": 2,
        "units": 9,
        "per_step": {},
        "seconds": 1.0,
        "cpu": 1.0,
        "peak_mb": 5.0,
        "seed": seed,
    }
    inner = {"ids": [], "scores": scores, "shapes": shapes, "diversity": diversity, "steps": 20, "guidance": 3.0}
    return facts | {"judged": inner}


def filled(
    gain: float, control: float = 0.0, group: str = "preference", trained_on: tuple[str, ...] = (), **guards: float
) -> Row:
    """200 prompts, 3 seeds; the base has the first 100 right, the method ``gain`` more (or fewer) by shares."""

    def right(share: float, shift: int) -> list[float]:
        values = np.zeros(200)
        values[: 100 + round(200 * share)] = 1
        values[shift] = 1 - values[shift]  # seeds differ a little
        return values.tolist()

    results = [judged(seed, right(gain, seed), **guards) for seed in (0, 1, 2)]
    controls = [judged(seed, right(control, seed + 3)) for seed in (0, 1, 2)]
    base = judged(0, [1.0] * 100 + [0.0] * 100)
    return fill(Row("x", "method", group, trained_on=trained_on), results, base, controls)


def test_the_verdict_is_the_rule() -> None:
    row = filled(0.2)
    assert row.verdict == "learning" and row.gain and row.over_shuffled
    assert row.right == pytest.approx(0.695) and row.gain.value == pytest.approx(0.195)
    assert row.gain.low > 0.1 and [e.value for e in row.by_seed] == pytest.approx([0.195] * 3)
    assert row.wins["oracle"].value == pytest.approx(0.5 + 0.195 / 2) and row.wins["tiny-hps"].low > 0.5
    worse = filled(-0.2)
    assert worse.verdict == "not learning" and "worse than the base" in worse.why
    assert filled(0.01).verdict == "not learning"
    beaten = filled(0.1, control=0.2)
    assert (beaten.verdict, beaten.why) == ("not learning", "worse than shuffled labels")
    costly = filled(0.2, shapes=0.9, diversity=0.31)
    assert (costly.verdict, costly.why) == ("learning, at a cost", "shapes -0.090, diversity -0.040")
    assert filled(0.2, diversity=0.33, shapes=1.0).verdict == "learning"


def test_an_online_method_is_compared_with_the_base_alone() -> None:
    """It has no labels that could be shuffled, unless its data are of pairs."""
    assert filled(0.1, control=0.2, group="online").verdict == "learning"
    assert filled(0.1, control=0.2, group="online", trained_on=("tiny-pickscore",)).verdict == "not learning"
    assert filled(0.01, group="online").verdict == "not learning"
    assert filled(0.2, group="online", diversity=0.31).verdict == "learning, at a cost"
    assert filled(0.2, group="distillation").verdict == ""
    good = Estimate(0.05, 0.02, 0.08)
    assert decide([0.04, 0.05, 0.06], good, None, 0, 0, controls=0, labels=False) == ("learning", "")
    assert decide([0.04], good, None, 0, 0, labels=False) == ("open", "1 of 3 seeds")


def test_the_page_draws_what_was_seen_while_sampling(tmp_path: Path) -> None:
    for name, numbers in (
        ("spo", {"reward": 1.0, "kl": 0.1, "kept_t9": 1.0, "kept_t5": 0.5}),
        ("dpo", {"margin": 1.0}),
    ):
        run = tmp_path / name / "run"
        run.mkdir(parents=True)
        lines = [json.dumps({"step": step, "kind": "train", "lr": 1e-4, "loss": 1.0, **numbers}) for step in (1, 2)]
        (run / "log.jsonl").write_text("\n".join(lines))
    pictures = {name: tmp_path / name / "held" for name in ("spo", "dpo", "gone")}
    drawn = rounds(MethodsReport({}, [], pictures))
    titles = ["Reward of its own samples", "How far from the base", "kept, by time"]
    assert [re.search('class="title">([^<]*)', svg)[1] for svg in drawn] == [  # type: ignore[index]
        escape(f"spo: {title}") for title in titles
    ]


def test_the_rule_part_by_part() -> None:
    good, zero = Estimate(0.05, 0.02, 0.08), Estimate(0.01, -0.02, 0.04)
    assert decide([0.04, 0.05, 0.06], good, good, 0, 0) == ("learning", "")
    assert decide([0.04, 0.05, 0.0], good, good, 0, 0)[0] == "not learning"
    assert decide([0.04, 0.05, 0.06], zero, good, 0, 0)[0] == "not learning"
    assert decide([0.04, 0.05, 0.06], good, zero, 0, 0)[0] == "not learning"
    assert decide([0.04, 0.05, 0.06], good, None, 0, 0) == ("open", "shuffled labels were not run")
    assert decide([0.04], good, good, 0, 0) == ("open", "1 of 3 seeds")
    assert decide([0.04, 0.05, 0.06], good, good, 0, 0, prompts=150) == ("open", "150 of 200 prompts")
    alone = decide([0.04, 0.05, 0.06], good, good, 0, 0, controls=1)
    assert alone == ("open", "1 of 3 seeds with shuffled labels beside them")
    assert decide([0.04, 0.05, -0.06], good, good, 0, 0, prompts=150)[0] == "not learning"


def test_a_job_ends_with_the_process_that_waits_for_it() -> None:
    child = os.fork()
    if child == 0:  # os.getpid() + 1 is not its parent, as if that had gone
        stay_with(os.getppid() + 1)
        time.sleep(60)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
