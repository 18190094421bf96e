"""kill -9 at random instants of train, cache, export and convert: the same command goes on, and the end is the same.

The default run kills a few times; ``make test-faults`` a hundred times in all."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from faults import kill_again_and_again, run_through, tree
from safetensors import safe_open
from small import curve, final_state, lora_of, same_tree, settings, write_pairs

from diffalign.checkpoint import checkpoint_dirs, load_checkpoint
from diffalign.data.files import file_sha256

KILLS = {"train": 40, "cache": 25, "export": 14, "convert": 21}


def few_or_all(name: str, few: int) -> pytest.MarkDecorator:
    """A short version for every day, the whole for the campaign."""
    return pytest.mark.parametrize("kills", [few, pytest.param(KILLS[name], marks=pytest.mark.slow)])


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kills")


@pytest.fixture(scope="module")
def straight(tiny_model_folder: Path, place: Path) -> tuple[Path, dict[str, object], float]:
    """A run that nothing happened to, the settings of all, and its processor time."""
    options: dict[str, object] = {
        "model": tiny_model_folder,
        "data": write_pairs(place / "pairs"),
        "data__cache_dir": place / "cache",
        "train__ema": 0.9,
        "train__save_every": 1,
    }
    out = place / "straight"
    run_through("train", *settings(out=place / "warm", **options))  # type: ignore[arg-type]
    seconds = run_through("train", *settings(out=out, **options))  # type: ignore[arg-type]
    return out, options, seconds


@few_or_all("train", 2)
def test_train(kills: int, straight: tuple[Path, dict[str, object], float], place: Path) -> None:
    """A checkpoint every step, so that many kills fall into a save."""
    model, options, seconds = straight
    out, steps = place / f"train-{kills}", [0]
    left = []

    def after_kill() -> None:
        found = checkpoint_dirs(out / "checkpoints")
        for path in found:
            load_checkpoint(path)  # what is there under its name is whole
        newest = max((int(path.name.removeprefix("step-")) for path in found), default=0)
        assert newest >= steps[0], "a checkpoint was lost"
        steps[0] = newest
        left.append(newest)

    def finished() -> None:
        assert same_tree(lora_of(model), lora_of(out)) and same_tree(final_state(model), final_state(out))
        assert curve(model) == curve(out)
        shutil.rmtree(out)
        steps[0] = 0

    args: list[object] = ["train", *settings(out=out, **options)]  # type: ignore[arg-type]
    ends = kill_again_and_again(
        args, kills, (0.1 * seconds, seconds), random.Random(f"train {kills}"), after_kill, finished
    )
    print(f"train: {kills} kills over {ends} runs of {seconds:.1f} s; newest checkpoints after them: {left}")
    assert kills < 10 or len(set(left)) > 5


# Small shards and a kept scan, so that kills fall between many files.
MANY_FILES = """
import diffalign.data.encode as encode, diffalign.data.reading as reading, diffalign.data.rowfile as rowfile
import diffalign.data.scan as scan, diffalign.data.store as store
store.SHARD_ROWS = encode.PROMPT_BATCH = 8
scan.KEEP_FROM = rowfile.KEEP_FROM = 1
reading.SAVE_EVERY = reading.CHUNK = 16
"""


def entries(root: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Every entry of every shard; each shard must be whole."""
    found = {}
    for path in root.rglob("*.safetensors"):
        assert file_sha256(path)[:32] == path.stem, f"{path} is torn"
        with safe_open(str(path), "pt") as file:
            keys, tensors = file.metadata()["keys"].split(" "), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        for number, key in enumerate(keys):
            found[f"{path.parent.name}/{key}"] = {name: tensor[number] for name, tensor in tensors.items()}
    return found


@few_or_all("cache", 2)
def test_cache(kills: int, tiny_model_folder: Path, place: Path) -> None:
    data, root, have = write_pairs(place / f"many-{kills}", 60), place / f"cache-{kills}", [0]
    args: list[object] = ["cache", *settings(tiny_model_folder, data, place / "none", data__cache_dir=root)]
    seconds = run_through(*args, code=MANY_FILES)
    expected = entries(root)
    assert len(expected) == 120 + 60 + 2
    shutil.rmtree(root)
    left = []

    def after_kill() -> None:
        now = len(entries(root)) if root.exists() else 0
        assert now >= have[0], "entries were lost"
        have[0] = now
        left.append(now)

    def finished() -> None:
        found = entries(root)
        assert found.keys() == expected.keys()
        for key, tensors in expected.items():
            assert all(torch.allclose(found[key][name], tensor, atol=1e-5) for name, tensor in tensors.items()), key
        shutil.rmtree(root)
        have[0] = 0

    rng = random.Random(f"cache {kills}")
    ends = kill_again_and_again(args, kills, (0.1 * seconds, seconds), rng, after_kill, finished, code=MANY_FILES)
    print(f"cache: {kills} kills over {ends} fillings of {seconds:.1f} s; entries after them: {left}")
    assert kills < 10 or len(set(left)) > 5


@few_or_all("export", 1)
def test_export(kills: int, straight: tuple[Path, dict[str, object], float], place: Path) -> None:
    """A merged pipeline: many files, one folder, there as a whole or not at all."""
    out = place / f"export-{kills}"
    args: list[object] = ["export", straight[0], "--format", "merged", "--out", out]
    seconds = run_through(*args)
    expected = tree(out)
    shutil.rmtree(out)
    whole = []

    def after_kill() -> None:
        whole.append(out.exists())
        if whole[-1]:
            assert tree(out) == expected

    def finished() -> None:
        assert tree(out) == expected
        assert not list(out.parent.glob(f".{out.name}*")), "hidden folders are left"
        shutil.rmtree(out)

    rng = random.Random(f"export {kills}")
    ends = kill_again_and_again(args, kills, (0.1 * seconds, seconds), rng, after_kill, finished)
    print(f"export: {kills} kills over {ends} exports of {seconds:.1f} s; there after a kill: {sum(whole)}")


# Pieces of a few rows, so that kills fall between many.
PIECES = "import diffalign.data.convert as convert; convert.PIECE_ROWS = 12"


@few_or_all("convert", 2)
def test_convert(kills: int, place: Path) -> None:
    source, left = write_pairs(place / f"source-{kills}", 200), []
    formats = ("parquet", "webdataset", "folder") if kills > 3 else ("webdataset",)
    for form in formats:
        out = place / f"convert-{kills}-{form}"
        partial, kept = out.parent / f".{out.name}.partial", [0]
        args: list[object] = ["pairs", "convert", source, out, "--format", form, "--quiet"]
        seconds = run_through(*args, code=PIECES)
        expected = tree(out)
        shutil.rmtree(out)

        def after_kill(out: Path = out, partial: Path = partial, kept: list[int] = kept) -> None:
            if out.exists():
                kept[0] = 200
            else:
                note = partial / ".progress.json"
                now = json.loads(note.read_text())["kept"] if note.exists() else 0
                assert now >= kept[0], "rows were lost"
                kept[0] = now
            left.append(kept[0])

        def finished(
            out: Path = out, partial: Path = partial, kept: list[int] = kept, expected: dict[str, str] = expected
        ) -> None:
            assert tree(out) == expected and not partial.exists()
            shutil.rmtree(out)
            kept[0] = 0

        rng = random.Random(f"convert {form} {kills}")
        limits = (0.1 * seconds, seconds)
        kill_again_and_again(args, kills // len(formats), limits, rng, after_kill, finished, code=PIECES)
        print(f"convert to {form}: {seconds:.1f} s; rows durable after the kills so far: {left}")
    assert kills < 10 or len(set(left)) > 5
