"""`diffalign sets` and `diffalign geneval`: what they keep, what the report takes from it, what they refuse."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command import diffalign
from eval_tiny import write_samples, write_tiny_clip
from PIL import Image

from diffalign.errors import UserError
from diffalign.eval.evaluate import evaluate
from diffalign.eval.looks import measure
from diffalign.eval.score import score_images
from diffalign.eval.sections import study_view
from diffalign.eval.setscore import by_prompt, measure_sets, read_sets
from diffalign.eval.study import study


def test_metrics_are_kept_and_join_the_looks(tmp_path: Path) -> None:
    clip = write_tiny_clip(tmp_path / "clip")
    sides = []
    for salt, name in enumerate(("base", "tuned")):
        place = write_samples(tmp_path / name, [f"prompt {i}" for i in range(4)], per_prompt=2, salt=salt)
        if name == "tuned":  # no diversity at all
            for file in (place / "images").iterdir():
                Image.new("RGB", (40, 40), (200, 30, 30)).save(file)
        score_images(place, None, f"clip={clip}", place / "scores.jsonl", device="cpu", progress=False)
        found = measure_sets(place, f"diversity_clip={clip}", device="cpu")
        assert found.out == place / "sets.json" and found.results[0].count == 8
        sides.append(place)
    measure_sets(sides[0], f"vendi={clip}", device="cpu")
    assert list(read_sets(sides[0] / "sets.json")) == ["diversity_clip", "vendi"], "what was there stays"
    assert set(by_prompt(sides[1])["diversity_clip"][1]) == {f"p{i:03d}" for i in range(4)}
    looks = measure(study(sides))
    assert looks is not None and "vendi" not in looks.shifts[0], "only one side has it"
    shift = looks.shifts[1]["diversity_clip"]
    assert shift.mean.value == pytest.approx(0, abs=1e-6) and shift.alarming
    assert study_view(study(sides), None, 1).measures[-1] == "diversity_clip"


def test_refusals(tmp_path: Path) -> None:
    place = write_samples(tmp_path / "s", ["one"], per_prompt=2)
    with pytest.raises(UserError, match="no set metric"):
        measure_sets(place, " ")
    with pytest.raises(UserError, match="did you mean 'vendi'"):
        measure_sets(place, "vendy")
    clip = write_tiny_clip(tmp_path / "clip")
    with pytest.raises(UserError, match="--reference"):
        measure_sets(place, f"cmmd={clip}", device="cpu")
    (place / "sets.json").write_text("[1]")
    with pytest.raises(UserError, match="holds no set metrics"):
        measure_sets(place, f"vendi={clip}", device="cpu")


def test_the_commands(tmp_path: Path) -> None:
    listed = json.loads(diffalign("sets", "--json").out)
    assert {"fid", "diversity_clip"} <= {row["name"] for row in listed}
    place = write_samples(tmp_path / "s", ["a cup", "a dog"])
    answers = [{"id": f"p{i:03d}", "prompt": p, "tag": "single_object"} for i, p in enumerate(("a cup", "a dog"))]
    rows = [{**a, "include": [{"class": a["prompt"][2:], "count": 1}]} for a in answers]
    (tmp_path / "set.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    boxes = {"cup": [[0, 0, 9, 9, 0.9]]}
    seen = [{"image": f"images/00000{i}-0.png", "detector": "mine", "detections": boxes} for i in range(2)]
    (tmp_path / "found.jsonl").write_text("".join(json.dumps(row) + "\n" for row in seen))
    options = ("--prompts", tmp_path / "set.jsonl", "--detections", tmp_path / "found.jsonl")
    done = diffalign("geneval", place, *options, "--out", tmp_path / "verdicts.jsonl")
    assert done.status == 0, done.err
    verdicts = [json.loads(line) for line in (tmp_path / "verdicts.jsonl").read_text().splitlines()]
    assert [v["verdict"]["correct"] for v in verdicts] == [True, False] and "single_object" in done.out
    assert diffalign("geneval", place).status == 2


def test_eval_looks_for_a_metrics_weights_before_it_samples(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere"):
        evaluate(
            ["tiny-sd"], "a red circle", "oracle", tmp_path / "out", sets=f"vendi={tmp_path}/nowhere", progress=False
        )
    assert not (tmp_path / "out").exists()
