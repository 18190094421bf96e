"""Every format gives the same pairs, winner first; every flaw is counted or named in one line."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from diffalign.data import scan
from diffalign.data.readers import read_images, read_pairs
from diffalign.errors import UserError
from diffalign.recipe import DataRecipe

COUNT = 7


def png(seed: int, size: tuple[int, int] = (24, 16)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def good(i: int) -> bytes:
    return png(2 * i, (24 + i, 16))


def worse(i: int) -> bytes:
    return png(2 * i + 1, (16, 20 + i))


def recipe(path: Path | str, **options: Any) -> DataRecipe:
    return DataRecipe(path=str(path), **{"cache": False, **options})


def write_folder(folder: Path, rows: list[dict[str, Any]], name: str = "metadata.jsonl") -> Path:
    """Rows with bytes under chosen and rejected become files and paths."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    lines = []
    for i, row in enumerate(rows):
        line = dict(row)
        for key, value in row.items():
            if isinstance(value, bytes):
                (folder / "images" / f"{i}-{key}.png").write_bytes(value)
                line[key] = f"images/{i}-{key}.png"
        lines.append(line)
    if name.endswith(".csv"):
        with open(folder / name, "w", newline="") as file:
            writer = csv.DictWriter(file, list(lines[0]))
            writer.writeheader()
            writer.writerows(lines)
    else:
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def pairs(**more: Callable[[int], Any]) -> list[dict[str, Any]]:
    return [
        {"prompt": f"a thing, no {i}", "chosen": good(i), "rejected": worse(i), **{k: f(i) for k, f in more.items()}}
        for i in range(COUNT)
    ]


def picks(labels: list[float]) -> dict[str, list[Any]]:
    """Pick-a-Pic's columns; jpg_0 is always ``good``."""
    n = len(labels)
    return {
        "caption": [f"a thing, no {i}" for i in range(n)],
        "jpg_0": [good(i) for i in range(n)],
        "jpg_1": [worse(i) for i in range(n)],
        "label_0": labels,
        "label_1": [1 - label for label in labels],
        "has_label": [True] * n,
        "are_different": [True] * n,
        "user_id": list(range(n)),
    }


def write_csv(tmp: Path) -> Path:
    return write_folder(tmp, pairs(), "metadata.csv")


def write_jsonl_elsewhere(tmp: Path) -> Path:
    return write_folder(tmp, pairs(), "mine.jsonl") / "mine.jsonl"


def write_file_names(tmp: Path) -> Path:
    renamed = [
        {"caption": r["prompt"], "chosen_file_name": r["chosen"], "rejected_file_name": r["rejected"]} for r in pairs()
    ]
    return write_folder(tmp, renamed)


def write_parquet(tmp: Path) -> Path:
    pq.write_table(pa.Table.from_pylist(pairs()), tmp / "x.parquet", row_group_size=3)
    return tmp / "x.parquet"


def write_parquet_shards(tmp: Path) -> Path:
    (tmp / "data").mkdir()
    table = pa.Table.from_pylist(
        [
            {
                **row,
                "chosen": {"bytes": row["chosen"], "path": None},
                "rejected": {"bytes": row["rejected"], "path": "x.png"},
            }
            for row in pairs()
        ]
    )
    pq.write_table(table.slice(0, 4), tmp / "data" / "train-00000-of-00002.parquet", row_group_size=2)
    pq.write_table(table.slice(4), tmp / "data" / "train-00001-of-00002.parquet")
    pq.write_table(table.slice(0, 1), tmp / "data" / "test-00000-of-00001.parquet")
    return tmp


def write_parquet_paths(tmp: Path) -> Path:
    write_folder(tmp, pairs(), "all.jsonl")
    rows = [json.loads(line) for line in (tmp / "all.jsonl").read_text().splitlines()]
    pq.write_table(pa.Table.from_pylist(rows), tmp / "x.parquet")
    return tmp


def as_images(rows: list[dict[str, Any]]) -> datasets.Dataset:
    data = datasets.Dataset.from_dict(
        {
            "prompt": [r["prompt"] for r in rows],
            **{k: [{"bytes": r[k], "path": None} for r in rows] for k in ("chosen", "rejected")},
        }
    )
    return data.cast_column("chosen", datasets.Image()).cast_column("rejected", datasets.Image())


def write_dataset(tmp: Path) -> Path:
    as_images(pairs()).save_to_disk(str(tmp / "d"))
    return tmp / "d"


def write_dataset_dict(tmp: Path) -> Path:
    datasets.DatasetDict({"train": as_images(pairs()), "test": as_images(pairs()[:2])}).save_to_disk(str(tmp / "d"))
    return tmp / "d"


def write_picks(tmp: Path) -> Path:
    columns = picks([1.0] * COUNT)
    for i in (1, 4):  # the same preferences, written the other way round
        columns["jpg_0"][i], columns["jpg_1"][i] = columns["jpg_1"][i], columns["jpg_0"][i]
        columns["label_0"][i], columns["label_1"][i] = 0.0, 1.0
    pq.write_table(pa.table(columns), tmp / "pick.parquet", row_group_size=2)
    return tmp


def write_picks_dataset(tmp: Path) -> Path:
    datasets.Dataset.from_dict(picks([1.0] * COUNT)).save_to_disk(str(tmp / "d"))
    return tmp / "d"


WRITERS = [
    write_csv,
    write_jsonl_elsewhere,
    write_file_names,
    write_parquet,
    write_parquet_shards,
    write_parquet_paths,
    write_dataset,
    write_dataset_dict,
    write_picks,
    write_picks_dataset,
]


@pytest.mark.parametrize("write", WRITERS, ids=lambda f: f.__name__[6:])
def test_formats_give_the_same_pairs(write: Callable[[Path], Path], tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    expected = read_pairs(recipe(write_folder(tmp_path / "b", pairs()))).rows
    found = read_pairs(recipe(write(tmp_path / "a")))
    assert found.report.counts == {} and found.report.usable == COUNT
    assert [r.id for r in found.rows] == [r.id for r in expected] and len({r.id for r in expected}) == COUNT
    for i, row in enumerate(found.rows):
        assert row.prompt == f"a thing, no {i}" and not row.tie
        assert row.chosen.read() == good(i) and row.rejected.read() == worse(i)
        assert row.chosen.size == (24 + i, 16) and row.rejected.size == (16, 20 + i)


def test_rows_are_independent_of_the_order_of_reading(tmp_path: Path) -> None:
    """Pictures of Parquet are fetched by row group in any order, and no more than a few groups stay."""
    rows = read_pairs(recipe(write_parquet_shards(tmp_path))).rows
    for i in (6, 0, 3, 5, 0, 2, 1, 4):
        assert rows[i].rejected.read() == worse(i) and rows[i].chosen.read() == good(i)


def test_winner_first_and_ties(tmp_path: Path) -> None:
    labels = [1.0, 0.0, 0.5, 0.5, 0.0, 1.0, 0.5]
    pq.write_table(pa.table(picks(labels)), tmp_path / "x.parquet")
    found = read_pairs(recipe(tmp_path))
    assert found.report.counts == {"tie": 3}
    for row, i in zip(found.rows, (0, 1, 4, 5), strict=True):
        assert row.chosen.read() == (good(i) if labels[i] else worse(i))
        assert row.rejected.read() == (worse(i) if labels[i] else good(i))

    kept = read_pairs(recipe(tmp_path, ties="keep"))
    assert [r.tie for r in kept.rows] == [label == 0.5 for label in labels] and kept.report.ties_kept == 3
    assert all(r.chosen.read() == good(i) for i, r in enumerate(kept.rows) if r.tie)
    assert kept.rows[2].columns["tie"] == 1.0


def test_random_ties_are_a_fair_coin_of_the_id(tmp_path: Path) -> None:
    n = 60
    pq.write_table(pa.table({**picks([0.5] * n), "ranking_id": list(range(100, 100 + n))}), tmp_path / "x.parquet")
    first = read_pairs(recipe(tmp_path, ties="random")).rows
    assert [r.id for r in first] == [str(i) for i in range(100, 100 + n)] and not any(r.tie for r in first)
    heads = sum(r.chosen.read() == good(i) for i, r in enumerate(first))
    assert 18 <= heads <= 42
    again = read_pairs(recipe(tmp_path, ties="random")).rows
    assert [r.chosen.digest for r in again] == [r.chosen.digest for r in first]


def test_shuffled_labels_keep_ids_and_pictures(tmp_path: Path) -> None:
    rows = pairs(chosen_score=lambda i: 1 + i, rejected_score=lambda i: -i, rejected_prompt=lambda i: f"other {i}")
    write_folder(tmp_path, rows)
    plain = read_pairs(recipe(tmp_path)).rows
    mixed = read_pairs(recipe(tmp_path, shuffle_labels=True)).rows
    assert [r.id for r in plain] == [r.id for r in mixed]
    swapped = [a.chosen.digest != b.chosen.digest for a, b in zip(plain, mixed, strict=True)]
    assert 0 < sum(swapped) < COUNT
    for i, (row, turned) in enumerate(zip(mixed, swapped, strict=True)):
        # the scores stay: a method that reads them would else see through the control
        expected = (worse(i), 1 + i, f"other {i}") if turned else (good(i), 1 + i, f"a thing, no {i}")
        assert (row.chosen.read(), row.chosen_score, row.prompt) == expected


def test_written_labels_and_ties(tmp_path: Path) -> None:
    rows = pairs(label=lambda i: [1, 0, 0.5, None, "0.5", "x", 2][i])
    found = read_pairs(recipe(write_folder(tmp_path, rows), ties="keep"))
    assert found.report.counts == {"bad label": 2}
    assert [r.tie for r in found.rows] == [False, False, True, False, True]
    assert found.rows[1].chosen.read() == worse(1) and found.rows[0].chosen.read() == good(0)
    (tmp_path / "t").mkdir()
    flagged = write_folder(
        tmp_path / "t", pairs(tie=lambda i: ["true", "", "0", "1", "False", "yes", "no"][i]), "metadata.csv"
    )
    assert read_pairs(recipe(flagged)).report.counts == {"tie": 3}


def test_pick_a_pic_rules(tmp_path: Path) -> None:
    columns = picks([1.0, 1.0, 0.0, 1.0, 0.3, 1.0, 0.0])
    columns["has_label"][1] = False
    columns["label_1"][3] = 1.0
    columns["label_0"][5] = None
    columns["caption"][6] = " "
    pq.write_table(pa.table(columns), tmp_path / "x.parquet")
    report = read_pairs(recipe(tmp_path)).report
    assert report.counts == {"no label": 2, "bad label": 2, "no prompt": 1} and report.usable == 2
    assert "label_0 1, label_1 1" in next(str(b) for b in report.bad if b.place == "x.parquet row 3")


def test_flaws_are_counted_and_listed(tmp_path: Path) -> None:
    rows = pairs()
    rows[1]["rejected"] = rows[1]["rejected"][:-200]  # truncated
    rows[2]["chosen"] = b"no picture"
    rows[3]["rejected"] = rows[3]["chosen"]  # the same bytes
    rows[4]["rejected"] = rows[0]["rejected"]
    rows[4]["chosen"] = rows[0]["chosen"]
    rows[4]["prompt"] = rows[0]["prompt"]  # the same pair once more
    rows[5]["chosen"] = "images/none.png"
    write_folder(tmp_path, rows)
    with open(tmp_path / "metadata.jsonl", "a") as file:
        file.write(
            '{"prompt": "half a li\n\n[1, 2]\n' + json.dumps({"prompt": "x", "chosen": "images/0-chosen.png"}) + "\n"
        )
        file.write(json.dumps({"prompt": "x", "chosen": 7, "rejected": "https://example.org/a.png"}) + "\n")
    found = read_pairs(recipe(tmp_path))
    assert found.report.counts == {
        "malformed row": 3,
        "unreadable image": 2,
        "missing image": 2,
        "identical images": 1,
        "duplicate": 1,
    }
    assert found.report.rows == 11 and found.report.usable == 2 == len(found.rows)
    listed = {b.place: str(b) for b in found.report.bad}
    assert "images/1-rejected.png" in listed["metadata.jsonl line 2"]
    assert "file does not exist" in listed["metadata.jsonl line 6"]
    assert found.report.json()["left_out"]["duplicate"] == 1 and ("usable", 2) in found.report.table()
    with pytest.raises(
        UserError, match=r"data.strict: 7 of 11 rows .* the first is metadata.jsonl line 8: malformed row"
    ):
        read_pairs(recipe(tmp_path, strict=True))


def test_strict_lets_policies_pass(tmp_path: Path) -> None:
    rows = pairs(tie=lambda i: i == 2)
    rows[3]["rejected"] = rows[3]["chosen"]
    assert read_pairs(recipe(write_folder(tmp_path, rows), strict=True)).report.usable == COUNT - 2


def test_equal_pixels_in_other_bytes(tmp_path: Path) -> None:
    rows = pairs()
    same = io.BytesIO()
    Image.open(io.BytesIO(good(2))).save(same, "PNG", compress_level=0)
    rows[2]["rejected"] = same.getvalue()
    write_folder(tmp_path, rows)
    assert read_pairs(recipe(tmp_path)).report.counts == {"identical images": 1}
    rows[3] = rows[0]
    kept = read_pairs(recipe(write_folder(tmp_path, rows), duplicates="keep")).rows
    assert len(kept) == COUNT and len({r.id for r in kept}) == COUNT and kept[3].id == kept[0].id + "-2"


def test_a_pair_turned_round_is_a_duplicate(tmp_path: Path) -> None:
    rows = pairs()
    rows[5] = {"prompt": rows[1]["prompt"], "chosen": rows[1]["rejected"], "rejected": rows[1]["chosen"]}
    assert read_pairs(recipe(write_folder(tmp_path, rows))).report.counts == {"duplicate": 1}


def test_own_ids_only_where_unique(tmp_path: Path) -> None:
    write_folder(tmp_path / "a", pairs(id=lambda i: f"row-{i}"))
    assert [r.id for r in read_pairs(recipe(tmp_path / "a")).rows] == [f"row-{i}" for i in range(COUNT)]
    write_folder(tmp_path / "b", pairs(id=lambda i: f"row-{i // 2}"))
    found = [r.id for r in read_pairs(recipe(tmp_path / "b")).rows]
    assert found == [r.id for r in read_pairs(recipe(write_folder(tmp_path / "c", pairs()))).rows]


def test_max_pairs_takes_the_first_usable(tmp_path: Path) -> None:
    rows = pairs()
    rows[1]["chosen"] = "none.png"
    found = read_pairs(recipe(write_folder(tmp_path, rows), max_pairs=3))
    assert [r.prompt[-1] for r in found.rows] == ["0", "2", "3"]
    assert found.report.rows == 4 and found.report.available == COUNT


def test_scores_and_second_prompts(tmp_path: Path) -> None:
    columns = {**picks([1.0, 0.0]), "ps_score_0": [21.5, 20.0], "ps_score_1": [19.0, 22.0]}
    pq.write_table(pa.table(columns), tmp_path / "x.parquet")
    rows = read_pairs(recipe(tmp_path)).rows
    assert [(r.chosen_score, r.rejected_score) for r in rows] == [(21.5, 19.0), (22.0, 20.0)]
    mine = write_folder(
        tmp_path / "f",
        pairs(chosen_score=lambda i: "0.5" if i else "", rejected_prompt=lambda i: f"b{i}"),
        "metadata.csv",
    )
    found = read_pairs(recipe(mine)).rows
    assert (
        found[0].chosen_score is None and found[1].chosen_score == 0.5 and found[1].prompts["rejected_prompt"] == "b1"
    )


def test_missing_column_names_the_nearest(tmp_path: Path) -> None:
    write_folder(tmp_path, [{"prompt": "x", "chosen": good(0), "reject": worse(0)}])
    with pytest.raises(
        UserError, match=r"metadata.jsonl' has no column 'rejected' or .*prompt, chosen, reject; did you mean 'reject'"
    ):
        read_pairs(recipe(tmp_path))
    columns = picks([1.0])
    del columns["label_0"]
    pq.write_table(pa.table(columns), tmp_path / "x.parquet")
    with pytest.raises(UserError, match=r"x.parquet' has no column 'label_0'"):
        read_pairs(recipe(tmp_path / "x.parquet"))


def test_nothing_usable_says_why(tmp_path: Path) -> None:
    write_folder(tmp_path, pairs(tie=lambda i: True))
    with pytest.raises(UserError, match=r"no usable pair in .*: 7 rows, 0 usable; left out: 7 tie"):
        read_pairs(recipe(tmp_path))
    (tmp_path / "metadata.jsonl").write_text("")
    with pytest.raises(UserError, match="no row in"):
        read_pairs(recipe(tmp_path))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda t: t / "pears", r"does not exist; did you mean 'pairs'\?"),
        (lambda t: t / "pairs" / "empty", "holds no metadata.jsonl"),
        (lambda t: t / "pairs" / "notes.txt", "is no .jsonl, .csv, .parquet or .tar file"),
        (lambda t: t / "pairs" / "torn.parquet", "no readable Parquet file"),
        (lambda t: t / "pairs" / "latin.csv", "cannot be read as UTF-8"),
        (lambda t: "nobody/nothing-here", "no file or folder here, and the hub says"),
    ],
)
def test_bad_paths(make: Callable[[Path], Path | str], message: str, tmp_path: Path) -> None:
    base = tmp_path / "pairs"
    (base / "empty").mkdir(parents=True)
    (base / "notes.txt").write_text("x")
    (base / "torn.parquet").write_bytes(write_parquet(tmp_path).read_bytes()[:-100])
    (base / "latin.csv").write_bytes(b"prompt,chosen\n\xe9t\xe9,a.png\n")
    with pytest.raises(UserError, match=message) as error:
        read_pairs(recipe(make(tmp_path)))
    assert "\n" not in str(error.value)


def test_split_and_format_are_checked(tmp_path: Path) -> None:
    folder = write_dataset_dict(tmp_path)
    assert read_pairs(recipe(folder, split="test")).report.usable == 2
    with pytest.raises(UserError, match="no split 'tets'; did you mean 'test'"):
        read_pairs(recipe(folder, split="tets"))
    with pytest.raises(UserError, match=r"no \*.parquet"):
        read_pairs(recipe(folder, format="parquet"))
    (tmp_path / "p").mkdir()
    shards = write_parquet_shards(tmp_path / "p")
    assert read_pairs(recipe(shards, split="test")).report.usable == 1
    with pytest.raises(UserError, match="no Parquet file of the split 'val'"):
        read_pairs(recipe(shards, split="val"))


def test_a_damaged_row_group_is_a_flaw_of_its_rows(tmp_path: Path) -> None:
    file = write_parquet(tmp_path)
    offset = pq.ParquetFile(file).metadata.row_group(1).column(1).data_page_offset
    data = bytearray(file.read_bytes())
    data[offset : offset + 200] = b"\xff" * 200
    file.write_bytes(bytes(data))
    report = read_pairs(recipe(file)).report
    assert report.usable == COUNT - 3 and report.counts == {"unreadable image": 3}


def test_scan_is_reused_and_notices_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan, "KEEP_FROM", 1)
    folder = write_folder(tmp_path / "d", pairs())
    options = {"cache": True, "cache_dir": str(tmp_path / "cache")}
    first = read_pairs(recipe(folder, **options))
    (kept,) = (tmp_path / "cache" / "scans").glob("*.parquet")
    looks = []
    look_at = scan.look_at
    monkeypatch.setattr(scan, "look_at", lambda *a: looks.append(a) or look_at(*a))
    again = read_pairs(recipe(folder, **options))
    assert not looks and again.rows == first.rows
    (folder / "images" / "2-chosen.png").write_bytes(b"overwritten")
    assert read_pairs(recipe(folder, **options)).report.counts == {"unreadable image": 1} and len(looks) == 1
    kept.write_bytes(kept.read_bytes()[:-50])
    assert read_pairs(recipe(folder, **options)).report.usable == COUNT - 1 and len(looks) > 10


def test_plain_images(tmp_path: Path) -> None:
    rows = [{"file_name": good(i), "text": f"a thing {i}", "score": i / 2} for i in range(4)]
    rows.append({**rows[0]})
    rows.append({"file_name": "images/none.png", "text": "x", "score": None})
    found = read_images(recipe(write_folder(tmp_path, rows)))
    assert found.report.counts == {"duplicate": 1, "missing image": 1}
    assert [(r.prompt, r.score, r.image.read()) for r in found.rows] == [
        (f"a thing {i}", i / 2, good(i)) for i in range(4)
    ]
    with pytest.raises(UserError, match="no column 'prompt' or 'caption' or 'text'"):
        read_images(recipe(write_folder(tmp_path / "b", [{"file_name": good(0)}])))
