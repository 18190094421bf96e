"""``pairs make``: sampled, scored and ranked; the same bytes however often it was killed, and by two processes."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command import diffalign, start
from eval_tiny import write_tiny_clip
from PIL import Image
from test_data_readers import recipe

from diffalign.data.images import difference_hash
from diffalign.data.make import Made, MakeOptions, make_pairs
from diffalign.data.ranked import open_ranked
from diffalign.data.readers import read_pairs
from diffalign.errors import UserError
from diffalign.pipelines.spec import Sampling

PROMPTS = ["a red cat", "two blue dogs", "a fish beside a tree"]


@pytest.fixture(scope="module")
def scorers(tmp_path_factory: pytest.TempPathFactory) -> str:
    places = {n: write_tiny_clip(tmp_path_factory.mktemp(n), seed) for seed, n in enumerate(("clip", "pickscore"))}
    return ",".join(f"{name}={place}" for name, place in places.items())


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    file.write_text("\n".join(PROMPTS) + "\n")
    return file


def run(model: Path, out: Path, scorers: str, prompts: Path, *models: str, each: int = 3, **options: Any) -> Made:
    sampling = Sampling(steps=2, guidance=1.0, per_prompt=each, batch=4, height=64, width=64, device="cpu")
    found = make_pairs(
        models or [f"a={model}"],
        str(prompts),
        scorers,
        out,
        MakeOptions(**options),
        sampling=sampling,
        progress=False,
        score_batch=4,
    )
    assert found is not None
    return found


@pytest.fixture(scope="module")
def made(tiny_model_folder: Path, scorers: str, prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All pairs of three pictures of three prompts."""
    out = tmp_path_factory.mktemp("made") / "out"
    run(tiny_model_folder, out, scorers, prompts, policy="all", ties="keep")
    return out


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def phis(out: Path) -> dict[str, dict[str, float]]:
    """Prompt -> file -> share of duels won, worked out from the score files alone."""
    scores: dict[str, dict[str, list[float]]] = {}
    for place in sorted((out / "samples").iterdir()):
        for row in lines(place / "scores.jsonl"):
            file = f"samples/{place.name}/{row['image']}"
            scores.setdefault(row["prompt"], {}).setdefault(file, []).append(row["value"])

    def phi(file: str, files: dict[str, list[float]]) -> float:
        duels = [(a, b) for o in files if o != file for a, b in zip(files[file], files[o], strict=True)]
        return sum((a > b) + 0.5 * (a == b) for a, b in duels) / len(duels)

    return {prompt: {file: phi(file, files) for file in files} for prompt, files in scores.items()}


def test_pairs_are_what_the_scores_say(made: Path, scorers: str) -> None:
    rows, want = lines(made / "metadata.jsonl"), phis(made)
    assert len(rows) == 9 and [row["prompt"] for row in rows] == [p for p in PROMPTS for _ in range(3)]
    for row in rows:
        mine = want[row["prompt"]]
        assert row["chosen_score"] == pytest.approx(mine[row["chosen_file_name"]], abs=1e-8)
        assert row["rejected_score"] == pytest.approx(mine[row["rejected_file_name"]], abs=1e-8)
        assert row["chosen_score"] >= row["rejected_score"]
        assert row.get("tie", False) == (row["chosen_score"] == row["rejected_score"])
        assert (
            row["chosen_model"] == "a"
            and len(row["chosen_weights"]) == 16
            and set(row["scorers"]) == {"clip", "pickscore"}
        )
    found = read_pairs(recipe(made, ties="keep"))
    assert found.report.usable == 9 and found.rows[0].chosen_score == rows[0]["chosen_score"]
    facts = json.loads((made / "make.json").read_text())
    assert facts["counts"]["kept"] == 9 and facts["weights"] == {"clip": 1.0, "pickscore": 1.0}
    with Image.open(made / "sheet.png") as sheet:
        assert sheet.width > 300


def test_another_policy_only_ranks_anew(
    made: Path, tiny_model_folder: Path, scorers: str, prompts: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(made, out)
    before = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in out.rglob("*.png") if p.name != "sheet.png"}
    want = phis(out)
    ends = run(tiny_model_folder, out, scorers, prompts)
    assert {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in before} == before
    rows = lines(out / "metadata.jsonl")
    for row in rows:
        assert row["chosen_score"] == pytest.approx(max(want[row["prompt"]].values()), abs=1e-8)
        assert row["rejected_score"] == pytest.approx(min(want[row["prompt"]].values()), abs=1e-8)
    gaps = sorted(row["chosen_score"] - row["rejected_score"] for row in rows)
    assert ends.counts["kept"] == len(rows) == 3 - ends.counts["ties"]
    one = run(tiny_model_folder, out, scorers.split(",")[0], prompts, policy="adjacent")
    rows = lines(out / "metadata.jsonl")
    assert one.counts["kept"] == 6 and rows[0]["rejected_file_name"] == rows[1]["chosen_file_name"]
    assert rows[0]["chosen_score"] == rows[0]["chosen_clip"], "a single scorer's scores are not turned into wins"
    wide = run(tiny_model_folder, out, scorers, prompts, gap=gaps[-1])
    assert wide.counts["kept"] == sum(gap >= gaps[-1] for gap in gaps)
    with pytest.raises(UserError, match=r"no pairs left in .* 3 pairs compared, .* 0 kept; lower --gap"):
        run(tiny_model_folder, out, scorers, prompts, gap=1.5)
    assert len(lines(out / "metadata.jsonl")) == wide.counts["kept"], "what was written stays"


def test_ranked_lists_of_several_models(
    made: Path, tiny_model_folder: Path, scorers: str, prompts: Path, tmp_path: Path
) -> None:
    """The same model twice draws the same pictures: all of the second are left out."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    models = [f"a={tiny_model_folder}", f"b={tiny_model_folder}"]
    found = run(tiny_model_folder, tmp_path, scorers, prompts, *models, form="ranked")
    assert found.counts["pictures"] == 18 and found.counts["identical"] == 9
    rows = lines(tmp_path / "metadata.jsonl")
    assert all(set(row["models"]) == {"a"} and len(row["images"]) == 3 for row in rows)
    for row in rows:
        assert row["scores"] == sorted(row["scores"], reverse=True) and sum(row["scores"]) == pytest.approx(1.5)
    reading = open_ranked(recipe(tmp_path))
    assert [list(r.scores) for r in reading.rows] == [row["scores"] for row in rows]
    both = run(tiny_model_folder, tmp_path, scorers, prompts, *models, form="ranked", dedup="none")
    assert both.counts["identical"] == 0 and len(lines(tmp_path / "metadata.jsonl")[0]["images"]) == 6
    hashes = [[difference_hash(Image.open(tmp_path / name)) for name in row["images"]] for row in rows]
    least = min((a ^ b).bit_count() for of_prompt in hashes for a, b in combinations(of_prompt, 2))
    for near, some in ((least - 1, False), (least, True)):
        found = run(tiny_model_folder, tmp_path, scorers, prompts, form="ranked", near=near)
        assert bool(found.counts["near-identical"]) is some


def test_what_a_kill_leaves_is_gone_on_with(
    made: Path, tiny_model_folder: Path, scorers: str, prompts: Path, tmp_path: Path
) -> None:
    """Half of the pictures, a torn score file, no table: the same bytes in the end."""
    out = tmp_path / "out"
    shutil.copytree(made, out)
    for name in ("metadata.jsonl", "make.json", "sheet.png"):
        (out / name).unlink()
    place = out / "samples" / "a"
    for picture in sorted((place / "images").iterdir())[::2]:
        picture.unlink()
    scored = place / "scores.jsonl"
    scored.write_bytes(scored.read_bytes()[: scored.stat().st_size // 2])
    (place / "images" / "000000-1.partial").write_bytes(b"\x89PNG")
    run(tiny_model_folder, out, scorers, prompts, policy="all", ties="keep")
    (place / "images" / "000000-1.partial").unlink(missing_ok=True)
    assert tree(out) == tree(made)


def command(model: Path, out: Path, scorers: str, prompts: Path) -> list[object]:
    options = ["--steps", 2, "--guidance", 1.0, "--per-prompt", 3, "--batch", 4, "--height", 64, "--width", 64]
    options += ["--device", "cpu", "--quiet", "--choose", "all", "--ties", "keep", "--score-batch", 4]
    return ["pairs", "make", f"a={model}", "--prompts", prompts, "--out", out, "--scorers", scorers, *options]


@pytest.mark.slow
def test_killed_at_any_moment_and_shared_by_two(
    made: Path, tiny_model_folder: Path, scorers: str, prompts: Path, tmp_path: Path
) -> None:
    killed = tmp_path / "killed"
    for delay in np.linspace(1.0, 6.0, 6):
        child = start(*command(tiny_model_folder, killed, scorers, prompts))
        time.sleep(float(delay))
        child.send(signal.SIGKILL)
        child.wait()
    done = diffalign(*command(tiny_model_folder, killed, scorers, prompts))
    assert done.status == 0, done.err
    for partial in killed.rglob("*.partial"):
        partial.unlink()
    assert tree(killed) == tree(made)
    head = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0"]
    head += ["--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0", "-m", "diffalign"]
    two = [*head, *map(str, command(tiny_model_folder, tmp_path / "two", scorers, prompts))]
    shared = subprocess.run(two, capture_output=True, text=True, timeout=300)
    assert shared.returncode == 0, shared.stderr
    assert tree(tmp_path / "two") == tree(made)
    assert shared.stdout.count("written:") == 1, "one process speaks"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--per-prompt", "1"], "one picture a prompt has nothing to be compared with; set --per-prompt 4"),
        (["--gap", "-1"], "--gap -1 is below 0"),
        (["--near", "99"], "--near 99 is not from 0 to 32"),
        (["--near", "2", "--dedup", "none"], "--near goes with --dedup exact"),
        (["--weights", "clip=x"], "--weights clip=x: a weight is a positive number"),
        (["--scorers", "clop"], "unknown scorer 'clop'; did you mean"),
        (["--prompts", "absent.txt"], "'absent.txt' does not exist"),
    ],
)
def test_bad_input_in_one_line(scorers: str, prompts: Path, tmp_path: Path, options: list[str], says: str) -> None:
    base = ["--prompts", prompts, "--scorers", scorers, "--out", tmp_path / "out"]
    base += [] if "--per-prompt" in options else ["--per-prompt", 3]
    done = diffalign("pairs", "make", "tiny-sd", *base, *options)
    assert done.status == 2 and says in done.line
    assert not (tmp_path / "out").exists()


def test_other_peoples_pairs_are_not_written_over(
    tiny_model_folder: Path, scorers: str, prompts: Path, tmp_path: Path
) -> None:
    (tmp_path / "metadata.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match="holds pairs that this command did not make"):
        run(tiny_model_folder, tmp_path, scorers, prompts)
    assert (tmp_path / "metadata.jsonl").read_text() == "{}\n"
