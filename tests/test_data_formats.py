"""WebDataset shards, streams, Pick-a-Pic as it is, ranked lists, and the filters of gap and near duplicates."""

from __future__ import annotations

import datetime
import io
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageEnhance
from test_data_readers import COUNT, as_images, good, pairs, recipe, worse, write_folder

from diffalign.data import hub, parquet, readers
from diffalign.data.images import difference_hash
from diffalign.data.ranked import read_ranked
from diffalign.data.readers import read_images, read_pairs
from diffalign.data.tables import open_table
from diffalign.errors import UserError


def write_tar(path: Path, samples: Mapping[str, Mapping[str, bytes | str]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for key, members in samples.items():
            for extension, data in members.items():
                raw = data.encode() if isinstance(data, str) else data
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(raw)
                tar.addfile(info, io.BytesIO(raw))
    return path


def named(i: int) -> dict[str, bytes | str]:
    return {"chosen.png": good(i), "rejected.png": worse(i), "json": json.dumps({"prompt": f"a thing, no {i}"})}


def texted(i: int) -> dict[str, bytes | str]:
    return {"rejected.png": worse(i), "txt": f"a thing, no {i}\n", "chosen.PNG": good(i)}


def picked(i: int) -> dict[str, bytes | str]:
    facts = {"caption": f"a thing, no {i}", "label_0": 0, "label_1": 1, "has_label": True}
    return {"jpg_0": worse(i), "jpg_1": good(i), "json": json.dumps(facts)}


def numbered(i: int) -> dict[str, bytes | str]:
    return {"0.png": good(i), "1.png": worse(i), "caption": f"a thing, no {i}", "label_0.txt": "1"}


@pytest.mark.parametrize("layout", [named, texted, picked, numbered], ids=lambda f: f.__name__)
def test_shards_of_usual_layouts(layout: Any, tmp_path: Path) -> None:
    expected = read_pairs(recipe(write_folder(tmp_path / "plain", pairs()))).rows
    for number, span in enumerate((range(3), range(3, COUNT))):
        write_tar(tmp_path / "w" / f"x-{number:02d}.tar", {f"sub/{i:03d}": layout(i) for i in span})
    for path in (tmp_path / "w", f"{tmp_path}/w/x-{{00..01}}.tar", f"{tmp_path}/w/x-{{00,01}}.tar"):
        found = read_pairs(recipe(path))
        assert found.report.format == "webdataset" and found.report.usable == COUNT, found.report.bad
        assert [(r.id, r.prompt) for r in found.rows] == [(r.id, r.prompt) for r in expected]
    for i in (5, 0, 6, 2):
        assert found.rows[i].chosen.read() == good(i) and found.rows[i].rejected.read() == worse(i)
    one = read_pairs(recipe(tmp_path / "w" / "x-00.tar"))
    assert [r.id for r in one.rows] == [r.id for r in expected[:3]]


def test_flaws_of_shards(tmp_path: Path) -> None:
    samples = {f"{i:03d}": dict(named(i)) for i in range(COUNT)}
    del samples["001"]["rejected.png"]
    samples["002"]["json"] = "{half"
    samples["003"]["chosen.png"] = b"no picture"
    file = write_tar(tmp_path / "x.tar", samples)
    found = read_pairs(recipe(file))
    assert found.report.counts == {"missing image": 1, "malformed row": 1, "unreadable image": 1}
    assert "x.tar sample 001: missing image" in str(found.report.bad[0])
    whole = file.read_bytes()
    with tarfile.open(file) as tar:
        cut = next(m.offset_data for m in tar if m.name == "005.chosen.png") + 20
    file.write_bytes(whole[:cut])
    torn = read_pairs(recipe(file))
    assert torn.report.usable == 2 and [r.prompt[-1] for r in torn.rows] == ["0", "4"]
    assert "x.tar after 5 samples: malformed row (unexpected end of data)" in map(str, torn.report.bad)
    file.write_bytes(b"\x1f\x8b" + whole)
    with pytest.raises(UserError, match=r"is no plain \.tar"):
        read_pairs(recipe(file))
    (tmp_path / "x.tar.gz").write_bytes(b"\x1f\x8b")
    with pytest.raises(UserError, match="is compressed"):
        read_pairs(recipe(tmp_path / "x.tar.gz"))
    with pytest.raises(UserError, match=r"x-\{0..9\}.tar' does not exist"):
        read_pairs(recipe(tmp_path / "x-{0..9}.tar"))


def test_shards_of_captioned_pictures(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {f"{i}": {"png": good(i), "txt": f"text {i}"} for i in range(3)})
    rows = read_images(recipe(tmp_path / "a.tar")).rows
    assert [(r.prompt, r.image.read()) for r in rows] == [(f"text {i}", good(i)) for i in range(3)]


def test_streams_give_the_same_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forwards, backwards and out of order, with a window of one row."""
    monkeypatch.setattr(hub, "WINDOW_BYTES", 1)
    expected = read_pairs(recipe(write_folder(tmp_path / "plain", pairs()))).rows
    pq.write_table(pa.Table.from_pylist(pairs()), tmp_path / "x.parquet", row_group_size=3)
    write_tar(tmp_path / "x.tar", {f"{i:03d}": named(i) for i in range(COUNT)})
    as_images(pairs()).save_to_disk(str(tmp_path / "d"))
    for path in (tmp_path / "x.parquet", tmp_path / "x.tar", tmp_path / "d", tmp_path / "plain"):
        found = read_pairs(recipe(path, streaming=True, cache=True, cache_dir=str(tmp_path / "c")))
        assert found.report.usable == COUNT == found.report.rows == found.report.available, (path, found.report.bad)
        assert [(r.id, r.prompt) for r in found.rows] == [(r.id, r.prompt) for r in expected]
        for i in (6, 0, 3, 1):
            assert found.rows[i].chosen.read() == good(i) and found.rows[i].rejected.read() == worse(i)
    some = read_pairs(recipe(tmp_path / "x.parquet", streaming=True, cache=True, max_pairs=2))
    assert len(some.rows) == 2 and some.report.rows == 2


def test_a_stream_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows and their pictures come from one pass, though the window holds far less than the whole."""
    data = [{"prompt": f"{i}", "chosen": jpeg(2 * i, 32), "rejected": jpeg(2 * i + 1, 32)} for i in range(120)]
    pq.write_table(pa.Table.from_pylist(data), tmp_path / "x.parquet")
    monkeypatch.setattr(hub, "WINDOW_BYTES", 60 * len(data[0]["chosen"]))
    table = open_table(str(tmp_path / "x.parquet"), streaming=True)
    assert isinstance(table, hub.StreamTable)
    passes, skip = [], table.data.skip
    monkeypatch.setattr(table.data, "skip", lambda n: passes.append(n) or skip(n))
    options = recipe(tmp_path / "x.parquet", streaming=True, cache=True)
    for i, row in enumerate(readers.open_pairs(options, table=table).rows):
        assert row.chosen.read() == data[i]["chosen"] and row.rejected.read() == data[i]["rejected"]
    assert i == 119 and not passes
    assert table.image(0, "chosen") == data[0]["chosen"] and passes == [0]


def test_streams_that_cannot_be(tmp_path: Path) -> None:
    write_folder(tmp_path / "plain", pairs())
    with pytest.raises(UserError, match=r"needs data\.cache=true"):
        read_pairs(recipe(tmp_path / "plain", streaming=True))
    for path in ("hf://datasets/nobody/nothing-here", "hf://nobody/nothing-here", "nobody/nothing-here"):
        for streaming in (True, False):
            with pytest.raises(UserError, match="no file or folder here, and the hub says") as error:
                read_pairs(recipe(path, streaming=streaming, cache=True))
            assert "\n" not in str(error.value)


# The columns of Pick-a-Pic v2 with their types, from its card (dataset_info.features).
SCHEMA = pa.schema(
    [
        ("are_different", pa.bool_()),
        ("best_image_uid", pa.string()),
        ("caption", pa.string()),
        ("created_at", pa.timestamp("ns")),
        ("has_label", pa.bool_()),
        ("image_0_uid", pa.string()),
        ("image_0_url", pa.string()),
        ("image_1_uid", pa.string()),
        ("image_1_url", pa.string()),
        ("jpg_0", pa.binary()),
        ("jpg_1", pa.binary()),
        ("label_0", pa.float64()),
        ("label_1", pa.float64()),
        ("model_0", pa.string()),
        ("model_1", pa.string()),
        ("ranking_id", pa.int64()),
        ("user_id", pa.int64()),
        ("num_example_per_prompt", pa.int64()),
        ("__index_level_0__", pa.int64()),
    ]
)


def jpeg(seed: int, side: int = 64) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def pick_a_pic(i: int, label: float = 1.0, **changes: Any) -> dict[str, Any]:
    uids = [f"{i:08x}-{side}" for side in (0, 1)]
    return {
        "are_different": True,
        "best_image_uid": uids[0] if label == 1 else uids[1] if label == 0 else "none",
        "caption": f"a thing, no {i}",
        "created_at": datetime.datetime(2023, 4, 1, 12, 0, i % 60),
        "has_label": True,
        "image_0_uid": uids[0],
        "image_0_url": f"https://example.org/{uids[0]}.png",
        "image_1_uid": uids[1],
        "image_1_url": f"https://example.org/{uids[1]}.png",
        "jpg_0": jpeg(2 * i),
        "jpg_1": jpeg(2 * i + 1),
        "label_0": label,
        "label_1": 1 - label,
        "model_0": "CompVis/stable-diffusion-v1-4",
        "model_1": "stabilityai/stable-diffusion-2-1",
        "ranking_id": 1000 + i,
        "user_id": i % 7,
        "num_example_per_prompt": 1,
        "__index_level_0__": i,
    } | changes


def write_pick_a_pic(folder: Path, rows: list[dict[str, Any]], group: int) -> Path:
    (folder / "data").mkdir(parents=True)
    half = len(rows) // 2
    for number, part in enumerate((rows[:half], rows[half:])):
        file = folder / "data" / f"train-{number:05d}-of-00002-0a1b2c3d4e5f6a7b.parquet"
        pq.write_table(pa.Table.from_pylist(part, SCHEMA), file, row_group_size=group)
    pq.write_table(
        pa.Table.from_pylist([pick_a_pic(99)], SCHEMA), folder / "data" / "validation_unique-00000-of-00001.parquet"
    )
    return folder


def test_pick_a_pic_in_its_own_schema(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two shards of one large row group each, read in blocks of a few rows."""
    monkeypatch.setattr(parquet, "BLOCK_BYTES", 20_000)
    monkeypatch.setattr(parquet, "KEPT_BYTES", 30_000)
    rows = [pick_a_pic(i, (1.0, 0.0, 0.5)[i % 3]) for i in range(40)]
    rows[3] = pick_a_pic(3, jpg_1=None)
    rows[4] = pick_a_pic(4, has_label=False)
    rows[6] = pick_a_pic(6, label_0=None, label_1=None)
    rows[7] = pick_a_pic(7, jpg_0=jpeg(14)[:300])
    rows[9] = pick_a_pic(9, are_different=False, jpg_1=rows[9]["jpg_0"])
    rows[10] = pick_a_pic(10, caption=None)
    folder = write_pick_a_pic(tmp_path, rows, 1000)
    found = read_pairs(recipe(folder))
    assert found.report.counts == {
        "tie": 13,
        "no label": 2,
        "missing image": 1,
        "unreadable image": 1,
        "identical images": 1,
        "no prompt": 1,
    }
    by_id = {row.id: row for row in found.rows}
    assert len(by_id) == 21 and by_id["1000"].chosen.read() == jpeg(0)
    assert by_id["1001"].chosen.read() == jpeg(3) and by_id["1001"].rejected.read() == jpeg(2)
    table = open_table(str(folder))
    assert isinstance(table, parquet.ParquetTable) and table._step(0, 0, "jpg_0") < 10
    for i in (39, 0, 20, 19, 21, 12):
        assert table.image(i, "jpg_0") == rows[i]["jpg_0"] and table.value(i, "user_id") == i % 7
    assert read_pairs(recipe(folder, split="validation_unique")).report.usable == 1


def test_parquet_keeps_a_few_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "BLOCK_BYTES", 20_000)
    monkeypatch.setattr(parquet, "KEPT_BYTES", 100_000)
    folder = write_pick_a_pic(tmp_path, [pick_a_pic(i) for i in range(60)], 1000)
    table = open_table(str(folder))
    assert isinstance(table, parquet.ParquetTable)
    for i in range(60):
        table.image(i, "jpg_0")
        table.image(i, "jpg_1")
        assert sum(a.nbytes for a in table.kept.items.values()) < 150_000
    assert len(table.cursors) <= parquet.FILES_OPEN


def test_gap_of_scores(tmp_path: Path) -> None:
    rows = pairs(
        chosen_score=lambda i: [3, 1, 2, None, 5, 0.5, 1][i], rejected_score=lambda i: [1, 1, 0, 0, 9, 0, 0][i]
    )
    rows[4]["label"] = 0  # written the other way round: the gap is 4
    write_folder(tmp_path, rows)
    found = read_pairs(recipe(tmp_path, min_gap=1))
    assert found.report.counts == {"score gap below data.min_gap": 2, "no score": 1}
    assert [r.prompt[-1] for r in found.rows] == ["0", "2", "4", "6"]
    assert read_pairs(recipe(tmp_path)).report.usable == COUNT
    assert read_pairs(recipe(tmp_path, min_gap=1, strict=True)).report.usable == 4, "a policy is no flaw"


def smooth(seed: int) -> Image.Image:
    cells = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(cells).resize((96, 96), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def test_difference_hash_sees_through_small_changes() -> None:
    for seed in range(20):
        image = smooth(seed)
        code = difference_hash(image)
        small = Image.open(io.BytesIO(encoded(image.resize((64, 64)), "JPEG", quality=60)))
        brighter = ImageEnhance.Brightness(image).enhance(0.9)
        assert max((code ^ difference_hash(other)).bit_count() for other in (small, brighter)) <= 6
        assert (code ^ difference_hash(smooth(seed + 100))).bit_count() > 14


def test_near_duplicates(tmp_path: Path) -> None:
    rows = [
        {"prompt": "one", "chosen": encoded(smooth(2 * i)), "rejected": encoded(smooth(2 * i + 1))} for i in range(6)
    ]
    rows[1]["rejected"] = encoded(smooth(2), "JPEG", quality=70)  # the winner again
    rows[3]["chosen"], rows[3]["rejected"] = (encoded(smooth(k), "JPEG", quality=70) for k in (1, 0))  # pair 0 turned
    rows[4] = {"prompt": "another", **{k: rows[3][k] for k in ("chosen", "rejected")}}
    rows[5]["chosen"] = encoded(smooth(0), "JPEG", quality=60)  # one picture alone is no repeated pair
    write_folder(tmp_path, rows)
    found = read_pairs(recipe(tmp_path, near_duplicates=6))
    assert found.report.counts == {"near-identical images": 1, "near duplicate": 1}
    assert {b.place: b.reason for b in found.report.bad} == {
        "metadata.jsonl line 2": "near-identical images",
        "metadata.jsonl line 4": "near duplicate",
    }
    assert read_pairs(recipe(tmp_path)).report.usable == 6
    plain = [{"file_name": row["chosen"], "text": row["prompt"]} for row in rows]
    (tmp_path / "i").mkdir()
    assert read_images(recipe(write_folder(tmp_path / "i", plain), near_duplicates=6)).report.counts == {
        "near duplicate": 1
    }


def test_half_a_character_is_a_flaw(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, pairs())
    with open(folder / "metadata.jsonl", "a") as file:
        file.write('{"prompt": "x\\ud800", "chosen": "images/0-chosen.png", "rejected": "images/1-rejected.png"}\n')
        file.write('{"prompt": "x", "chosen": "a\\u0000b.png", "rejected": "images/1-rejected.png"}\n')
        file.write('{"prompt": "x", "chosen": "' + "a" * 5000 + '.png", "rejected": "images/1-rejected.png"}\n')
    found = read_pairs(recipe(folder))
    assert found.report.counts == {"malformed row": 2, "missing image": 1} and found.report.usable == COUNT


def test_ranked_lists(tmp_path: Path) -> None:
    (tmp_path / "p").mkdir()
    for k in range(4):
        (tmp_path / "p" / f"{k}.png").write_bytes(good(k))
    rows: list[dict[str, Any]] = [
        {"prompt": "a", "images": ["p/0.png", "p/1.png", "p/2.png"], "scores": [0.2, 0.9, 0.5]},
        {"prompt": "b", "images": ["p/0.png", "p/9.png"], "scores": [1, 2]},
        {"prompt": "c", "images": ["p/0.png", "p/1.png"], "scores": [1]},
        {"prompt": "d", "images": ["p/0.png"], "scores": [1]},
        {"prompt": "e", "images": ["p/0.png", "p/1.png"], "scores": ["x", 1]},
    ]
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found, report = read_ranked(recipe(tmp_path))
    assert report.counts == {"malformed row": 2, "missing image": 1, "bad label": 1}
    assert [ref.read() for ref in found[0].pictures] == [good(1), good(2), good(0)]
    assert found[0].scores == (0.9, 0.5, 0.2)
    ranked = {"prompt": ["a"], "image_path": [["p/0.png", "p/1.png", "p/2.png"]], "rank": [[2, 3, 1]]}
    (tmp_path / "test.json").write_text(json.dumps([{k: v[0] for k, v in ranked.items()}]))
    assert [r.read() for r in read_ranked(recipe(tmp_path / "test.json"))[0][0].pictures] == [good(2), good(0), good(1)]
    inside = {"prompt": ["a"], "images": [[good(0), good(1)]], "scores": [[1.0, 2.0]]}
    pq.write_table(pa.table(inside), tmp_path / "x.parquet")
    assert read_ranked(recipe(tmp_path / "x.parquet"))[0][0].pictures[0].read() == good(1)
    with pytest.raises(UserError, match="no column 'images' or 'image_path'"):
        read_ranked(recipe(write_folder(tmp_path / "z", pairs())))
