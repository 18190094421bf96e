"""`bench methods` on few-step students: who reaches the bars, what they are judged beside, and what they go on from."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tiny import SD_SCHEDULE

from diffalign.bench.judge import SCORERS
from diffalign.bench.method_job import Job
from diffalign.bench.method_keys import job_code
from diffalign.bench.methods import Plan, find_entries, make_jobs, measure_methods, waits
from diffalign.bench.methods_page import page
from diffalign.bench.methods_report import MethodsReport
from diffalign.bench.student_jobs import GROUP, Company, with_students
from diffalign.bench.student_table import steps_report
from diffalign.bench.student_verdict import decide_aligned, decide_student, judge_student
from diffalign.bench.students import StudentJob, by_ddim, cut, going_on
from diffalign.bench.verdict import Estimate, Row
from diffalign.errors import UserError
from diffalign.facts import Facts, recorded, student_record

# ---- the rule -------------------------------------------------------------------------------------------------------

GOOD = {1: [(0.5, 0.9)] * 3, 2: [(0.85, 0.8)] * 3}


def test_the_bars_are_those_asked() -> None:
    assert decide_student(GOOD) == ("learning", "")
    assert decide_student({1: GOOD[1]}) == ("learning", "")
    assert decide_student({**GOOD, 4: [(0.1, 0.1)] * 3})[0] == "learning", "no bar at four steps"
    for changed, said in (
        ({1: [(0.5, 0.9), (0.499, 0.9), (0.6, 0.9)]}, "1 step: 1 of 3 seeds below 50% of the teacher's score"),
        ({2: [(0.84, 0.8)] * 3}, "2 steps: 3 of 3 seeds below 85% of the teacher's score (least 84.0%)"),
        ({2: [(0.85, 0.79), (0.9, 0.9), (0.9, 0.9)]}, "2 steps: 1 of 3 seeds below 80% of the teacher's diversity"),
        ({1: [(0.5, 0.7)] * 3}, "1 step: 3 of 3 seeds below 80% of the teacher's diversity (least 70.0%)"),
    ):
        verdict, why = decide_student({**GOOD, **changed})
        assert verdict == "not learning" and why.startswith(said) and ";" not in why
    assert decide_student({2: [(0.9, 0.9)] * 2}) == ("open", "2 of 3 seeds")
    assert decide_student({2: [(0.5, 0.9)]})[0] == "not learning", "a seed that misses a bar decides alone"
    assert decide_student(GOOD, prompts=6) == ("open", "6 of 24 single-object prompts")
    assert decide_student({4: [(1.0, 1.0)] * 3})[0] == ""


def test_an_alignment_must_gain_over_its_student() -> None:
    assert decide_aligned([0.1, 0.05, 0.2], Estimate(0.11, 0.04, 0.2))[0] == "learning"
    assert decide_aligned([0.1, -0.05, 0.2], Estimate(0.08, 0.04, 0.2))[0] == "not learning"
    assert decide_aligned([0.1, 0.05, 0.2], Estimate(0.11, -0.01, 0.2))[0] == "not learning"
    assert decide_aligned([0.1, 0.2], Estimate(0.15, 0.1, 0.2))[0] == "open"


# ---- the table, from made-up results --------------------------------------------------------------------------------


def level(steps: int, right: float, diversity: float = 0.3, ms: float = 5.0) -> dict[str, Any]:
    single = [min(1.0, right + 0.01 * (i % 2)) for i in range(24)]
    spread = {"shapes": right, "diversity": diversity, "ms": ms}
    return {
        "steps": steps,
        "times": [999, 499][:steps] if steps < 20 else None,
        "single": single,
        "held": [0.0, 1.0],
    } | spread


def result(name: str, seed: int, levels: Sequence[dict[str, Any]], held: float = 0.5) -> dict[str, Any]:
    scores = {scorer: [held] * 8 for scorer in SCORERS}
    head = {"name": name, "seed": seed, "code": "code", "cpu": 60.0, "peak_mb": 150.0, "levels": list(levels)}
    return head | {"judged": {"scores": scores}}


def test_a_piece_of_a_path_is_no_picture() -> None:
    teacher = result("teacher", 0, [level(20, 1.0)])
    found = [result("any", seed, [level(1, 0.1), level(2, 0.9)]) for seed in range(3)]
    assert judge_student("dmd2", [], found, teacher, {})[0] == "not learning"
    assert judge_student("tdm", [], found, teacher, {}) == ("learning", "")
    poor = [result("any", seed, [level(1, 0.9), level(2, 0.1)]) for seed in range(3)]
    assert judge_student("tdm", [], poor, teacher, {})[0] == "not learning"


def job(name: str, seed: int = 0, **options: Any) -> StudentJob:
    return StudentJob(
        name, seed, name, "code", "tiny-sd", None, 1, None, f"runs/{name}", f"{name}-{seed}", 1, **options
    )


REFERENCES = {1: 0.3, 2: 0.75, 20: 0.9}


def report_of(results: dict[str, list[dict[str, Any]]], pairs: bool = False) -> MethodsReport:
    company = Company(references={k: job("teacher" if k == 20 else f"ddim-{k}", steps=k) for k in REFERENCES})
    made = {
        job("x", seed).result.replace("x", name): found for name, of in results.items() for seed, found in enumerate(of)
    }
    beside = {of.result: result(of.name, 0, [level(k, REFERENCES[k], 0.4)]) for k, of in company.references.items()}
    jobs: dict[str, list[Job]] = {name: [job(name, seed) for seed in range(len(of))] for name, of in results.items()}
    if pairs:
        company.pairs["pictures"] = job("teacher-pairs")
        jobs = {name: [job(name, seed, pairs="pictures") for seed in range(len(of))] for name, of in jobs.items()}
        made["teacher-pairs-0"] = {"pictures": 1922, "units": 76880, "cpu": 200.0}
    rows = [Row(name, "method", GROUP, name) for name in results]
    found = {**made, **beside}
    steps = steps_report(rows, jobs, company, lambda of: found.get(of.result), {})
    settings = {"budget": 1, "times": {}, "seeds": [0], "prompts": 2, "overrides": []}
    return MethodsReport(settings, rows, {}, steps)


def test_students_stand_beside_teacher_and_ddim() -> None:
    good = [result("tdm", seed, [level(1, 0.6, 0.36), level(2, 0.8, 0.36)]) for seed in range(3)]
    poor = [result("sid", seed, [level(1, 0.2 + 0.1 * seed, 0.36), level(2, 0.8, 0.36)]) for seed in range(3)]
    report = report_of({"tdm": good, "sid": poor}, pairs=True)
    lines = report.over_steps.rows
    assert [(r.name, r.steps) for r in lines[:3]] == [("teacher", 20), ("DDIM", 1), ("DDIM", 2)]
    assert [(r.name, r.steps, r.verdict) for r in lines[3:]] == [
        ("tdm", 1, "learning"),
        ("tdm", 2, "learning"),
        ("sid", 1, "not learning"),
        ("sid", 2, "not learning"),
    ]
    one = lines[3]
    assert one.score == pytest.approx(0.605) and one.share == pytest.approx(0.605 / 0.905)
    assert one.diversity_share == pytest.approx(0.9) and one.held == 0.5 and one.seeds == [0, 1, 2]
    assert one.over_ddim and one.over_ddim.value == pytest.approx(0.3) and one.times == [999]
    assert lines[5].by_seed == pytest.approx([0.205, 0.305, 0.405])
    # the rows of the table of methods say the same
    assert [row.verdict for row in report.rows] == ["learning", "not learning"]
    assert "1 step: 3 of 3 seeds below 50%" in report.rows[1].why
    # 0.755 of plain DDIM at two steps is 83 % of 0.905: below the bar
    assert "plain DDIM" not in report.rows[0].why
    text = report.markdown()
    assert "1,922 pictures by the teacher, took 76,880 units and 200 CPU s" in text and text.count("| tdm |") == 3
    assert json.loads(json.dumps(report.json()))["over_steps"][3]["share"] == one.share
    shown = page(report)
    assert shown.count("<svg") == 1 and "Few-step students: single objects over steps" in shown
    console = Console(width=200, record=True)
    report.render(console)
    assert "0.605 (67%)" in console.export_text()


def test_a_bar_that_plain_ddim_reaches_is_told() -> None:
    REFERENCES[2] = 0.8
    try:
        report = report_of({"tdm": [result("tdm", seed, [level(2, 0.85, 0.36)]) for seed in range(3)]})
    finally:
        REFERENCES[2] = 0.75
    assert report.rows[0].verdict == "learning"
    assert report.rows[0].why == "plain DDIM reaches the bar of 2 steps as well"


def test_alignments_are_judged_by_their_student() -> None:
    levels = [level(2, 0.2)]
    results = {
        "dmd2": [result("dmd2", seed, levels) for seed in range(3)],
        "pso": [result("pso", seed, levels, held=0.75) for seed in range(3)],
        "distillation_dpo": [result("distillation_dpo", 0, levels)],
    }
    rows = {row.name: row for row in report_of(results).rows}
    assert rows["pso"].verdict == "learning" and "+0.250" in rows["pso"].why
    assert rows["distillation_dpo"].verdict == "" and "no student" in rows["distillation_dpo"].why
    alone = report_of({"pso": results["pso"]}).rows[0]
    assert alone.verdict == "" and "results of dmd2" in alone.why


# ---- jobs -----------------------------------------------------------------------------------------------------------


def test_what_students_need_is_made_first(tmp_path: Path) -> None:
    entries = {entry.name: entry for entry in find_entries()}
    plan = Plan(tmp_path, (0, 1))
    jobs = {name: make_jobs(entry, plan) for name, entry in entries.items()}
    before = {name: list(of) for name, of in jobs.items()}
    recipes = {name: entry.recipe for name, entry in entries.items() if entry.group == GROUP and entry.recipe}
    company = with_students(recipes, jobs, tmp_path)
    assert {"dmd", "dmd2", "pso"} <= recipes.keys() and list(company.references)[-1] == 20
    assert {1, 2} <= company.references.keys()
    # other rows are as they were
    assert jobs["dpo"] == before["dpo"] and type(jobs["dpo"][0]) is Job
    assert jobs["dpo"][0].code == job_code(entries["dpo"].recipe)
    # DMD learns from pictures of the bench's own
    (folder,) = company.pairs
    dmd = jobs["dmd"][0]
    assert isinstance(dmd, StudentJob) and dmd.recipe and dmd.recipe["data"]["path"] == dmd.pairs == folder
    assert Path(folder).is_absolute() and dmd.key == before["dmd"][0].key and waits(dmd)
    # PSO goes on from the student of the same seed
    for name in ("pso", "pso_online", "pso_pictures"):
        for seed, pso in enumerate(jobs[name]):
            assert isinstance(pso, StudentJob) and pso.start == str(Path(jobs["dmd2"][seed].folder, "run").resolve())
            assert pso.key != before[name][seed].key and pso.key in pso.result and pso.key in pso.folder
    asked = [*jobs["pso"], *jobs["pso_online"], *jobs["dmd"], *jobs["tdm"]]
    assert company.beneath(asked, lambda of: False) == [*jobs["dmd2"], company.pairs[folder]]
    Path(folder).mkdir(parents=True)
    assert company.beneath(asked, lambda of: True) == jobs["dmd2"], "done, but the runs are gone"
    assert company.beneath(asked, lambda of: False)[-1] == company.pairs[folder]


def test_a_student_records_fewer_of_its_times(tmp_path: Path) -> None:
    (tmp_path / "run" / "model").mkdir(parents=True)
    (tmp_path / "run" / "recipe.yaml").write_text("model: {path: tiny-sd}\n")
    facts = Facts(sampling=student_record(SD_SCHEDULE, [999, 749, 499, 249], renoise=False, scale=0.9))
    (tmp_path / "run" / "model" / "diffalign.json").write_text(facts.text())
    fewer = recorded(str(cut(tmp_path / "run", 2, tmp_path / "two")))
    assert fewer and fewer.timesteps == (999, 499) and fewer.steps == 2 and fewer.scale == 0.9 and fewer.deterministic
    assert (tmp_path / "two" / "recipe.yaml").is_file()
    # and what goes on from it trains at these times
    recipe = going_on({"model": {"path": "tiny-sd"}, "method": {"name": "pso"}}, str(tmp_path / "two"))
    assert recipe["model"]["loras"] == [{"path": str(tmp_path / "two")}]
    assert recipe["method"] == {"name": "pso", "timesteps": [999, 499], "rollout": "ddim", "scale": 0.9}
    online = {"name": "pso_online", "sampler": "renoise"}
    recipe = going_on({"model": {"loras": [{"path": "runs/x"}]}, "method": online}, str(tmp_path / "two"))
    assert recipe["model"]["loras"] == [{"path": str(tmp_path / "two")}], "in the place of the recipe's own"
    assert recipe["method"]["sampler"] == "ddim" and "rollout" not in recipe["method"]
    with pytest.raises(UserError, match="does not hold the student"):
        going_on(recipe, str(tmp_path / "none"))


def test_plain_ddim_is_guided_and_starts_from_the_noise(tiny_model_folder: Path, tmp_path: Path) -> None:
    record = recorded(str(by_ddim(str(tiny_model_folder), 2, tmp_path / "base")))
    assert record and (record.timesteps, record.guidance, record.deterministic) == ((999, 499), 3.0, True)
    assert record.call()["guidance_scale"] == 3.0 and record.guided


@pytest.mark.slow
def test_students_are_trained_and_judged(tmp_path: Path) -> None:
    """DMD2, PSO on top of it and DMD on the teacher's pictures: a few steps each, three prompts."""
    plan = Plan(tmp_path, (0,), 1200, 3, 1, ("dmd2", "dmd", "pso"), ("data.max_pairs=24",))
    report = measure_methods(plan)
    assert not report.failed, report.over_steps.troubles
    lines = {(row.name, row.steps): row for row in report.over_steps.rows}
    students = {("dmd", 1), ("dmd2", 1), ("dmd2", 2), ("pso", 1), ("pso", 2)}
    assert lines.keys() == students | {("teacher", 20), ("DDIM", 1), ("DDIM", 2)}
    assert lines["teacher", 20].score > 0.9 > lines["DDIM", 1].score
    assert lines["pso", 2].times == [999, 499] == lines["dmd2", 2].times
    assert all(lines[key].ms < lines["teacher", 20].ms / 4 for key in students)
    assert "24 pictures by the teacher, took 960 units" in report.markdown()
    shown = page(report)
    assert shown.count("data:image/png") >= 3 * len(lines)
    again = measure_methods(plan)  # nothing is run again: it takes no time
    assert [row.score for row in again.over_steps.rows] == [row.score for row in report.over_steps.rows]
