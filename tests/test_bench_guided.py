"""What distils guidance stands beside the guided teacher and the base without guidance, and is judged by a rule."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffalign.bench.guided import (
    EXPLAINED,
    Line,
    decide,
    error,
    guided_report,
    run_unguided,
    unguided_job,
)
from diffalign.bench.judge import STEPS, judge
from diffalign.bench.method_job import Job
from diffalign.bench.methods import find_entries, runner
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
    seeds = len(shares) or 3
    found = decide(Estimate(0.0, low, 0.05), shares, seeds)
    assert found[0] == verdict and words in found[1]


def test_the_table_is_made_of_what_is_there(tmp_path: Path) -> None:
    def job(name: str, seed: int, level: int, right: list[float]) -> Job:
        folder = drawn(tmp_path / f"{name}-{seed}", level, right)
        return Job(name, seed, f"{name}-{seed}", "code", "tiny-sd", None, 0, None, str(folder), "", 0)

    ground = [1.0] * 40
    jobs = {
        "base": [job("base", 0, 100, ground)],
        "agd": [job("agd", seed, 102, ground) for seed in (0, 1, 2)],
        "lora_guidance": [job("lora_guidance", seed, 109, [0.0] * 10 + ground[10:]) for seed in (0, 1, 2)],
    }
    plain = job("unguided", 0, 110, [0.0] * 20 + ground[20:])
    right = {
        "base": ground,
        "agd": ground,
        "lora_guidance": [0.0] * 10 + ground[10:],
        "unguided": [0.0] * 20 + [1] * 20,
    }
    rows = [Row("base", "base"), *(Row(name, "method", "guidance", name) for name in ("agd", "lora_guidance"))]
    report = guided_report(
        rows, jobs, plain, lambda j: {"code": "code", "judged": {"scores": {"oracle": right[j.name]}}}, {}
    )
    names = [(line.name, line.calls, line.verdict) for line in report.lines]
    assert names == [
        ("teacher", 2 * STEPS, "reference"),
        ("unguided", STEPS, "reference"),
        ("agd", STEPS, "matches"),
        ("lora_guidance", STEPS, "does not match"),
    ]
    agd: Line = report.lines[2]
    assert agd.error == pytest.approx((2 / 255) ** 2) and np.allclose(agd.shares, 0.04)
    assert [row.verdict for row in rows] == ["", "learning", "not learning"]
    assert "points of prompts all right" in rows[2].why and "81%" in rows[2].why
    text = report.markdown()
    assert EXPLAINED in text and "| agd | 20 | matches | 1.000 |" in text
    assert guided_report(rows[:1], jobs, plain, lambda j: None, {}).lines == []
    lost = guided_report(rows, jobs, plain, lambda j: None, {plain.key: "ended by signal 9"})
    assert lost.notes == ["unguided failed: ended by signal 9"]


def test_the_group_is_asked_for_by_name() -> None:
    entries = [entry for entry in find_entries(only=("guidance",)) if entry.group == "guidance"]
    assert {entry.method for entry in entries} == {"agd", "lora_guidance"}
