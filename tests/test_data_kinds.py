"""Rows that are no pairs: prompts alone, rated pictures, ranked lists; from files of their own and from pairs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from small import picture, write_pairs

from diffalign.data import rowfile
from diffalign.data.cache import open_cache
from diffalign.data.convert import ConvertOptions, convert_pairs
from diffalign.data.rowfile import read_rows
from diffalign.data.rowkinds import RatedRows
from diffalign.data.rowtable import PromptRows, Stream
from diffalign.errors import UserError
from diffalign.families import Model, load_model
from diffalign.recipe import DataRecipe, ModelRecipe


def recipe(path: str | Path, folder: Path, **options: Any) -> DataRecipe:
    return DataRecipe(path=str(path), cache_dir=str(folder / "cache"), **options)


@pytest.fixture(scope="module")
def model(tiny_model_folder: Path) -> Model:
    return load_model(ModelRecipe(path=str(tiny_model_folder)), torch.device("cpu"), torch.float32)


# ---- prompts ------------------------------------------------------------------------------------------------------


def test_prompts_come_from_lists_tables_sets_and_pairs(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a red cat\n\na blue dog\na red cat\n")
    lines = [{"prompt": "a red cat"}, {"prompt": ""}, {"caption": 3}, {"prompt": "a blue dog"}, {"prompt": "a red cat"}]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "p.csv").write_text("text\na red cat\na blue dog\n")
    for name in ("p.txt", "p.jsonl", "p.csv"):
        rows, report = read_rows(recipe(tmp_path / name, tmp_path), "prompt")
        assert isinstance(rows, PromptRows) and [row.prompt for row in rows] == ["a red cat", "a blue dog"], name
    assert report.summary() == "2 rows, 2 usable"
    _, report = read_rows(recipe(tmp_path / "p.jsonl", tmp_path), "prompt")
    assert report.counts == {"no prompt": 2, "repeated prompt": 1} and report.usable == 2
    heldout, _ = read_rows(recipe("tiny-heldout", tmp_path, max_pairs=3), "prompt")
    assert len(heldout) == 3 and len({row.id for row in heldout}) == 3
    pairs = write_pairs(tmp_path / "pairs", 6)
    (pairs / "0-a.png").unlink()  # pictures are not looked at
    rows, report = read_rows(recipe(pairs, tmp_path), "prompt")
    assert [row.prompt for row in rows] == [json.loads(t)["prompt"] for t in (pairs / "metadata.jsonl").open()]
    with pytest.raises(UserError, match="no column 'prompt' or 'caption' or 'text'"):
        (tmp_path / "q.csv").write_text("words\nx\n")
        read_rows(recipe(tmp_path / "q.csv", tmp_path), "prompt")


@pytest.mark.parametrize("cache", [True, False])
def test_prompts_are_cached_without_pictures(tmp_path: Path, model: Model, cache: bool) -> None:
    (tmp_path / "p.txt").write_text("a red cat\na blue dog\n")
    made = recipe(tmp_path / "p.txt", tmp_path, cache=cache, resolution=64)
    rows, _ = read_rows(made, "prompt")
    found = open_cache(rows, model, made, tmp_path / "cache")
    batch = found.batch([1, 0], [0, 0])
    assert batch.latents == {} and batch.prompts == ("a blue dog", "a red cat")
    torch.testing.assert_close(batch.cond["prompt"].embeds, model.encode_prompts(["a blue dog", "a red cat"]).embeds)
    assert batch.sizes["image"].tolist() == [[64, 64, 0, 0, 64, 64]] * 2
    assert found.places.tolist() == [0, 0]
    if cache:
        assert found.encoded == 4 and len(found.stores["pictures"]) == 0, "with the empty and the unconditional one"
        assert open_cache(rows, model, made, tmp_path / "cache").encoded == 0


# ---- users of pairs -----------------------------------------------------------------------------------------------


def with_columns(folder: Path, *columns: dict[str, Any]) -> Path:
    """Pairs whose metadata have these columns besides, one dict a row."""
    rows = [json.loads(line) for line in (write_pairs(folder, len(columns)) / "metadata.jsonl").open()]
    lines = [json.dumps(row | more) for row, more in zip(rows, columns, strict=True)]
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def test_users_of_pairs_are_numbers_in_batches(tmp_path: Path, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rowfile, "KEEP_FROM", 1)
    data = with_columns(tmp_path / "pairs", {"user": "zoe"}, {"user": 7}, {}, {"user": "zoe"})
    made = recipe(data, tmp_path, resolution=64)
    for _ in range(2):  # read, then mapped
        rows, _ = read_rows(made, "pair")
        assert [row.user for row in rows] == ["zoe", "7", None, "zoe"] and rows.users == ["7", "zoe"]
    batch = open_cache(rows, model, made, tmp_path / "cache").batch([3, 1, 2], [0, 0, 0])
    assert batch.columns["user"].tolist()[:2] == [1, 0] and batch.columns["user"][2].isnan()
    convert_pairs(made, tmp_path / "parquet", ConvertOptions("parquet"))
    assert read_rows(recipe(tmp_path / "parquet", tmp_path), "pair")[0].users == ["7", "zoe"]
    plain, _ = read_rows(recipe(write_pairs(tmp_path / "plain", 2), tmp_path), "pair")
    assert plain.users == [] and "user" not in plain.columns


# ---- rated pictures -----------------------------------------------------------------------------------------------


def test_rated_pictures_and_their_labels(tmp_path: Path, model: Model) -> None:
    labels = [1, -1, True, "false", "+1", "exclusive_lose", 0.5, None]
    for i in range(len(labels)):
        picture(i).save(tmp_path / f"{i}.png")
    lines = [{"prompt": f"a thing {i}", "image": f"{i}.png", "label": label} for i, label in enumerate(labels)]
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    made = recipe(tmp_path, tmp_path, resolution=64)
    rows, report = read_rows(made, "rated")
    assert [row.label for row in rows] == [1, -1, 1, -1, 1, -1]
    assert report.counts == {"bad label": 1, "no label": 1}
    assert list(rows.groups) == list(rows.ids)
    batch = open_cache(rows, model, made, tmp_path / "cache").batch([1, 2], [0, 0])
    assert list(batch.latents) == ["image"] and batch.columns["label"].tolist() == [-1, 1]
    turned, _ = read_rows(recipe(tmp_path, tmp_path, shuffle_labels=True), "rated")
    assert [row.id for row in turned] == [row.id for row in rows] and [r.label for r in turned] != [1, -1, 1, -1, 1, -1]
    with pytest.raises(UserError, match=r"data\.min_gap .* the data are single pictures; remove it"):
        read_rows(recipe(tmp_path, tmp_path, min_gap=0.1), "rated")
    with pytest.raises(UserError, match="no column 'label' or 'split'"):
        (tmp_path / "metadata.jsonl").write_text(json.dumps({"prompt": "a", "image": "0.png"}))
        read_rows(made, "rated")


@pytest.mark.parametrize("streaming", [False, True])
def test_pairs_are_two_rated_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streaming: bool) -> None:
    monkeypatch.setattr(rowfile, "KEEP_FROM", 1)
    data = with_columns(tmp_path / "pairs", {}, {"rejected_prompt": "another"}, {"tie": True})
    pairs, _ = read_rows(recipe(data, tmp_path / "apart", ties="keep"), "pair")
    for mapped in (False, True):
        rows, _ = read_rows(recipe(data, tmp_path, ties="keep", streaming=streaming), "rated")
        assert isinstance(rows, Stream) == (streaming and not mapped)
        rows = rows.gather() if isinstance(rows, Stream) else rows
        assert isinstance(rows, RatedRows) and sorted(rows.ids) == sorted(p.id + s for p in pairs[:2] for s in "+-")
        assert set(rows.groups) == {p.id for p in pairs[:2]}, "both pictures of a pair are held out together"
        by_id = {row.id: row for row in rows}
        for pair in pairs[:2]:
            good, bad = by_id[pair.id + "+"], by_id[pair.id + "-"]
            assert (good.label, bad.label) == (1, -1) and good.prompt == pair.prompt
            assert bad.prompt == (pair.rejected_prompt or pair.prompt)
            assert good.image.digest == pair.chosen.digest and bad.image.digest == pair.rejected.digest
            if not streaming:
                assert bad.image.read() == pair.rejected.read()


# ---- ranked lists -------------------------------------------------------------------------------------------------


def ranked_folder(folder: Path) -> Path:
    folder.mkdir()
    for k in range(6):
        picture(k).save(folder / f"{k}.png")
    lists = [([0, 1, 2], [0.1, 0.9, 0.5]), ([3, 4], [0.7, 0.2]), ([5], [1.0])]
    lines = [
        {"prompt": f"a thing {n}", "images": [f"{k}.png" for k in pictures], "scores": scores}
        for n, (pictures, scores) in enumerate(lists)
    ]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_lists_are_padded_to_the_longest_and_cached(
    tmp_path: Path, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rowfile, "KEEP_FROM", 1)
    data = ranked_folder(tmp_path / "lists")
    made = recipe(data, tmp_path, resolution=64)
    for _ in range(2):  # read, then mapped
        rows, report = read_rows(made, "ranked")
        assert rows.sides == ("image_0", "image_1", "image_2") and [len(row.pictures) for row in rows] == [3, 3]
        assert [row.scores for row in rows] == [(0.9, 0.5, 0.1), (0.7, 0.2, None)]
        assert report.counts == {"malformed row": 1} and "two pictures or more" in str(report.bad[0])
    assert [ref.read() for ref in rows[0].pictures] == [(data / f"{k}.png").read_bytes() for k in (1, 2, 0)]
    found = open_cache(rows, model, made, tmp_path / "cache")
    assert found.encoded == 2 + 2 + 5, "two special prompts, two more, five pictures"
    batch = found.batch([1, 0], [0, 0])
    assert list(batch.latents) == ["image_0", "image_1", "image_2"]
    assert torch.equal(batch.latents["image_1"][0], batch.latents["image_2"][0])
    assert batch.columns["score_2"].isnan().tolist() == [True, False]
    dealt = {row.id: row.pictures for row in read_rows(recipe(data, tmp_path, shuffle_labels=True), "ranked")[0]}
    assert any(dealt[row.id] != row.pictures for row in rows)
    with pytest.raises(UserError, match=r"data.streaming is on; set data.streaming=false"):
        read_rows(recipe(data, tmp_path, streaming=True), "ranked")
    with pytest.raises(UserError, match=r"data\.min_gap .* the data are lists; remove it"):
        read_rows(recipe(data, tmp_path, min_gap=0.1), "ranked")
    (data / "metadata.jsonl").write_text(json.dumps({"prompt": "a", "images": ["5.png"], "scores": [1]}))
    with pytest.raises(UserError, match=r"no usable list .*1 in 'images': a list has two pictures or more"):
        read_rows(made, "ranked")


def test_lists_without_a_better_picture_are_ties(tmp_path: Path) -> None:
    """They would dilute the step: left out and counted, unless further scores tell the pictures apart, or they are to
    be kept."""
    data = ranked_folder(tmp_path / "lists")
    row = {"prompt": "all alike", "images": ["0.png", "1.png"], "scores": [0.5, 0.5], "hps": [0.1, 0.2]}
    with (data / "metadata.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    rows, report = read_rows(recipe(data, tmp_path), "ranked")
    assert len(rows) == 2 and report.counts == {"malformed row": 1, "tie": 1} and not report.flaws[1:]
    assert report.summary() == "4 rows, 2 usable; left out: 1 malformed row, 1 tie"
    rows, report = read_rows(recipe(data, tmp_path, ties="keep"), "ranked")
    assert len(rows) == 3 and report.ties_kept == 1
    (data / "metadata.jsonl").write_text(json.dumps(row))
    assert len(read_rows(recipe(data, tmp_path, rewards=["hps"]), "ranked")[0]) == 1
    with pytest.raises(UserError, match=r"no usable list .*1 tie; first: .*: tie \(all scores are equal\)"):
        read_rows(recipe(data, tmp_path), "ranked")


@pytest.mark.parametrize("streaming", [False, True])
def test_pairs_of_two_equal_scores_are_no_lists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streaming: bool
) -> None:
    monkeypatch.setattr(rowfile, "KEEP_FROM", 1)
    scores = [{"chosen_score": 2.0, "rejected_score": 2.0}, {"chosen_score": 2.0, "rejected_score": 3.0}, {}]
    data = with_columns(tmp_path / "pairs", *scores)
    for _ in range(2):  # read, then mapped
        rows, report = read_rows(recipe(data, tmp_path, streaming=streaming), "ranked")
        rows = rows.gather() if isinstance(rows, Stream) else rows
        assert [row.scores for row in rows] == [(3, 2), (1, 0)]
        assert report.summary() == "3 rows, 2 usable; left out: 1 equal scores"
    kept, report = read_rows(recipe(data, tmp_path, ties="keep"), "ranked")
    assert [row.scores for row in kept] == [(2, 2), (3, 2), (1, 0)] and report.counts == {}
    data = with_columns(tmp_path / "alike", *scores[:1])
    with pytest.raises(UserError, match=r"no usable list in .*: 1 rows, 0 usable; left out: 1 equal scores"):
        rows, _ = read_rows(recipe(data, tmp_path, streaming=streaming), "ranked")
        assert isinstance(rows, Stream)
        rows.gather()


@pytest.mark.parametrize("streaming", [False, True])
def test_pairs_are_lists_of_two(tmp_path: Path, streaming: bool) -> None:
    scores = [{"chosen_score": 2.0, "rejected_score": 3.0}, {"chosen_score": 2.0}, {"tie": True}]
    data = with_columns(tmp_path / "pairs", *scores)
    pairs, _ = read_rows(recipe(data, tmp_path, ties="keep"), "pair")
    rows, _ = read_rows(recipe(data, tmp_path, ties="keep", streaming=streaming), "ranked")
    rows = rows.gather() if isinstance(rows, Stream) else rows
    assert [row.scores for row in rows] == [(3, 2), (1, 0), (1, 1)] and list(rows.ids) == list(pairs.ids)
    digests = [tuple(ref.digest for ref in row.pictures) for row in rows]
    first, *rest = [(pair.chosen.digest, pair.rejected.digest) for pair in pairs]
    assert digests == [first[::-1], *rest]


def test_shuffled_labels_leave_no_trace_in_the_scores(tmp_path: Path) -> None:
    data = with_columns(tmp_path / "pairs", *({"chosen_score": 2.0 + i, "rejected_score": 1.0} for i in range(9)))
    pairs, _ = read_rows(recipe(data, tmp_path), "pair")
    mixed, _ = read_rows(recipe(data, tmp_path, shuffle_labels=True), "pair")
    turned = [a.chosen.digest != b.chosen.digest for a, b in zip(pairs, mixed, strict=True)]
    assert any(turned) and not all(turned)
    assert [row.chosen_score for row in mixed] == [row.chosen_score for row in pairs]
