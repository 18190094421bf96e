"""The cache gives what encoding gives, and nothing else: torn, stale and foreign shards are never used."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command import script
from PIL import Image

from diffalign.data import files, layout
from diffalign.data.cache import LatentCache, cache_plan, open_cache
from diffalign.data.encode import picture_job
from diffalign.data.images import load_image, prepare
from diffalign.data.readers import read_images, read_pairs
from diffalign.errors import RunError, UserError
from diffalign.families import Model, load_model
from diffalign.recipe import DataRecipe, ModelRecipe

COUNT = 6


def write_pairs(folder: Path, count: int = COUNT, **more: Callable[[int], Any]) -> Path:
    """Pairs of noisy pictures of different sizes, two prompts in turn."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for i in range(count):
        for k, name in enumerate(("chosen", "rejected")):
            size = (70 + 8 * i, 80) if k else (64, 66 + 5 * i)
            pixels = np.random.default_rng(2 * i + k).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{i}-{name}.png")
        row = {"prompt": f"thing {i % 2}", "chosen": f"{i}-chosen.png", "rejected": f"{i}-rejected.png"}
        lines.append(json.dumps({**row, **{key: make(i) for key, make in more.items()}}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def model(tiny_model_folder: Path) -> Model:
    return load_model(ModelRecipe(path=str(tiny_model_folder)), torch.device("cpu"), torch.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("pairs"))


def recipe(path: Path, **options: Any) -> DataRecipe:
    return DataRecipe(path=str(path), encode_batch=4, **options)


def make(path: Path, model: Model, root: Path, rank: int = 0, world: int = 1, **options: Any) -> LatentCache:
    data = recipe(path, **options)
    return open_cache(read_pairs(data).rows, model, data, root, rank=rank, world=world)


def shards(root: Path) -> list[Path]:
    return sorted(root.rglob("*.safetensors"))


def same(a: LatentCache, b: LatentCache) -> bool:
    """Every latent, embedding and size of two caches, bit by bit."""
    for left, right in zip(a.items(range(len(a))), b.items(range(len(b))), strict=True):
        named = [*zip(left.latents.values(), right.latents.values(), strict=True)]
        named += [(left.cond[k].embeds, right.cond[k].embeds) for k in left.cond]
        if left.id != right.id or not all(torch.equal(x, y) for x, y in named):
            return False
    return True


def test_memory_mapped_equals_direct_encoding(folder: Path, model: Model, tmp_path: Path) -> None:
    cache = make(folder, model, tmp_path)
    assert len(cache) == COUNT and cache.encoded == 2 * COUNT + 4  # 2 prompts, the empty one, the unconditional branch
    for i, row in enumerate(cache.rows):
        item = cache[i]
        assert item.id == row.id
        for name, ref in row.images.items():
            ready = prepare(load_image(folder / f"{i}-{name}.png"), 64)
            mean, _ = model.encode_images(ready.pixels[None])
            assert item.latents[name].shape == (4, 8, 8) and item.latents[name].dtype == torch.float32
            torch.testing.assert_close(item.latents[name], mean[0], rtol=1e-5, atol=1e-6)
            assert item.sizes[name].tolist() == [*ready.original, *ready.corner, 64, 64]
            assert ref.size == (ready.original[1], ready.original[0])
        expected = model.encode_prompts([f"thing {i % 2}"])
        torch.testing.assert_close(item.cond["prompt"].embeds, expected.embeds, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(cache.uncond.embeds, model.uncond().embeds, rtol=0, atol=0)
    torch.testing.assert_close(cache.encode(["thing 1", "new"]).embeds, model.encode_prompts(["thing 1", "new"]).embeds)


def test_second_opening_reads_only(folder: Path, model: Model, tmp_path: Path) -> None:
    first = make(folder, model, tmp_path)
    before = {p: p.stat().st_mtime_ns for p in shards(tmp_path)}
    encode = model.vae.encode
    model.vae.encode = None  # type: ignore[assignment]
    try:
        again = make(folder, model, tmp_path)
    finally:
        model.vae.encode = encode
    assert again.encoded == 0 and not again.refused and same(first, again)
    assert {p: p.stat().st_mtime_ns for p in shards(tmp_path)} == before


def test_without_a_cache_the_same_numbers(folder: Path, model: Model, tmp_path: Path) -> None:
    stored = make(folder, model, tmp_path, flip=True)
    live = make(folder, model, tmp_path / "none", flip=True, cache=False)
    assert not (tmp_path / "none").exists() and live.fingerprint == stored.fingerprint
    order, visits = [3, 0, 5], [0, 2, 1]
    a, b = stored.batch(order, visits, 7), live.batch(order, visits, 7)
    assert a.ids == b.ids == tuple(stored.ids[i] for i in order) and a.visits == (0, 2, 1)
    for name in ("chosen", "rejected"):
        torch.testing.assert_close(a.latents[name], b.latents[name], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(a.cond["prompt"].embeds, b.cond["prompt"].embeds, rtol=1e-5, atol=1e-6)
    assert a.weight.tolist() == [1, 1, 1] and a.columns == {}


def test_new_rows_alone_are_encoded(model: Model, tmp_path: Path) -> None:
    make(write_pairs(tmp_path / "d", 4), model, tmp_path / "c")
    kept = {p.name for p in shards(tmp_path / "c")}
    more = make(write_pairs(tmp_path / "d", 6), model, tmp_path / "c")
    assert more.encoded == 4 and kept < {p.name for p in shards(tmp_path / "c")}
    assert same(more, make(tmp_path / "d", model, tmp_path / "fresh"))
    os.replace(tmp_path / "d" / "0-chosen.png", tmp_path / "d" / "1-rejected.png")
    write_pairs(tmp_path / "other", 1)
    shutil.copy(tmp_path / "other" / "0-chosen.png", tmp_path / "d" / "0-chosen.png")
    assert make(tmp_path / "d", model, tmp_path / "c").encoded == 0  # known content under another name


def damage(kind: str, path: Path) -> None:
    data = bytearray(path.read_bytes())
    if kind == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif kind == "header":
        path.write_bytes(data[:5])
    elif kind == "bit":
        data[-3] ^= 1
        path.write_bytes(data)
    elif kind == "zeros":
        path.write_bytes(b"\0" * len(data))
    elif kind == "longer":
        path.write_bytes(data + b"\0")


@pytest.mark.parametrize("kind", ["cut", "header", "bit", "zeros", "longer"])
def test_torn_shards_are_refused_and_rebuilt(kind: str, folder: Path, model: Model, tmp_path: Path) -> None:
    whole = make(folder, model, tmp_path)
    expected = whole.batch(range(COUNT), [0] * COUNT)
    del whole
    (path,) = [p for p in shards(tmp_path) if p.parent.name.startswith("pictures")]
    damage(kind, path)
    again = make(folder, model, tmp_path)
    assert len(again.refused) == 1 and again.encoded == 2 * COUNT
    found = again.batch(range(COUNT), [0] * COUNT)
    assert all(torch.equal(found.latents[k], expected.latents[k]) for k in expected.latents)


def test_a_shard_of_other_settings_is_never_used(folder: Path, model: Model, tmp_path: Path) -> None:
    """Even one that was moved into the right folder by hand."""
    make(folder, model, tmp_path, alpha="black")
    (foreign,) = [p for p in shards(tmp_path) if p.parent.name.startswith("pictures")]
    made_by = layout.made_by_of(model, recipe(folder), 64)
    target = layout.store_folder(tmp_path, "pictures", made_by["pictures"])
    target.mkdir()
    shutil.copy(foreign, target)
    cache = make(folder, model, tmp_path)
    assert cache.encoded == 2 * COUNT and "other weights or settings" in cache.refused[0]
    assert not (target / foreign.name).exists() and foreign.exists()


def test_settings_lie_side_by_side(folder: Path, model: Model, tmp_path: Path) -> None:
    plain = make(folder, model, tmp_path)
    for options in ({"resolution": 32}, {"crop": "random"}, {"alpha": "black"}, {"posterior": "sample"}):
        other = make(folder, model, tmp_path, **options)
        assert other.encoded == 2 * COUNT and other.fingerprint != plain.fingerprint
    assert make(folder, model, tmp_path).encoded == 0
    assert len(list(tmp_path.glob("pictures-*"))) == 5 and len(list(tmp_path.glob("prompts-*"))) == 1


@pytest.mark.parametrize("part", ["vae", "text_encoder", "tokenizer"])
def test_other_weights_make_another_cache(
    part: str, folder: Path, tiny_model_folder: Path, model: Model, tmp_path: Path
) -> None:
    from tiny import tiny_pipeline

    make(folder, model, tmp_path / "c")
    shutil.copytree(tiny_model_folder, tmp_path / "m")
    if part == "tokenizer":
        path = tmp_path / "m" / "tokenizer" / "tokenizer_config.json"
        path.write_text(path.read_text().replace("{", '{"note": "other", ', 1))
    else:
        getattr(tiny_pipeline(seed=1), part).save_pretrained(tmp_path / "m" / part)
    other = load_model(ModelRecipe(path=str(tmp_path / "m")), torch.device("cpu"), torch.float32)
    cache = make(folder, other, tmp_path / "c")
    assert cache.encoded == (2 * COUNT if part == "vae" else 4)


def test_a_flat_cache_serves_its_own_weights_only(folder: Path, model: Model, tmp_path: Path) -> None:
    data = recipe(folder)
    rows = read_pairs(data).rows
    flat = open_cache(rows, model, data, tmp_path / "flat", flat=True)
    assert sorted(p.name for p in (tmp_path / "flat").iterdir()) == ["pictures", "prompts"]
    assert open_cache(rows, model, data, tmp_path / "flat").encoded == 0 and flat.encoded > 0
    other = recipe(folder, resolution=32)
    for call in (open_cache, cache_plan):
        with pytest.raises(
            UserError, match=r"cache of other weights or settings \(resolution 64, now 32\); set data.cache_dir"
        ):
            call(rows, model, other, tmp_path / "flat")
    note = json.loads((tmp_path / "flat" / "pictures" / "cache.json").read_text())
    note["made_by"]["vae"] = "0" * 64
    (tmp_path / "flat" / "pictures" / "cache.json").write_text(json.dumps(note))
    with pytest.raises(UserError, match="other vae weights"):
        open_cache(rows, model, data, tmp_path / "flat", flat=True)


def test_flip_turns_both_members_together(folder: Path, model: Model, tmp_path: Path) -> None:
    make(folder, model, tmp_path)
    cache = make(folder, model, tmp_path, flip=True)
    assert cache.encoded == 2 * COUNT  # the mirrored ones; the others were there
    visits = list(range(40))
    flags = [cache.flipped(2, visit, 5) for visit in visits]
    assert 10 < sum(flags) < 30
    assert flags != [cache.flipped(3, visit, 5) for visit in visits] != [cache.flipped(3, visit, 6) for visit in visits]
    batch = cache.batch([2] * 40, visits, 5)
    for name in ("chosen", "rejected"):
        pixels = prepare(load_image(folder / f"2-{name}.png"), 64).pixels
        plain, mirrored = model.encode_images(torch.stack([pixels, pixels.flip(-1)]))[0]
        assert not torch.allclose(plain, mirrored, atol=1e-3)
        for found, flag in zip(batch.latents[name], flags, strict=True):
            torch.testing.assert_close(found, mirrored if flag else plain, rtol=1e-5, atol=1e-6)


def test_random_crops_belong_to_the_sample(folder: Path, model: Model, tmp_path: Path) -> None:
    cache = make(folder, model, tmp_path, crop="random")
    for i, row in enumerate(cache.rows):
        ready = prepare(load_image(folder / f"{i}-rejected.png"), 64, "random", row.id)
        torch.testing.assert_close(cache[i].latents["rejected"], model.encode_images(ready.pixels[None])[0][0])
        assert cache[i].sizes["rejected"].tolist()[2:4] == [*ready.corner]


def test_posterior_is_sampled_by_key(folder: Path, model: Model, tmp_path: Path) -> None:
    mean = make(folder, model, tmp_path).batch([0, 1], [0, 0])
    cache = make(folder, model, tmp_path, posterior="sample")
    std = torch.stack([item.std["chosen"] for item in cache.items([0, 1])])
    assert std.dtype == torch.float16
    draws = torch.stack([cache.batch([0, 1], [v, v], 3).latents["chosen"] for v in range(200)])
    assert torch.equal(draws[4], cache.batch([0, 1], [4, 4], 3).latents["chosen"])
    assert not torch.equal(draws[4], cache.batch([0, 1], [4, 4], 4).latents["chosen"])
    z = (draws - mean.latents["chosen"]) / std.float()
    assert abs(float(z.mean())) < 0.01 and abs(float(z.std()) - 1) < 0.01
    (one,) = cache.items([0])
    assert torch.equal(cache.collate([one], [4], 3).latents["chosen"][0], draws[4, 0])


def test_columns_and_second_prompts(model: Model, tmp_path: Path) -> None:
    more = {
        "chosen_score": lambda i: i / 2 if i else None,
        "rejected_prompt": lambda i: f"other {i}" if i == 1 else None,
    }
    cache = make(write_pairs(tmp_path / "d", 3, **more), model, tmp_path / "c")
    batch = cache.batch([0, 1, 2], [0, 0, 0])
    assert batch.columns["chosen_score"].isnan().tolist() == [True, False, False] and "tie" not in batch.columns
    expected = model.encode_prompts(["thing 0", "other 1", "thing 0"]).embeds
    torch.testing.assert_close(batch.cond["rejected_prompt"].embeds, expected, rtol=1e-5, atol=1e-6)
    ties = make(write_pairs(tmp_path / "t", 3, tie=lambda i: i == 1), model, tmp_path / "c", ties="keep")
    assert ties.batch([0, 1, 2], [0, 0, 0]).columns["tie"].tolist() == [0, 1, 0]


def test_prepared_columns_are_computed_once(folder: Path, model: Model, tmp_path: Path) -> None:
    calls: list[int] = []

    def compute(batch: Any) -> dict[str, torch.Tensor]:
        calls.append(len(batch))
        return {"energy": batch.latents["chosen"].square().mean((1, 2, 3))}

    for cached in (True, True, False):
        cache = make(folder, model, tmp_path, cache=cached)
        cache.extend({"method": "test", "beta": "1"}, compute, batch=4)
        batch = cache.batch([4, 1], [0, 0])
        torch.testing.assert_close(batch.columns["energy"], batch.latents["chosen"].square().mean((1, 2, 3)))
    assert calls == [4, 2, 4, 2]
    make(folder, model, tmp_path).extend({"method": "test", "beta": "2"}, compute, batch=6)
    assert calls[4:] == [6]


def test_plain_pictures(folder: Path, model: Model, tmp_path: Path) -> None:
    (tmp_path / "metadata.csv").write_text(
        "file_name,text\n" + "".join(f"{folder / f'{i}-chosen.png'},thing {i}\n" for i in range(3))
    )
    data = recipe(tmp_path)
    batch = open_cache(read_images(data).rows, model, data, tmp_path / "c").batch([2, 0], [0, 0])
    pairs = make(folder, model, tmp_path / "c")
    assert pairs.encoded == 2 * COUNT - 3
    assert torch.equal(batch.latents["image"], pairs.batch([2, 0], [0, 0]).latents["chosen"])


CHILD = """
import sys, torch
from diffalign.data.cache import open_cache
from diffalign.data import fill
from diffalign.data.readers import read_pairs
from diffalign.families import load_model
from diffalign.recipe import DataRecipe, ModelRecipe
fill.rows_per_shard = lambda n: 4
model = load_model(ModelRecipe(path=sys.argv[1]), torch.device("cpu"), torch.float32)
data = DataRecipe(path=sys.argv[2], encode_batch=4)
open_cache(read_pairs(data).rows, model, data, __import__("pathlib").Path(sys.argv[3]))
"""


def test_kill_9_and_resume(tiny_model_folder: Path, model: Model, tmp_path: Path) -> None:
    """Killed as soon as some shards stand: they are kept, and the rest is as from one go."""
    source = write_pairs(tmp_path / "d", 60)
    root = tmp_path / "c"
    child = script(CHILD, tiny_model_folder, source, root)
    deadline = time.time() + 240
    while len(list(root.glob("pictures-*/*.safetensors"))) < 4 and time.time() < deadline:
        time.sleep(0.002)
    child.send(signal.SIGKILL)
    assert child.wait().status == -signal.SIGKILL
    kept = len(list(root.glob("pictures-*/*.safetensors")))
    assert 4 <= kept < 30
    for leftover in root.rglob(".*.tmp"):
        os.utime(leftover, (0, 0))
    (next(root.glob("pictures-*")) / ".old.safetensors.1.tmp").write_bytes(b"half")
    os.utime(next(root.glob("pictures-*")) / ".old.safetensors.1.tmp", (0, 0))
    cache = make(source, model, root)
    assert cache.encoded == 120 - 4 * kept and not cache.refused and not list(root.rglob(".*.tmp"))
    assert same(cache, make(source, model, tmp_path / "fresh"))


def test_processes_share_the_work(folder: Path, model: Model, tmp_path: Path) -> None:
    """Two ranks in threads with a real barrier, one of them slow."""
    import threading

    meet = threading.Barrier(2, timeout=60)
    data = recipe(folder)
    rows = read_pairs(data).rows
    found: dict[int, LatentCache] = {}

    def work(rank: int) -> None:
        def barrier() -> None:
            meet.wait()
            time.sleep(0.5 * rank)  # the second is late: what the first wrote meanwhile must not change the shares

        found[rank] = open_cache(rows, model, data, tmp_path, rank=rank, world=2, barrier=barrier)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[0].encoded == found[1].encoded == COUNT + 2
    assert same(found[0], found[1]) and len(found[1].stores["pictures"]) == 2 * COUNT


def test_folders_that_are_not_shared_are_named(folder: Path, model: Model, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="a folder that all machines share"):
        make(folder, model, tmp_path, rank=0, world=2)


def test_plan_states_bytes_and_stops(
    folder: Path, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = recipe(folder)
    rows = read_pairs(data).rows
    plan = cache_plan(rows, model, data, tmp_path / "c")
    assert not (tmp_path / "c").exists() and plan.bytes == plan.missing_bytes and plan.pictures == 2 * COUNT
    cache = open_cache(rows, model, data, tmp_path / "c")
    written = sum(store.bytes() for store in cache.stores.values())
    assert written <= plan.bytes * 1.05 and plan.bytes <= written * 1.2
    assert cache_plan(rows, model, data, tmp_path / "c").missing_bytes == 0
    more = cache_plan(rows, model, recipe(folder, flip=True), tmp_path / "c")
    assert 0 < more.missing_bytes < more.bytes
    from diffalign.data import fill as module

    monkeypatch.setattr(module, "free_bytes", lambda folder: 1000)
    with pytest.raises(UserError, match=r"disk too small for the cache in .* bytes needed, 1,000 free") as error:
        open_cache(rows, model, data, tmp_path / "small")
    assert "\n" not in str(error.value) and not shards(tmp_path / "small")
    assert open_cache(rows, model, data, tmp_path / "c").encoded == 0


def test_a_full_disk_is_one_line_and_leaves_nothing_torn(
    folder: Path, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync = os.fsync
    calls = [0]

    def full(handle: int) -> None:
        calls[0] += 1
        if calls[0] > 6:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(handle)

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(RunError, match=r"disk full: .* no room for [\d,]+ bytes"):
        make(folder, model, tmp_path)
    monkeypatch.setattr(files.os, "fsync", fsync)
    assert not list(tmp_path.rglob(".*.tmp"))
    cache = make(folder, model, tmp_path)
    assert not cache.refused and same(cache, make(folder, model, tmp_path / "fresh"))


def test_unwritable_folder(folder: Path, model: Model, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=r"cannot be made .*; set data.cache_dir"):
        make(folder, model, tmp_path / "file" / "c")


def test_wrong_resolution(folder: Path, model: Model, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data.resolution 50 is no multiple of 8, the VAE's factor; set 48"):
        make(folder, model, tmp_path, resolution=50)


def test_a_picture_that_changes_meanwhile(model: Model, tmp_path: Path) -> None:
    data = recipe(write_pairs(tmp_path / "d", 2))
    rows = read_pairs(data).rows
    shutil.copy(tmp_path / "d" / "0-chosen.png", tmp_path / "d" / "1-chosen.png")
    with pytest.raises(RunError, match=r"1-chosen.png': changed since it was looked at"):
        open_cache(rows, model, data, tmp_path / "c")
    assert not any(
        job.key in open_cache(rows[:1], model, data, tmp_path / "c").stores["pictures"]
        for job in [picture_job(rows[1].chosen, "", data)]
    )


def test_latents_that_are_not_finite(folder: Path, tiny_model_folder: Path, tmp_path: Path) -> None:
    broken = load_model(ModelRecipe(path=str(tiny_model_folder)), torch.device("cpu"), torch.float32)
    with torch.no_grad():
        broken.vae.quant_conv.weight.fill_(float("inf"))
    with pytest.raises(UserError, match=r"not finite for .*; keep the VAE in fp32"):
        make(folder, broken, tmp_path)
    assert not list(tmp_path.glob("pictures-*/*.safetensors"))


def test_reading_is_cheap(model: Model, tmp_path: Path) -> None:
    cache = make(write_pairs(tmp_path / "d", 40), model, tmp_path / "c")
    order = np.random.default_rng(0).integers(0, 40, 400).tolist()
    cache.batch(order[:40], [0] * 40)
    start = time.process_time()  # the clock also counts whatever else the machine does
    for i in order:
        cache[i]
    assert (time.process_time() - start) / len(order) < 2e-3
