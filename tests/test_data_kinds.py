"""Rows that are no pairs: prompts alone, rated pictures, ranked lists; from files of their own and from pairs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from small import write_pairs

from diffalign.data import rowfile
from diffalign.data.cache import open_cache
from diffalign.data.convert import ConvertOptions, convert_pairs
from diffalign.data.rowfile import read_rows
from diffalign.data.rowtable import PromptRows
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
