"""Rows, keys and buckets at size: flat memory, the same numbers as before, one bucket a micro-batch."""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from small import final_state, lora_of, picture, same_tree, settings
from test_parallel import close, launch
from world import gap, make_trainer, warm, weights

from diffalign import keyed
from diffalign.data import encode, fill, rowfile, rowtable
from diffalign.data.batch import Batch, Cond
from diffalign.data.buckets import Buckets, usual_sizes
from diffalign.data.cache import LatentCache, open_cache
from diffalign.data.keyindex import RECENT, KeyIndex, first_places, key_array, key_bytes
from diffalign.data.readers import read_pairs
from diffalign.data.rowfile import read_rows
from diffalign.data.rows import ImageRef, PairRow
from diffalign.data.rowtable import PairRows, Stream, packed
from diffalign.data.source import RUN, Source, in_runs, split_heldout
from diffalign.errors import UserError
from diffalign.families import Model, load_model
from diffalign.methods import make_method
from diffalign.recipe import DataRecipe, ModelRecipe, load_recipe

SHAPES = ((64, 64), (96, 48), (48, 96), (70, 60), (120, 40), (64, 66))  # width, height


def write_shapes(folder: Path, count: int = 12, form: str = "folder") -> Path:
    """Pairs of many shapes; the loser has another shape than the winner. As a folder or as one Parquet file."""
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for i in range(count):
        row: dict[str, Any] = {"prompt": f"thing {i % 3}"}
        for k, name in enumerate(("chosen", "rejected")):
            buffer = io.BytesIO()
            picture(2 * i + k, SHAPES[(i + k) % len(SHAPES)]).save(buffer, "PNG")
            row[name] = buffer.getvalue()
            if form == "folder":
                row[name] = f"{i}-{name}.png"
                (folder / row[name]).write_bytes(buffer.getvalue())
        rows.append(row)
    if form == "folder":
        (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), folder / "train.parquet", row_group_size=4)
    return folder


@pytest.fixture(scope="module")
def model(tiny_model_folder: Path) -> Model:
    return load_model(ModelRecipe(path=str(tiny_model_folder)), torch.device("cpu"), torch.float32)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shapes(tmp_path_factory.mktemp("shapes"), 24)


def recipe(path: Path, cache: Path | None = None, **options: Any) -> DataRecipe:
    place = {} if cache is None else {"cache_dir": str(cache)}
    return DataRecipe(path=str(path), encode_batch=4, **place, **options)


# -- keys -------------------------------------------------------------------------------------------------------------


def test_keys_are_found_whatever_way_they_came() -> None:
    rng = np.random.default_rng(0)
    keys = rng.integers(0, 1 << 62, (RECENT + 5000, 2)).astype(np.uint64)
    keys[1000:1100, 0] = keys[1000, 0]  # many keys that share their first half
    index, first = KeyIndex(), {}
    for start in (0, 10, 500, 8_000, 41_000):  # by one, by few, at once; some twice
        part = slice(start, min(len(keys), start + (RECENT if start > 8_000 else 600)))
        index.add(keys[part], np.arange(part.start, part.stop))
        for n in range(part.start, part.stop):
            first.setdefault(keys[n].tobytes(), n)
    expected = [first.get(key.tobytes(), -1) for key in keys]
    assert index.find(keys).tolist() == expected and len(index) == len(first) and -1 in expected
    index.add(keys, np.zeros(len(keys), np.int64))  # the first number of a key stays
    assert [n for n in index.find(keys).tolist() if n] == [n for n in expected if n > 0]
    assert index.find(keys[:0]).tolist() == [] and KeyIndex().find(keys[:2]).tolist() == [-1, -1]


def test_first_places_keep_the_order() -> None:
    keys = key_array(["b", "a", "b", "0" * 32, "a", "0" * 32])
    assert first_places(keys).tolist() == [0, 1, 3]
    assert key_bytes("0f" * 16) == bytes.fromhex("0f" * 16) and len(key_bytes("x.m")) == 16


def test_uniforms_are_those_of_a_generator_for_each() -> None:
    names = [f"row {i}" for i in range(300)] + ["", "ü", "x" * 500]
    for seed in (0, 2**40):
        assert keyed.uniforms(names, seed, "heldout").tolist() == [
            keyed.generator(seed, "heldout", name).random() for name in names
        ]


def test_the_split_is_the_one_of_single_draws() -> None:
    ids = [f"r{i}" for i in range(500)]
    numbers = [keyed.generator(3, "heldout", name).random() for name in ids]
    training, held = split_heldout(ids, 40, 3)
    assert held == sorted(np.argsort(numbers, kind="stable")[:40].tolist())
    assert training.tolist() == [i for i in range(500) if i not in set(held)]


# -- rows -------------------------------------------------------------------------------------------------------------


def made_rows(count: int) -> list[PairRow]:
    def ref(n: int) -> ImageRef:
        return ImageRef(Path(f"/none/{n}.png"), f"/none/{n}.png", hashlib.md5(b"%d" % n).hexdigest(), (n + 1, n + 2))

    return [
        PairRow(
            f"id {n}",
            f"thing {n // 2}",
            ref(2 * n),
            ref(2 * n + 1),
            f"other {n}" if n % 3 == 0 else None,
            None if n % 5 == 0 else n / 2,
            1.0,
            n % 7 == 0,
        )
        for n in range(count)
    ]


def test_packed_rows_are_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rowtable, "CHUNK", 16)
    monkeypatch.setattr(rowtable, "SPILL", 4000)
    rows = made_rows(101)
    found = PairRows(None, tmp_path / "spilled")
    for n, row in enumerate(rows):
        found.append(row)
        if n == 50:
            assert len(found) == 51 and found[50] == row  # reading in between
    assert found == rows and list(found) == rows and found[-1] == rows[-1] and found[3:50:7] == rows[3:50:7]
    assert (
        list(found.ids) == [row.id for row in rows] and found.ids[77] == "id 77" and found.ids[1:3] == ["id 1", "id 2"]
    )
    assert found.columns == ["chosen_score", "rejected_score", "tie"] and found.two_prompts
    assert [d.tobytes().hex() for d in found.digests("rejected")] == [row.rejected.digest for row in rows]
    assert found.sizes("chosen").tolist() == [[*row.chosen.size] for row in rows if row.chosen.size]
    asked = dict.fromkeys(text for row in rows for text in row.prompts.values())
    assert [t for part in found.distinct_prompts() for t in part] == list(asked)
    winners = found.winners()
    assert [w.image for w in winners] == [row.chosen for row in rows] and winners[4].score == 2.0
    assert found._mapped > 0 and not list((tmp_path / "spilled").iterdir())  # mapped, and gone with the process
    with pytest.raises(IndexError):
        found[101]
    assert packed(found) is found and packed(rows) == rows and len(packed([])) == 0


def test_many_rows_stay_few_bytes() -> None:
    """Python's own memory for 8,000 rows; the rows as objects take about 1,400 bytes each."""
    rows = PairRows()
    one = made_rows(4)
    rows.extend(one)
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    for n in range(8_000):
        rows.append(PairRow(f"{n:08}", "x", one[n % 4].chosen, one[n % 3].rejected))
    assert (tracemalloc.get_traced_memory()[0] - before) / 8_000 < 200  # what is not packed yet
    tracemalloc.stop()
    assert sum(batch.nbytes for batch in rows.batches()) / 8_000 < 250


@pytest.mark.parametrize("form", ["folder", "parquet"])
def test_rows_are_kept_and_mapped_while_the_data_stand(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rowfile, "KEEP_FROM", 1)
    data = recipe(write_shapes(tmp_path / "d", 6, form), tmp_path / "c")
    opened: list[int] = []
    reader = rowfile.open_pairs
    monkeypatch.setattr(rowfile, "open_pairs", lambda *a: opened.append(1) or reader(*a))

    def read(**options: Any) -> Any:
        return read_rows(data.model_copy(update=options), "pair")

    first, report = read()
    again, report_again = read()
    assert len(opened) == 1 and again == first and report_again == report and again.present == first.present
    assert [row.chosen.read() for row in again] == [row.chosen.read() for row in first]
    assert read(encode_batch=9, buckets=True)[0] == first and len(opened) == 1
    assert len(read(max_pairs=3)[0]) == 3 and len(opened) == 2  # other rows, another file
    images, _ = read_rows(data, "image")
    assert [row.image for row in images] == [row.chosen for row in first] and len(opened) == 2
    file = next(path for path in (tmp_path / "c" / "rows").glob("*.arrow") if len(read()[0]) == 6)
    for damage in (lambda b: b[:-40], lambda b: b"\0" * len(b), lambda b: b[:600] + bytes([b[600] ^ 1]) + b[601:]):
        for path in (tmp_path / "c" / "rows").glob("*.arrow"):
            path.write_bytes(damage(path.read_bytes()))
        count = len(opened)
        assert read()[0] == first and len(opened) == count + 1, file
    count = len(opened)
    if form == "folder":
        picture(99).save(tmp_path / "d" / "2-rejected.png")
    else:
        write_shapes(tmp_path / "d", 7, form)
    changed, _ = read()
    assert changed != first and len(opened) == count + 1 and read()[0] == changed and len(opened) == count + 1


def test_rows_that_a_mended_picture_would_change_are_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rowfile, "KEEP_FROM", 1)
    data = recipe(write_shapes(tmp_path / "d", 4), tmp_path / "c")
    good = (tmp_path / "d" / "1-chosen.png").read_bytes()
    (tmp_path / "d" / "1-chosen.png").write_bytes(b"broken")
    assert len(read_rows(data, "pair")[0]) == 3  # type: ignore[arg-type]
    (tmp_path / "d" / "1-chosen.png").write_bytes(good)
    assert len(read_rows(data, "pair")[0]) == 4  # type: ignore[arg-type]


# -- streams ----------------------------------------------------------------------------------------------------------


def known(rows: Any) -> list[tuple[str, ...]]:
    """Rows without the names that a table gives to pictures."""
    return [(row.id, row.prompt, row.chosen.digest, row.rejected.digest) for row in rows]


class Killed(Exception):
    """Stands for the end of the process."""


@pytest.mark.parametrize("world", [1, 2])
def test_a_stream_is_encoded_as_it_comes(
    world: int, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fill, "TURN", 3)
    monkeypatch.setattr(encode, "WINDOW", 1)
    monkeypatch.setattr(fill, "rows_per_shard", lambda size: 4)
    folder = write_shapes(tmp_path / "d", 20, "parquet")
    plain = recipe(folder, tmp_path / "plain", buckets=True)
    whole = open_cache(read_pairs(plain).rows, model, plain, tmp_path / "plain")
    data = recipe(folder, tmp_path / "c", buckets=True, streaming=True)

    def rows(rank: int) -> Any:
        found, _ = read_rows(data, "pair")
        return found

    caches = {}
    if world == 2:  # one after another: what the first wrote is there, what it left is the second's
        with pytest.raises(fill.RunError, match="that all machines share"):
            open_cache(rows(0), model, data, tmp_path / "c", rank=0, world=2)
        caches[1] = open_cache(rows(1), model, data, tmp_path / "c", rank=1, world=2)
        assert 0 < caches[1].encoded < whole.encoded
    else:
        stream = rows(0)
        assert isinstance(stream, Stream)

        def broken() -> Any:
            for number, row in enumerate(stream.rows):
                if number == 18:
                    raise Killed
                yield row

        with pytest.raises(Killed):
            open_cache(Stream(broken(), stream.packed), model, data, tmp_path / "c")
        kept = len(list((tmp_path / "c").glob("pictures-*/*.safetensors")))
        assert kept > 0
        caches[0] = open_cache(rows(0), model, data, tmp_path / "c")
        assert caches[0].encoded <= whole.encoded - 3 * kept  # shards of one shape hold four entries, or fewer
        again = rows(0)
        assert not isinstance(again, Stream) and known(again) == known(whole.rows)  # kept: the stream is not read again
        assert open_cache(again, model, data, tmp_path / "c").encoded == 0
    for cache in caches.values():
        assert known(cache.rows) == known(whole.rows)
        for left, right in zip(cache.items(range(20)), whole.items(range(20)), strict=True):
            torch.testing.assert_close(left.latents, right.latents, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(left.cond["prompt"].embeds, right.cond["prompt"].embeds, rtol=1e-5, atol=1e-6)


# -- buckets ----------------------------------------------------------------------------------------------------------


def test_usual_buckets_are_those_of_sdxl() -> None:
    sizes = usual_sizes(1024, 64)
    assert {(1024, 1024), (1152, 896), (896, 1152), (1216, 832), (832, 1216), (1344, 768), (768, 1344)} <= set(sizes)
    assert {(512, 2048), (2048, 512), (640, 1600)} <= set(sizes) and len(sizes) == 17
    for resolution, step in ((1024, 64), (512, 64), (768, 64), (64, 8), (32, 8)):
        for height, width in usual_sizes(resolution, step):
            assert height % step == width % step == 0 and 0.25 <= height / width <= 4
            assert height * width <= resolution**2 and (width, height) in usual_sizes(resolution, step)
    wide = [h * w / 1024**2 for h, w in sizes]
    assert min(wide) > 0.9


def test_the_nearest_aspect_is_taken() -> None:
    buckets = Buckets(usual_sizes(1024, 64))
    assert buckets.of((1920, 1080)) == (768, 1344) and buckets.of((1080, 1920)) == (1344, 768)
    assert buckets.of((500, 500)) == (1024, 1024) and buckets.of((9000, 600)) == (512, 2048)
    sizes = np.random.default_rng(0).integers(20, 900, (300, 2))
    for (width, height), place in zip(sizes.tolist(), buckets.assign(sizes), strict=True):
        best = min(abs(math.log(w * height / (h * width))) for h, w in buckets.sizes)
        h, w = buckets.sizes[place]
        assert abs(math.log(w * height / (h * width))) == pytest.approx(best)


def test_both_members_of_a_pair_are_cut_to_the_winners_bucket(shapes: Path, model: Model, tmp_path: Path) -> None:
    data = recipe(shapes, buckets=True)
    cache = open_cache(read_pairs(data).rows, model, data, tmp_path)
    seen = set()
    for i, row in enumerate(cache.rows):
        item, target = cache[i], cache.buckets.of(row.chosen.size or (0, 0))
        seen.add(target)
        for name, ref in row.images.items():
            assert item.latents[name].shape == (4, target[0] // 8, target[1] // 8)
            width, height = ref.size or (0, 0)
            scale = max(target[0] / height, target[1] / width)
            corner = [(round(height * scale) - target[0]) // 2, (round(width * scale) - target[1]) // 2]
            assert item.sizes[name].tolist() == [height, width, *corner, *target]
    assert len(seen) >= 4 and max(h * w for h, w in seen) <= 64 * 64
    assert open_cache(read_pairs(data).rows, model, data, tmp_path).encoded == 0
    square = recipe(shapes)
    other = open_cache(read_pairs(square).rows, model, square, tmp_path)
    assert other.encoded == 48 and other.fingerprint != cache.fingerprint  # beside each other in one store


def test_buckets_of_the_users_own(shapes: Path, model: Model, tmp_path: Path) -> None:
    data = recipe(shapes, buckets=[[64, 32], [32, 64]])
    cache = open_cache(read_pairs(data).rows, model, data, tmp_path)
    assert {tuple(item.latents["chosen"].shape) for item in cache.items(range(24))} == {(4, 4, 8), (4, 8, 4)}
    with pytest.raises(UserError, match=r"data.buckets: \[60, 32\] has a side that is no multiple of 8"):
        open_cache(read_pairs(data).rows, model, recipe(shapes, buckets=[[60, 32]]), tmp_path)
    for wrong in ("[[0, 8]]", "3", "[[8]]", "yes please"):
        with pytest.raises(UserError, match=r"data\.buckets"):
            load_recipe("tiny/dpo", [f"data.buckets={wrong}"])
    assert load_recipe("tiny/dpo", ["data.buckets=true"]).data.buckets is True


def test_an_order_in_runs_visits_every_row_once_and_a_single_bucket_changes_nothing() -> None:
    rng = np.random.default_rng(1)
    order, places = rng.permutation(1000), rng.choice(5, 1000, p=[0.6, 0.2, 0.1, 0.07, 0.03])
    assert in_runs(order, np.zeros(1000)) is order
    found = in_runs(order, places)
    assert sorted(found.tolist()) == list(range(1000)) and not np.array_equal(found, order)
    bucket = dict(zip(order.tolist(), places.tolist(), strict=True))
    whole = sum(int(n) // RUN for n in np.bincount(places))
    for run in found[: whole * RUN].reshape(-1, RUN):
        assert len({bucket[row] for row in run.tolist()}) == 1
    position = {row: n for n, row in enumerate(order.tolist())}
    leaders = [position[int(run[0])] for run in found[: whole * RUN].reshape(-1, RUN)]
    assert leaders == sorted(leaders)  # the permutation decides which run comes when


class Shaped:
    """Random pairs of three shapes in memory."""

    def __init__(self, n: int = 30) -> None:
        self.ids = [f"row-{i}" for i in range(n)]
        self.prompts = self.ids
        self.places = np.random.default_rng(2).choice(3, n).astype(np.uint16)
        self.embeds = keyed.normal((n, 5, 16), 3, "text")

    def batch(self, indices: Any, visits: Any, seed: int = 0) -> Batch:
        sides = ((8, 8), (6, 10), (12, 4))
        (place,) = {int(self.places[i]) for i in indices}  # more than one is an error
        latents = {
            name: torch.stack([keyed.normal((4, *sides[place]), 3, name, i) for i in indices])
            for name in ("chosen", "rejected")
        }
        names = tuple(self.ids[i] for i in indices)
        cond = {"prompt": Cond(self.embeds[list(indices)])}
        return Batch(names, tuple(visits), latents, cond, {}, torch.ones(len(names)))


@pytest.mark.parametrize("micro", [1, 3])
def test_a_step_over_mixed_buckets_is_a_loop_of_singles(micro: int) -> None:
    """Batch 10 over three shapes in one optimiser step; micro-batches change nothing."""
    steady = {"max_grad_norm": None, "eps": 1e-2, "batch": 10}
    whole = make_trainer(make_method("dpo", {"beta": 100.0}), rows=Shaped(), **steady)  # type: ignore[arg-type]
    parts = make_trainer(make_method("dpo", {"beta": 100.0}), rows=Shaped(), micro_batch=micro, **steady)  # type: ignore[arg-type]
    steps = [whole._load(n) for n in range(4)]
    assert all(1 < len(step) <= 3 for step in steps) and all(sum(map(len, step)) == 10 for step in steps)
    one = [sorted(i for part in step for i in part.ids) for step in steps]
    two = [sorted(i for part in parts._load(n) for i in part.ids) for n in range(4)]
    assert one == two and max(len(part) for part in parts._load(0)) <= micro
    assert gap(weights(warm(whole, 4)), weights(warm(parts, 4))) < 1e-5


def test_ranks_share_mixed_batches_and_resume_is_exact() -> None:
    source = Source(Shaped(), range(30), 0, Cond(torch.zeros(1, 5, 16)))  # type: ignore[arg-type]
    for draw in range(5):
        whole = source.share(draw, 9, 0, 1)
        parts = [source.share(draw, 9, rank, 2) for rank in (0, 1)]
        assert [row for part in parts for row in part[0]] == whole[0]
    options = {"rows": Shaped(), "batch": 8}
    straight = warm(make_trainer(make_method("dpo", {}), **options), 5)  # type: ignore[arg-type]
    first = warm(make_trainer(make_method("dpo", {}), **options), 2)  # type: ignore[arg-type]
    second = make_trainer(make_method("dpo", {}), **options)  # type: ignore[arg-type]
    second.load(first.state())
    assert all(map(torch.equal, weights(straight), weights(warm(second, 3))))


@pytest.mark.slow
def test_two_processes_and_a_resumed_run_train_on_buckets_as_one(
    shapes: Path, tiny_model_folder: Path, tmp_path: Path
) -> None:
    """Whole runs over seven shapes: in one go, stopped in the middle, and on two processes."""
    from diffalign.run import train

    changes = {"data__buckets": "true", "train__batch": 5, "train__micro_batch": 2, "train__steps": 4}
    changes |= {"method__beta": 50, "train__eps": 1e-3, "validate__pairs": 3, "train__device": "cpu"}

    def recipe_of(name: str, **more: Any) -> list[str]:
        return settings(tiny_model_folder, shapes, tmp_path / name, **{**changes, **more})

    for name, steps in (("alone", 4), ("resumed", 2), ("resumed", 4)):
        recipe, *overrides = recipe_of(name, train__steps=steps)
        train(load_recipe(recipe, overrides), progress=False)
    alone = final_state(tmp_path / "alone")
    assert same_tree(alone["roles"], final_state(tmp_path / "resumed")["roles"])
    assert same_tree(alone["optimizers"], final_state(tmp_path / "resumed")["optimizers"])
    done = launch("-m", "diffalign", "train", *recipe_of("together"))
    assert done.status == 0, done.err
    assert close(lora_of(tmp_path / "alone"), lora_of(tmp_path / "together")) < 1e-5


def test_prepared_columns_are_computed_bucket_by_bucket(shapes: Path, model: Model, tmp_path: Path) -> None:
    data = recipe(shapes, buckets=True)
    cache = open_cache(read_pairs(data).rows, model, data, tmp_path)
    cache.extend({"method": "test"}, lambda batch: {"energy": batch.latents["chosen"].square().mean((1, 2, 3))}, 8)
    for i in range(len(cache)):
        item = cache[i]
        assert item.columns["energy"] == pytest.approx(float(item.latents["chosen"].square().mean()), rel=1e-6)


# -- latents and files ------------------------------------------------------------------------------------------------


def test_half_latents_take_half_the_bytes(shapes: Path, model: Model, tmp_path: Path) -> None:
    caches = {}
    for kind in ("fp32", "fp16"):
        data = recipe(shapes, latents=kind)
        caches[kind] = open_cache(read_pairs(data).rows, model, data, tmp_path / kind)
    sizes = {kind: cache.stores["pictures"].bytes() for kind, cache in caches.items()}
    assert 0.45 < sizes["fp16"] / sizes["fp32"] < 0.6
    full, half = (cache.batch([3, 5], [0, 0]).latents["chosen"] for cache in caches.values())
    assert half.dtype == torch.float32 and 0 < float((full - half).abs().max()) < 1e-3 * float(full.abs().max())


def test_few_files_are_open(shapes: Path, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffalign.data import store

    monkeypatch.setattr(fill, "rows_per_shard", lambda size: 1)
    monkeypatch.setattr(store, "OPEN_FILES", 5)
    cache = open_cache(read_pairs(recipe(shapes)).rows, model, recipe(shapes), tmp_path)
    items = cache.items(range(24))
    assert len(cache.stores["pictures"].shards) >= 12 and len(cache.stores["pictures"].files.files) == 5
    assert all(
        torch.equal(a.latents["chosen"], b.latents["chosen"])
        for a, b in zip(items, cache.items(range(24)), strict=True)
    )
    if os.path.isdir("/proc/self/fd"):
        links = [
            os.readlink(f"/proc/self/fd/{n}")
            for n in os.listdir("/proc/self/fd")
            if os.path.exists(f"/proc/self/fd/{n}")
        ]
        assert sum("pictures-" in link for link in links) <= 5


def test_a_shard_that_is_cut_while_in_use_is_told(shapes: Path, model: Model, tmp_path: Path) -> None:
    cache: LatentCache = open_cache(read_pairs(recipe(shapes)).rows, model, recipe(shapes), tmp_path)
    (shard,) = (path for path in tmp_path.rglob("*.safetensors") if path.parent.name.startswith("pictures"))
    os.truncate(shard, 4000)
    with pytest.raises(fill.RunError, match="was cut off while it was in use"):
        cache.items(range(24))


def test_bench_data_runs(tmp_path: Path) -> None:
    from diffalign.bench.data import measure_data

    found = measure_data(load_recipe("tiny/dpo", ["train.device=cpu"]), 100, "folder", tmp_path, index=500)
    assert [stage.pairs for stage in found.stages] == [500, 100, 100, 100, 100, 100]
    assert all(stage.seconds > 0 and stage.peak >= stage.start for stage in found.stages)
    assert found.cache_mb > 0.1 and found.index["rows"] == 500 and json.dumps(found.json())
    with pytest.raises(UserError, match="too few"):
        measure_data(load_recipe("tiny/dpo"), 5)
    assert Image.open(next((tmp_path / "pairs-folder-100").rglob("*.jpg"))).size == (32, 32)
