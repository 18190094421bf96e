"""What distils guidance stands beside the guided teacher and the base without guidance, and is judged by a rule."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from diffalign.bench import methods
from diffalign.bench.guided import (
    EXPLAINED,
    TITLE,
    Line,
    decide,
    error,
    guided_report,
    run_unguided,
    unguided_job,
)
from diffalign.bench.judge import STEPS, judge
from diffalign.bench.method_job import Job
from diffalign.bench.methods import Plan, find_entries, measure_methods, runner
from diffalign.bench.methods_page import page
from diffalign.bench.methods_report import MethodsReport
from diffalign.bench.verdict import Estimate, Row

PROMPTS = 3


def test_the_unguided_base_is_the_base_without_guidance(tmp_path: Path) -> None:
    """By its own times and noise: at guidance 3 the same copy draws the teacher's pictures, pixel by pixel."""
    from diffalign.bench import guided

    job = unguided_job("tiny-sd", PROMPTS, tmp_path)
    assert runner(job) is guided and job.key in job.result
    found = run_unguided(job)
    assert found["judged"]["guidance"] == 1.0 and found["judged"]["steps"] == STEPS
    judge("tiny-sd", tmp_path / "teacher", PROMPTS, ("oracle",))
    apart = error(Path(job.folder) / "held", tmp_path / "teacher" / "held")
    assert apart is not None and apart > 1e-3
    copy = guided.unguided("tiny-sd", tmp_path / "copy")
    facts = json.loads((copy / "diffalign.json").read_text())
    facts["sampling"]["guidance"] = 3.0
    (copy / "diffalign.json").write_text(json.dumps(facts))
    judge(str(copy), tmp_path / "same", PROMPTS, ("oracle",))
    assert error(tmp_path / "same" / "held", tmp_path / "teacher" / "held") == 0.0


def drawn(folder: Path, level: int, right: list[float]) -> Path:
    """Held-out pictures of one grey, scored."""
    (folder / "held").mkdir(parents=True)
    lines = []
    for i, value in enumerate(right):
        Image.new("RGB", (4, 4), (level, level, level)).save(folder / "held" / f"{i}.png")
        row = {
            "id": f"p{i}",
            "prompt": f"thing {i}",
            "k": 0,
            "seed": 0,
            "image": f"{i}.png",
            "scorer": "oracle",
            "category": "",
        }
        lines.append(json.dumps({**row, "value": value, "fingerprint": "x", "image_sha256": "", "parts": {}}))
    (folder / "held" / "scores.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def test_error_is_the_mean_square_over_the_same_prompts(tmp_path: Path) -> None:
    a, b = drawn(tmp_path / "a", 0, [1, 1]), drawn(tmp_path / "b", 51, [1, 1])
    assert error(a / "held", b / "held") == pytest.approx(0.04)
    assert error(a / "held", drawn(tmp_path / "c", 0, [1]) / "held") is None  # other prompts
    assert error(a / "held", tmp_path / "gone") is None


@pytest.mark.parametrize(
    ("low", "shares", "verdict", "words"),
    [
        (-0.04, [0.1, 0.2, 0.5], "matches", ""),
        (-0.06, [0.1, 0.2, 0.5], "does not match", "6.0 points"),
        (-0.04, [0.1, 0.2, 0.51], "does not match", "51%"),
        (-0.04, [0.1, 0.2], "open", "2 of 3 seeds"),
        (-0.04, [], "open", "gone"),
    ],
)
def test_the_rule(low: float, shares: list[float], verdict: str, words: str) -> None:
    found = decide(Estimate(0.0, low, 0.05), shares, len(shares) or 3, 200, True)
    assert found[0] == verdict and words in found[1]


def test_the_rule_asks_for_what_it_compares() -> None:
    good = Estimate(0.0, -0.01, 0.01)
    assert decide(good, [0.1] * 3, 3, 199, True) == ("open", "199 of 200 prompts")
    found = decide(good, [], 3, 200, False)
    assert found[0] == "open" and "without guidance was not judged" in found[1]


def test_the_table_is_made_of_what_is_there(tmp_path: Path) -> None:
    def job(name: str, seed: int, level: int, right: list[float]) -> Job:
        folder = drawn(tmp_path / f"{name}-{seed}", level, right)
        return Job(name, seed, f"{name}-{seed}", "code", "tiny-sd", None, 0, None, str(folder), "", 0)

    few, many = [0.0] * 50, [1.0] * 150
    ground = [1.0] * 200
    jobs = {
        "base": [job("base", 0, 100, ground)],
        "agd": [job("agd", seed, 102, ground) for seed in (0, 1, 2)],
        "lora_guidance": [job("lora_guidance", seed, 109, few + many) for seed in (0, 1, 2)],
    }
    plain = job("unguided", 0, 110, [0.0] * 100 + [1.0] * 100)
    right = {
        "base": ground,
        "agd": ground,
        "lora_guidance": few + many,
        "unguided": [0.0] * 100 + [1.0] * 100,
    }
    rows = [Row("base", "base"), *(Row(name, "method", "guidance", name) for name in ("agd", "lora_guidance"))]

    def read(job: Job) -> dict[str, Any]:
        steps = 25 if job.name == "lora_guidance" else STEPS
        code = "old" if job.key in ("agd-2", "unguided-0") else "code"
        return {"code": code, "judged": {"steps": steps, "scores": {"oracle": right[job.name]}}}

    rows[2].failed = {3: "out of memory"}
    report = guided_report(rows, jobs, plain, read, {})
    names = [(line.name, line.calls, line.verdict) for line in report.lines]
    assert names == [
        ("teacher", 2 * STEPS, "reference"),
        ("unguided", STEPS, "reference"),
        ("agd", STEPS, "matches"),
        ("lora_guidance", 25, "does not match"),
    ]
    agd: Line = report.lines[2]
    assert agd.error == pytest.approx((2 / 255) ** 2) and np.allclose(agd.shares, 0.04)
    assert [row.verdict for row in rows] == ["", "learning", "not learning"]
    assert "points of prompts all right" in rows[2].why and "81%" in rows[2].why
    unguided, mine, other = report.notes
    assert unguided == "unguided: reference: made by earlier code" and mine == "agd: matches: made by earlier code"
    assert other.endswith("seed 3 failed: out of memory")
    text = report.markdown()
    assert EXPLAINED in text and "| agd | 20 | matches | 1.000 |" in text
    whole = MethodsReport(
        {"prompts": 200, "seeds": [0], "budget": 1, "times": {}, "overrides": []}, rows, guided=report
    )
    html = page(whole)
    assert TITLE in html and "does not match" in html and "seed 3 failed" in html
    console = Console(width=200, file=io.StringIO())
    whole.render(console)
    assert isinstance(console.file, io.StringIO) and "does not match" in console.file.getvalue()
    assert whole.json()["guided"][3]["calls"] == 25
    assert guided_report(rows[:1], jobs, plain, lambda j: None, {}).lines == []
    lost = guided_report(rows, jobs, plain, lambda j: None, {plain.key: "ended by signal 9"})
    assert lost.notes == ["unguided failed: ended by signal 9"]


@pytest.mark.parametrize(("asked", "expected"), [("guidance", True), ("agd", True), ("dpo", False)])
def test_the_unguided_base_is_judged_where_it_is_needed(
    asked: str, expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []

    def run_jobs(jobs: list[Job], plan: Plan) -> dict[str, str]:
        ran.extend(job.name for job in jobs)
        return {}

    monkeypatch.setattr(methods, "run_jobs", run_jobs)
    report = measure_methods(Plan(tmp_path, (0,), only=(asked,)))
    assert ("unguided" in ran) == expected and "base" in ran
    assert report.settings["times"] == {}
    other = measure_methods(Plan(tmp_path, (0,), only=("sid",)))
    assert other.settings["times"] == {"sid": 2} and "2 times that for sid" in other.title()


def test_the_group_is_asked_for_by_name() -> None:
    entries = [entry for entry in find_entries(only=("guidance",)) if entry.group == "guidance"]
    assert {entry.method for entry in entries} == {"agd", "lora_guidance"}
