"""Searches by `diffalign sample` and `diffalign bench search`, and the notebook about them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from diffalign.bench import search as bench
from diffalign.bench.search import Plan, measure_search
from diffalign.cli import app
from diffalign.errors import Interrupted, UserError
from diffalign.eval.prompts import Prompt, read_prompts
from diffalign.pipelines.sample import SampleSpec, sample
from diffalign.pipelines.searches import run

PROMPTS = [Prompt(f"p{i}", text) for i, text in enumerate(("a red circle", "a blue square", "a green cross"))]
NOTEBOOKS = Path(__file__).parents[1] / "pipelines" / "notebooks"
SEARCH: dict[str, Any] = {"search": "tree", "reward": "tiny-pickscore", "budget": 12}


def spec(**options: Any) -> SampleSpec:
    return SampleSpec("tiny-sd", **{"steps": 2, "guidance": 2.0, "device": "cpu", "batch": 2, **options})


def pixels(file: Path) -> np.ndarray:
    return np.asarray(Image.open(file)).astype(int)


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_sample_with_a_search(tmp_path: Path) -> None:
    """One picture a prompt and seed, what it took beside it; a run goes on with the same bytes; a budget of one picture
    is no search at all."""
    sample(spec(**SEARCH, seed=(0, 1)), PROMPTS, tmp_path / "a", progress=False)
    took = lines(tmp_path / "a" / "search.jsonl")
    manifest = lines(tmp_path / "a" / "manifest.jsonl")
    assert [row["image"] for row in took] == [row["image"] for row in manifest] and len(took) == 6
    assert all(4 <= row["calls"] <= 12 and row["finished"] >= 3 for row in took)
    files = sorted((tmp_path / "a" / "images").iterdir())
    before = {file.name: file.read_bytes() for file in files}
    files[1].unlink()
    files[2].unlink()
    sample(spec(**SEARCH, seed=(0, 1)), PROMPTS, tmp_path / "a", progress=False)
    assert {file.name: file.read_bytes() for file in files} == before
    assert json.loads((tmp_path / "a" / "sample.json").read_text())["settings"]["search"] == "tree"
    with pytest.raises(UserError, match="other settings"):
        sample(spec(**{**SEARCH, "budget": 13}), PROMPTS, tmp_path / "a", progress=False)

    one = {**SEARCH, "search": "best-of-n", "budget": 4}
    sample(spec(**one, scheduler="euler"), PROMPTS, tmp_path / "one", progress=False)
    sample(spec(scheduler="euler"), PROMPTS, tmp_path / "plain", progress=False)
    for file in sorted((tmp_path / "plain" / "images").iterdir()):
        assert np.array_equal(pixels(file), pixels(tmp_path / "one" / "images" / file.name))


def test_an_interrupt_keeps_the_best_so_far_and_finishes_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, asked = run.drive, [0]

    def drive(world: Any, *args: Any, **options: Any) -> Any:
        score = world.score

        def interrupted(*given: Any) -> Any:
            asked[0] += 1
            if asked[0] > 2:
                raise KeyboardInterrupt
            return score(*given)

        world.score = interrupted
        return plain(world, *args, **options)

    monkeypatch.setattr(run, "drive", drive)
    with pytest.raises(Interrupted, match="stopped after 0 of 3"):
        sample(spec(**SEARCH), PROMPTS, tmp_path, progress=False)
    assert (tmp_path / "images" / "000000-0.png").is_file() and not lines(tmp_path / "manifest.jsonl")
    monkeypatch.undo()
    sample(spec(**SEARCH), PROMPTS, tmp_path, progress=False)
    assert len(lines(tmp_path / "manifest.jsonl")) == 3


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"search": "tree"}, "reward, budget is missing"),
        ({"reward": "tiny-clip", "budget": 9}, "search is missing"),
        ({**SEARCH, "search": "trees"}, "unknown search 'trees'; did you mean 'tree'"),
        ({**SEARCH, "reward": "tiny-clip,tiny-hps"}, "goes by one scorer"),
        ({**SEARCH, "reward": "pick"}, "unknown scorer 'pick'"),
        ({**SEARCH, "budget": 0}, "--budget must be at least 1"),
        ({**SEARCH, "per_prompt": 2}, "leave --per-prompt out"),
        ({**SEARCH, "scheduler": "euler"}, "leave --scheduler euler out"),
        ({**SEARCH, "base_first": 1}, "base_first does not go with a search"),
    ],
)
def test_wrong_searches_are_refused_before_anything_is_loaded(options: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        spec(**options).check()


def test_the_command_line_hands_them_on(tmp_path: Path) -> None:
    head = ["sample", "tiny-sd", "--prompts", "a red circle", "--out", str(tmp_path)]
    for arguments, says in (
        ([*head, "--search", "tree", "--reward", "tiny-clip"], "budget is missing"),
        ([*head, "--search", "tree", "--reward", "tiny-clip", "--budget", "0"], "--budget must be at least 1"),
        (["bench", "search", "--out", str(tmp_path), "--budget", "many"], "--budget many: give whole numbers"),
        (["bench", "search", "--out", str(tmp_path), "--search", "bean"], "did you mean 'beam'"),
    ):
        found = CliRunner().invoke(app, arguments)
        assert isinstance(found.exception, UserError) and says in str(found.exception)
    assert not list(tmp_path.iterdir())


def small(out: Path, **options: Any) -> Plan:
    given: dict[str, Any] = {"limit": 3, "budgets": (8, 16), "searches": ("best-of-n", "greedy", "tree"), "steps": 3}
    return Plan(out, guidance=1.0, device="cpu", **{**given, **options})


def test_bench_goes_on_and_reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal budgets are kept; widths fill them; what is there is not run again."""
    report = measure_search(small(tmp_path))
    assert [(line.fitted, line.budget) for line in report.lines] == [
        ("best-of-n", 8),
        ("greedy:children=3", 8),
        ("tree", 8),
        ("best-of-n", 16),
        ("greedy:children=7", 16),
        ("tree", 16),
    ]
    assert all(line.budget - 3 < line.calls <= line.budget for line in report.lines)
    first, other = report.lines[3:5]
    assert first.gain is None and other.gain is not None and first.finished == 5
    assert other.gain.value == pytest.approx(other.reward - first.reward)
    assert other.gain.low <= other.gain.value <= other.gain.high
    assert "greedy:children=7 | 16" in (tmp_path / "table.md").read_text()
    assert "<svg" in (tmp_path / "report.html").read_text()
    found = json.loads((tmp_path / "results.json").read_text())
    assert [row["prompt"] for row in found["cells"][0]["rows"]] == [p.prompt for p in read_prompts("tiny-heldout")[:3]]

    def never(*args: Any) -> Any:
        raise AssertionError("it is there already")

    monkeypatch.setattr(bench.Bench, "group", never)
    assert measure_search(small(tmp_path)).lines == report.lines
    with pytest.raises(AssertionError):
        measure_search(small(tmp_path, seed=1))


def test_bench_refuses(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'oracle' cannot be reward and judge at once"):
        measure_search(small(tmp_path, reward="oracle"))
    with pytest.raises(UserError, match="--budget 0"):
        measure_search(small(tmp_path, budgets=(0,)))
    with pytest.raises(UserError, match="captions of the tiny world only"):
        measure_search(small(tmp_path, prompts="a photo of a cat"))


def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every code cell in turn, with the settings cell (tag `parameters`) replaced by small ones."""
    monkeypatch.setenv("MPLBACKEND", "agg")
    book = json.loads((NOTEBOOKS / "search.ipynb").read_text(encoding="utf-8"))
    code = [cell for cell in book["cells"] if cell["cell_type"] == "code"]
    assert code[0]["metadata"]["tags"] == ["parameters"] and not any(cell["outputs"] for cell in code)
    names: dict[str, Any] = {}
    exec("".join(code[0]["source"]), names)
    names |= {"PROMPTS": 2, "BUDGETS": (24,), "STEPS": 3, "OUT": str(tmp_path)}
    for cell in code[1:]:
        exec("".join(cell["source"]), names)
    assert set(names["found"]) == {"best-of-n", "greedy:children=4", "beam:beams=2,children=2", "tree"}
    assert len(names["report"].lines) == 4
