"""``pairs convert``: between all formats and back, the same bytes, ids and labels; safe under kills and full disks."""

from __future__ import annotations

import errno
import io
import json
import os
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from command import diffalign
from PIL import Image
from test_data_formats import SCHEMA, pick_a_pic, write_pick_a_pic
from test_data_readers import COUNT, good, pairs, png, recipe, worse, write_folder

from diffalign.data import convert, writers
from diffalign.data.convert import Converted, ConvertOptions, convert_pairs
from diffalign.data.readers import read_pairs
from diffalign.data.rowfile import read_rows
from diffalign.data.rowtable import Packed
from diffalign.errors import RunError, UserError

FORMATS = list(writers.WRITERS)


def run(
    source: Path, target: Path, form: str, *, link: bool = False, resize: int | None = None, **data: Any
) -> Converted:
    options = ConvertOptions(form, resize, data.pop("quality", None), link)
    return convert_pairs(recipe(source, **{"ties": "keep", "duplicates": "keep", **data}), target, options)


def facts(path: Path) -> list[tuple[Any, ...]]:
    """Everything that a pair is."""
    rows = read_pairs(recipe(path, ties="keep", duplicates="keep")).rows
    return [
        (r.id, r.prompt, r.chosen.read(), r.rejected.read(), r.chosen_score, r.rejected_score, r.tie, r.rejected_prompt)
        for r in rows
    ]


def tree(folder: Path) -> dict[str, bytes]:
    """Every file but the report, which names its place."""
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in folder.rglob("*")
        if p.is_file() and p.name != "convert.json"
    }


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs with ids, scores and a tie."""
    rows = pairs(
        id=lambda i: str(50 + i), chosen_score=lambda i: i + 0.5, rejected_score=lambda i: -i, tie=lambda i: i == 3
    )
    buffer = io.BytesIO()
    Image.open(io.BytesIO(good(2))).save(buffer, "JPEG")
    rows[2]["chosen"] = buffer.getvalue()
    rows[4]["prompt"] = 'quotes "and", commas\nand lines, 日本'
    return write_folder(tmp_path_factory.mktemp("source"), rows)


@pytest.mark.parametrize("form", FORMATS)
def test_there_and_back_between_all_formats(form: str, source: Path, tmp_path: Path) -> None:
    expected = facts(source)
    assert len(expected) == COUNT and sum(row[6] for row in expected) == 1
    first = run(source, tmp_path / form, form)
    assert (first.report.usable, first.report.ties_kept) == (COUNT, 1) and facts(tmp_path / form) == expected
    assert not list(tmp_path.rglob(".*")), "nothing hidden stays"
    for other in FORMATS:
        run(tmp_path / form, tmp_path / f"{form}-{other}", other)
        assert facts(tmp_path / f"{form}-{other}") == expected, (form, other)


def write_rated(folder: Path) -> Path:
    """Rated pictures, the last row twice."""
    rows = [{"prompt": f"thing {i}", "image": f"{i}.png", "label": i % 3 == 0} for i in (*range(5), 4)]
    return _written(folder, rows, 5)


def write_lists(folder: Path) -> Path:
    """Lists of three and of two pictures with ids, a further score, and one whose scores are all equal."""
    lists = [((0, 1, 2), (0.1, 0.9, 0.5)), ((3, 4), (0.7, 0.2)), ((2, 0), (0.5, 0.5))]
    rows = [
        {"id": f"n{n}", "prompt": f"thing {n}", "images": [f"{k}.png" for k in places], "scores": scores}
        | {"hps": [20.0 + k for k in places]}
        for n, (places, scores) in enumerate(lists)
    ]
    return _written(folder, rows, 5)


def _written(folder: Path, rows: list[dict[str, Any]], pictures: int) -> Path:
    folder.mkdir()
    for k in range(pictures):
        (folder / f"{k}.png").write_bytes(good(k))
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def rows_of(path: Path, kind: str, **data: Any) -> list[tuple[Any, ...]]:
    """Everything that a rated picture or a list is, but for its id."""
    found, _ = read_rows(recipe(path, **{"ties": "keep", "duplicates": "keep", **data}), kind)
    assert isinstance(found, Packed)
    return [(r.prompt, [ref.read() for ref in r.images.values()], r.columns) for r in found]


def test_rated_pictures_there_and_back(tmp_path: Path) -> None:
    source = write_rated(tmp_path / "source")
    expected = rows_of(source, "rated")
    assert [row[2]["label"] for row in expected] == [1, -1, -1, 1, -1, -1]
    forms = [form for form in FORMATS if "rated" in writers.WRITERS[form].kinds]
    assert forms == ["folder", "jsonl", "csv", "parquet", "datasets", "webdataset"]
    for first, second in zip(forms, forms[1:] + forms[:1], strict=True):
        run(source, tmp_path / first, first)
        assert rows_of(tmp_path / first, "rated") == expected, first
        run(tmp_path / first, tmp_path / f"{first}-{second}", second)
        assert rows_of(tmp_path / f"{first}-{second}", "rated") == expected, (first, second)
    found = run(source, tmp_path / "once", "folder", duplicates="skip")
    assert found.report.counts == {"duplicate": 1} and rows_of(tmp_path / "once", "rated") == expected[:5]
    data = datasets.load_dataset(
        "imagefolder", data_dir=str(tmp_path / "folder"), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert data[0]["image"].size == (24, 16) and data[1]["label"] is False
    with pytest.raises(UserError, match=r"holds rated pictures, and pickapic has no place for them; take folder, jso"):
        run(source, tmp_path / "no", "pickapic")


def test_ranked_lists_there_and_back(tmp_path: Path) -> None:
    source = write_lists(tmp_path / "source")
    expected = rows_of(source, "ranked", rewards=["hps"])
    assert [row[2]["hps_0"] for row in expected] == [21, 23, 22] and len(expected) == 3
    forms = [form for form in FORMATS if "ranked" in writers.WRITERS[form].kinds]
    assert forms == ["folder", "jsonl", "parquet", "datasets"]
    for first, second in zip(forms, forms[1:] + forms[:1], strict=True):
        run(source, tmp_path / first, first, rewards=["hps"])
        assert rows_of(tmp_path / first, "ranked", rewards=["hps"]) == expected, first
        run(tmp_path / first, tmp_path / f"{first}-{second}", second)
        plain = rows_of(tmp_path / f"{first}-{second}", "ranked")
        assert plain == rows_of(source, "ranked"), (first, second)
    assert [row.id for row in read_rows(recipe(tmp_path / "parquet", ties="keep"), "ranked")[0]] == ["n0", "n1", "n2"]
    found = run(source, tmp_path / "uneven", "jsonl", ties="skip")
    assert found.report.counts == {"tie": 1} and len(rows_of(tmp_path / "uneven", "ranked")) == 2
    for form in ("csv", "webdataset", "pickapic"):
        with pytest.raises(UserError, match=f"holds lists, and {form} has no place for them; take folder"):
            run(source, tmp_path / form, form)
        assert not list(tmp_path.glob(f"*{form}*"))


def test_a_killed_conversion_of_lists_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped after its first row, with a row of the same content yet to come."""
    monkeypatch.setattr(convert, "PIECE_ROWS", 1)
    source = write_lists(tmp_path / "source")
    lines = (source / "metadata.jsonl").read_text().splitlines()
    (source / "metadata.jsonl").write_text("\n".join([*lines, lines[0].replace("n0", "n3")]) + "\n")
    run(source, tmp_path / "whole", "jsonl", duplicates="skip")
    seen: list[int] = []

    def stop(done: int, total: int) -> None:
        seen.append(done)
        raise KeyboardInterrupt

    options = ConvertOptions("jsonl")
    with pytest.raises(KeyboardInterrupt):
        convert_pairs(recipe(source, ties="keep"), tmp_path / "cut", options, stop)
    found = convert_pairs(recipe(source, ties="keep"), tmp_path / "cut", options)
    assert found.gone_on_from == seen[0] == 1 and found.report.counts == {"duplicate": 1}
    assert tree(tmp_path / "cut") == tree(tmp_path / "whole")


def test_what_others_open(tmp_path: Path) -> None:
    """The `datasets` library reads what is written as the hub's formats."""
    source = write_folder(tmp_path / "source", pairs())
    for form in ("folder", "parquet", "datasets", "webdataset"):
        run(source, tmp_path / form, form)
    saved = datasets.load_from_disk(str(tmp_path / "datasets"))
    options = {"split": "train", "cache_dir": str(tmp_path / "cache")}
    parquet = datasets.load_dataset("parquet", data_files=str(tmp_path / "parquet" / "*.parquet"), **options)
    folder = datasets.load_dataset("imagefolder", data_dir=str(tmp_path / "folder"), **options)
    for data, column in ((saved, "chosen"), (parquet, "chosen"), (folder, "chosen")):
        assert data[0][column].size == (24, 16) and data[1]["prompt"] == "a thing, no 1"
        assert isinstance(data.features["rejected"], datasets.Image)
    stream = datasets.load_dataset(
        "webdataset", data_files=str(tmp_path / "webdataset" / "*.tar"), streaming=True, split="train"
    )
    first = next(iter(stream.decode(False)))
    assert first["json"]["prompt"] == "a thing, no 0" and "chosen.png" in first


def test_pick_a_pic_keeps_its_columns(tmp_path: Path) -> None:
    rows = [pick_a_pic(i, (1.0, 0.0, 0.5)[i % 3]) for i in range(9)]
    source = write_pick_a_pic(tmp_path / "a", rows, 4)
    run(source, tmp_path / "b", "pickapic")
    table = pq.read_table(tmp_path / "b" / "part-00000.parquet")
    assert table.schema.equals(SCHEMA) and table.equals(pa.Table.from_pylist(rows, SCHEMA))
    run(tmp_path / "b", tmp_path / "c", "jsonl")
    run(tmp_path / "c", tmp_path / "d", "pickapic")
    made = pq.read_table(tmp_path / "d" / "part-00000.parquet").to_pylist()
    assert [row["ranking_id"] for row in made] == [1000 + i for i in range(9)]
    assert [(row["label_0"], row["label_1"]) for row in made[:3]] == [(1, 0), (1, 0), (0.5, 0.5)]
    assert facts(tmp_path / "d") == facts(source)


def test_flaws_are_left_out_and_listed(tmp_path: Path) -> None:
    rows = pairs()
    rows[1]["chosen"] = b"no picture"
    rows[2]["rejected"] = "images/none.png"
    rows[3] = dict(rows[0])
    write_folder(tmp_path / "s", rows)
    with open(tmp_path / "s" / "metadata.jsonl", "a") as file:
        file.write("{half\n")
    done = run(tmp_path / "s", tmp_path / "t", "parquet")
    assert done.report.counts == {"malformed row": 1, "unreadable image": 1, "missing image": 1}
    listed = [json.loads(line) for line in (tmp_path / "t" / "skipped.jsonl").read_text().splitlines()]
    assert {row["reason"] for row in listed} == set(done.report.counts) and len(facts(tmp_path / "t")) == COUNT - 2
    lean = run(tmp_path / "s", tmp_path / "u", "parquet", duplicates="skip")
    assert lean.report.counts["duplicate"] == 1
    with pytest.raises(UserError, match=r"data\.strict: "):
        run(tmp_path / "s", tmp_path / "v", "parquet", strict=True)
    assert not (tmp_path / "v").exists() and not (tmp_path / ".v.partial").exists()
    few = run(tmp_path / "s", tmp_path / "w", "csv", max_pairs=2)
    assert few.report.usable == 2 and few.report.rows == 5
    with pytest.raises(UserError, match="no usable pair"):
        run(tmp_path / "s", tmp_path / "x", "csv", min_gap=1)
    assert not (tmp_path / "x").exists()


def test_links_sizes_and_quality(source: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "l", "folder", link=True)
    link = next((tmp_path / "l" / "images").rglob("*-chosen.png"))
    assert link.is_symlink() and facts(tmp_path / "l") == facts(source)
    large = [{"prompt": "x", "chosen": png(1, (200, 100)), "rejected": png(2, (40, 50))}]
    write_folder(tmp_path / "s", large)
    run(tmp_path / "s", tmp_path / "r", "parquet", resize=64)
    (row,) = read_pairs(recipe(tmp_path / "r")).rows
    assert row.chosen.size == (128, 64) and row.rejected.read() == large[0]["rejected"], "none is enlarged"
    run(tmp_path / "s", tmp_path / "q", "parquet", quality=80)
    (row,) = read_pairs(recipe(tmp_path / "q")).rows
    assert row.chosen.read()[:2] == b"\xff\xd8" and row.chosen.size == (200, 100)
    for options in ({"form": "parquet"}, {"form": "folder", "resize": 9}):
        with pytest.raises(UserError, match="--link"):
            run(source, tmp_path / "no", link=True, **options)  # type: ignore[arg-type]


def test_targets_that_cannot_be(source: Path, tmp_path: Path) -> None:
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "mine.txt").write_text("x")
    with pytest.raises(UserError, match="exists already"):
        run(source, tmp_path / "t", "csv")
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot be written"):
        run(source, tmp_path / "file" / "t", "csv")
    done = run(source, tmp_path / "u", "csv")
    before = tree(tmp_path / "u")
    again = run(source, tmp_path / "u", "csv")
    assert again.report == done.report and tree(tmp_path / "u") == before
    with pytest.raises(UserError, match="exists already"):
        run(source, tmp_path / "u", "csv", max_pairs=2)
    rows = pairs(rejected_prompt=lambda i: "other")
    with pytest.raises(UserError, match="no place for 'rejected_prompt'"):
        run(write_folder(tmp_path / "r", rows), tmp_path / "p", "pickapic")


class Stopped(BaseException):
    """Stands for a kill: nothing may catch it."""


@pytest.mark.parametrize("form", FORMATS)
def test_stopped_at_every_piece_it_goes_on(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of two rows; stopped before and after each note; the end is the same bytes, the same rows left out."""
    rows = pairs()
    rows[1]["chosen"] = b"no picture"
    rows += [dict(rows[i]) for i in (0, 2, 5)]
    source = write_folder(tmp_path / "source", rows)
    monkeypatch.setattr(convert, "PIECE_ROWS", 2)
    options: dict[str, Any] = {"duplicates": "skip", "near_duplicates": 2}
    run(source, tmp_path / "straight", form, **options)
    replace, calls, stops = os.replace, 0, 0

    def stopping(a: Any, b: Any) -> None:
        nonlocal calls, stops
        calls += 1
        if calls in (2, 5, 10):
            stops += 1
            raise Stopped
        replace(a, b)
        if calls in (1, 4, 7):
            stops += 1
            raise Stopped

    monkeypatch.setattr(os, "replace", stopping)
    for _ in range(9):
        try:
            done = run(source, tmp_path / "t", form, **options)
            break
        except Stopped:
            continue
    assert stops == 6 and done.report.counts == {"duplicate": 3, "unreadable image": 1}
    assert len((tmp_path / "t" / "skipped.jsonl").read_text().splitlines()) == 4
    assert tree(tmp_path / "t") == tree(tmp_path / "straight")


def test_a_full_disk_keeps_what_is_written(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert, "PIECE_ROWS", 2)
    run(source, tmp_path / "straight", "webdataset")
    commit, calls = writers.WebDatasetWriter.commit, 0

    def full(self: writers.WebDatasetWriter) -> dict[str, Any]:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return commit(self)

    monkeypatch.setattr(writers.WebDatasetWriter, "commit", full)
    with pytest.raises(RunError, match=r"disk full: .*; 4 rows are kept: free some space"):
        run(source, tmp_path / "t", "webdataset")
    done = run(source, tmp_path / "t", "webdataset")
    assert (done.gone_on_from, done.report.ties_kept) == (4, 1) and tree(tmp_path / "t") == tree(tmp_path / "straight")


def test_the_command(source: Path, tmp_path: Path) -> None:
    done = diffalign("pairs", "convert", source, tmp_path / "t", "--format", "webdataset", "--max", 3, "--json")
    assert done.status == 0 and json.loads(done.out)["usable"] == 3
    told = diffalign("pairs", "convert", tmp_path / "t", tmp_path / "u", "--format", "pickapic")
    assert told.status == 0 and "3 pairs -> " in told.out and "3 rows, 3 usable" in told.out
    refused = diffalign("pairs", "convert", source, tmp_path / "t", "--format", "csv")
    assert refused.status == 2 and "exists already" in refused.line
    gap = diffalign("pairs", "check", source, "min_gap=4", "duplicates=skip")
    assert gap.status == 0 and "score gap below data.min_gap" in gap.out
    assert worse(0) == facts(tmp_path / "u")[0][3]
