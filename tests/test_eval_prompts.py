"""Prompt files of the usual sets, the set that ships, and `diffalign prompts`."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from command import diffalign

from diffalign.errors import UserError
from diffalign.eval.prompts import describe_set, is_source, read_prompts, set_name, text_id

RELATIONS = {"left of", "right of", "above", "below"}
COLOURS = {"red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white"}


def test_parti_prompts_keep_their_quotes(tmp_path: Path) -> None:
    rows = 'Prompt\tCategory\tChallenge\tNote\na "STOP" sign\tArtifacts\tWriting & Symbols\t\n'
    rows += '"bare quote\tAbstract\tBasic\tx\n'
    (tmp_path / "PartiPrompts.tsv").write_text(rows)
    found = read_prompts(tmp_path / "PartiPrompts.tsv")
    assert [(p.prompt, p.category) for p in found] == [('a "STOP" sign', "Artifacts"), ('"bare quote', "Abstract")]
    assert found[0].id == text_id('a "STOP" sign')


def test_hpdv2_lists_and_folders(tmp_path: Path) -> None:
    folder = tmp_path / "benchmark"
    folder.mkdir()
    (folder / "anime.json").write_text(json.dumps(["a girl", "a boy"]))
    (folder / "photo.json").write_text(json.dumps(["a girl"]))
    found = read_prompts(str(folder))
    assert [(p.id, p.category) for p in found] == [
        ("anime-00000", "anime"),
        ("anime-00001", "anime"),
        ("photo-00000", "photo"),
    ]
    (tmp_path / "all.json").write_text(json.dumps({"anime": ["a girl", "a boy"], "photo": ["a girl"]}))
    assert read_prompts(tmp_path / "all.json") == found
    (tmp_path / "list.json").write_text(json.dumps([{"id": 4, "prompt": "x"}, {"id": 5, "prompt": "y"}]))
    assert [p.id for p in read_prompts(tmp_path / "list.json")] == ["4", "5"]


def test_geneval_metadata_keeps_the_answer(tmp_path: Path) -> None:
    row = {
        "tag": "position",
        "include": [{"class": "dog", "count": 1}, {"class": "cat", "count": 1, "position": ["left of", 0]}],
        "prompt": "a photo of a cat left of a dog",
    }
    (tmp_path / "evaluation_metadata.jsonl").write_text(json.dumps(row) + "\n")
    (found,) = read_prompts(tmp_path / "evaluation_metadata.jsonl")
    assert found.category == "position" and found.answer == {"tag": "position", "include": row["include"]}


def test_coco_captions(tmp_path: Path) -> None:
    notes = [{"image_id": 9, "id": 100 + n, "caption": "a man rides a wave"} for n in range(2)]
    (tmp_path / "captions.json").write_text(json.dumps({"images": [], "annotations": notes}))
    assert [p.id for p in read_prompts(tmp_path / "captions.json")] == ["100", "101"]


def test_pick_a_pic_takes_each_caption_once(tmp_path: Path) -> None:
    rows = [{"caption": c, "label_0": 1.0, "jpg_0": b"x"} for c in ("a cat", "a dog", "a cat")]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "test_unique.parquet")
    assert [p.prompt for p in read_prompts(tmp_path / "test_unique.parquet")] == ["a cat", "a dog"]
    pq.write_table(pa.Table.from_pylist([{"prompt": "x"}, {"prompt": "x"}]), tmp_path / "plain.parquet")
    assert [p.id for p in read_prompts(tmp_path / "plain.parquet")] == [text_id("x"), f"{text_id('x')}-2"]


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.json", "[1, 2]", "entry 1 of"),
        ("b.json", '{"a": 1}', "no list of prompts"),
        ("c.json", "[", "not JSON"),
        ("d.parquet", "nothing", "not a Parquet file"),
        ("e.json", '{"anime": ["x", ""]}', "line 2 of .* empty prompt"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, text: str, says: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=says):
        read_prompts(tmp_path / name)


def test_folders_without_lists(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no \.json list"):
        read_prompts(tmp_path)


def test_names_of_sources(tmp_path: Path) -> None:
    assert set_name("tiny-heldout") == "tiny-heldout" and set_name("x/parti.tsv") == "parti"
    assert set_name("a cat on a mat") == "text" and not is_source("a cat on a mat")


def test_the_set_that_ships() -> None:
    """Ids and texts differ, answers are whole, and the hash is what results of this version carry."""
    found = describe_set("everyday")
    facts = found.json()
    assert facts["prompts"] == 213 == len({p.prompt for p in found.prompts}) and facts["with_answers"] == 169
    assert str(facts["sha256"]).startswith("bb73423fa96f6276")
    for prompt in found.prompts:
        if prompt.answer is None:
            continue
        include = prompt.answer["include"]
        assert prompt.answer["tag"] == prompt.category and isinstance(include, list) and include
        for place, part in enumerate(include):
            assert part["count"] >= 1 and part.get("color", "red") in COLOURS
            if "color" in part:
                assert f"{part['color']} {part['class']}" in prompt.prompt
            if "position" in part:
                relation, other = part["position"]
                assert relation in RELATIONS and other < place and relation.split()[0] in prompt.prompt
        if prompt.category == "counting":
            (wanted,), (barred,) = include, prompt.answer["exclude"]
            assert barred == {"class": wanted["class"], "count": wanted["count"] + 1}


def test_the_command(tmp_path: Path) -> None:
    listed = diffalign("prompts", "--json")
    rows = {row["name"]: row for row in json.loads(listed.out)}
    assert rows["everyday"]["prompts"] == 213 and rows["tiny-single"]["categories"] == {"single": 24}
    shown = diffalign("prompts", "everyday")
    assert shown.status == 0 and "counting" in shown.out and rows["everyday"]["sha256"] in shown.out
    (tmp_path / "mine.txt").write_text("one\ntwo\n")
    mine = json.loads(diffalign("prompts", tmp_path / "mine.txt", "--json").out)
    assert mine["prompts"] == 2 and mine["name"] == "mine"
    wrong = diffalign("prompts", "everyda")
    assert wrong.status == 2 and "did you mean 'everyday'" in wrong.line
