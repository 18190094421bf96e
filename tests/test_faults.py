"""Faults while training: kills, interrupts, full disks, torn and foreign checkpoints, numbers that are not finite."""

from __future__ import annotations

import json
import shutil
import signal
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from command import Child, Result, diffalign, start
from faults import small_disk
from small import curve, final_state, log_of, lora_of, same_tree, settings, write_pairs

from diffalign.checkpoint import checkpoint_dirs, load_checkpoint

STEPS = 12


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def pairs(place: Path) -> Path:
    return write_pairs(place / "pairs")


@pytest.fixture(scope="module")
def options(tiny_model_folder: Path, pairs: Path, place: Path) -> dict[str, object]:
    """The settings of every run here. One cache for all: the runs are about steps, not about encoding."""
    return {"model": tiny_model_folder, "data": pairs, "data__cache_dir": place / "cache", "train__ema": 0.9}


@pytest.fixture(scope="module")
def straight(options: dict[str, object], place: Path) -> Path:
    """A run that nothing happened to."""
    out = place / "straight"
    done = diffalign("train", *settings(out=out, **options))  # type: ignore[arg-type]
    assert done.status == 0, done.err
    return out


def arguments(options: dict[str, object], out: Path, **changes: object) -> list[str]:
    return ["train", *settings(out=out, **{**options, **changes})]  # type: ignore[arg-type]


def assert_same_end(a: Path, b: Path) -> None:
    """Weights, optimiser, average and curves of two runs, bit by bit."""
    assert same_tree(lora_of(a), lora_of(b))
    assert same_tree(final_state(a), final_state(b))
    assert curve(a) == curve(b)


def checkpoints(out: Path) -> list[int]:
    """Steps of the complete checkpoints; each must load."""
    found = checkpoint_dirs(out / "checkpoints")
    for path in found:
        load_checkpoint(path)
    return [int(path.name.removeprefix("step-")) for path in found]


# Ends the process without a word at the k-th call that the save makes to the system.
KILL = """
import os, signal
import diffalign.checkpoint as checkpoint
left = [{at}]
def count(function):
    def called(*args, **options):
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **options)
    return called
def arm():
    for name in ("replace", "fsync", "unlink", "rmdir", "mkdir"):
        setattr(os, name, count(getattr(os, name)))
    import torch
    torch.save = count(torch.save)
"""
SAVES = """
import torch
from pathlib import Path
folder = Path({folder!r})
def save(step):
    checkpoint.save_checkpoint(folder, step, {{"x": torch.full((9,), float(step))}}, {{"step": step}})
    checkpoint.prune(folder, 1)
save(1)
arm()
save(2)
save(2)
save(3)
"""


def test_a_kill_at_every_point_of_a_save(tmp_path: Path) -> None:
    """Whatever the moment: complete checkpoints alone are seen, each with its own content, and never none but while the
    one of the same step is replaced."""
    at, gaps = 0, 0
    while True:
        at += 1
        folder = tmp_path / str(at)
        done = start(code=KILL.format(at=at) + SAVES.format(folder=str(folder))).wait()
        found = checkpoint_dirs(folder)
        for path in found:
            tensors, facts = load_checkpoint(path)
            assert float(tensors["x"][0]) == facts["step"] == int(path.name.removeprefix("step-"))
        if done.status == 0:
            break
        assert done.status == -signal.SIGKILL, done.err
        gaps += not found
    assert at > 20 and [p.name for p in folder.iterdir()] == ["step-000003"]
    assert gaps <= 1


def wait_for(child: Child, path: Path, seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end and child.running(), child.err()
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_saves_and_goes_on_exactly(
    number: signal.Signals, straight: Path, options: dict[str, object], place: Path
) -> None:
    out = place / f"interrupted-{number}"
    args = arguments(options, out)
    child = start(*args)
    wait_for(child, out / "checkpoints" / "step-000004")
    child.send(number)
    done = child.wait()
    steps = checkpoints(out)
    assert done.status == 130 and not (out / "model").exists()
    newest = out / "checkpoints" / f"step-{steps[-1]:06d}"
    assert done.err.splitlines()[-1] == (
        f"diffalign: interrupted after step {steps[-1]}; the last checkpoint is {newest}; "
        "the same command goes on from there"
    )
    again = diffalign(*args)
    assert again.status == 0 and f"going on from {newest}" in again.err
    assert_same_end(straight, out)


def test_more_steps_go_on_exactly(straight: Path, options: dict[str, object], place: Path) -> None:
    """A constant schedule may be lengthened; a schedule that ends may not."""
    out = place / "longer"
    assert diffalign(*arguments(options, out, train__steps=6)).status == 0
    assert (out / "model").is_dir() and checkpoints(out) == [4, 6]
    assert diffalign(*arguments(options, out)).status == 0
    assert same_tree(lora_of(straight), lora_of(out))
    assert final_state(out)["optimizers"]["student"]["state"][0]["step"] == STEPS
    falling = place / "falling"
    assert diffalign(*arguments(options, falling, train__schedule="linear", train__steps=2)).status == 0
    refused = diffalign(*arguments(options, falling, train__schedule="linear", train__steps=3))
    assert refused.status == 2 and "train.steps was 2, now 3" in refused.line
    assert checkpoints(falling) == [2]


def test_a_done_run_is_left_as_it_is(straight: Path, options: dict[str, object]) -> None:
    before, steps = lora_of(straight), checkpoints(straight)
    again = diffalign(*arguments(options, straight))
    assert again.status == 0 and same_tree(before, lora_of(straight)) and checkpoints(straight) == steps
    never = diffalign(*arguments(options, straight), "--resume", "never")
    assert never.status == 2 and "holds a run at step-000012" in never.line
    assert checkpoints(straight) == steps


def test_checkpoints_of_other_recipes_and_rows_are_refused(
    straight: Path, options: dict[str, object], place: Path
) -> None:
    steps, log = checkpoints(straight), (straight / "log.jsonl").read_bytes()
    for key, value, old in (
        ("train.lr", 2e-2, "0.01"),
        ("method.beta", 7.0, "1000.0"),
        ("model.lora.rank", 8, "4"),
        ("train.seed", 1, "0"),
        ("validate.pairs", 3, "2"),
    ):
        args = arguments(options, straight, **{key.replace(".", "__"): value})
        line = expect(2, diffalign(*args))
        assert f"is of another recipe: {key} was {old}, now {value}" in line
    other = place / "other-rows"
    shutil.copytree(options["data"], other)  # type: ignore[call-overload]
    moved = place / "moved"
    shutil.copytree(straight, moved)
    state = moved / "checkpoints" / "step-000012" / "state.json"
    facts = json.loads(state.read_text())
    facts["recipe"]["data"]["path"] = str(other)
    state.write_text(json.dumps(facts))
    assert diffalign(*arguments(options, moved, data=other)).status == 0, "the same rows at another place"
    write_pairs(other, 11)
    line = expect(2, diffalign(*arguments(options, moved, data=other), "--quiet"))
    assert "was trained on other rows of data.path" in line
    assert checkpoints(straight) == steps and (straight / "log.jsonl").read_bytes() == log


def expect(status: int, result: Result) -> str:
    """The one line of a failure."""
    assert result.status == status, (result.status, result.err)
    return result.line


def middle_of_a_tensor(file: Path) -> int:
    """Position of a byte of the largest tensor in a checkpoint, which is a zip archive."""
    with zipfile.ZipFile(file) as archive:
        entry = max(archive.infolist(), key=lambda e: e.file_size)
    head = file.read_bytes()[entry.header_offset : entry.header_offset + 30]
    names = int.from_bytes(head[26:28], "little") + int.from_bytes(head[28:30], "little")
    return entry.header_offset + 30 + names + entry.file_size // 2


@pytest.mark.parametrize("damage", ["cut", "empty", "garbage", "bit", "facts", "half"])
def test_a_torn_checkpoint_is_refused(damage: str, straight: Path, options: dict[str, object], tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(straight, out)
    newest = out / "checkpoints" / "step-000012"
    state, facts = newest / "state.pt", newest / "state.json"
    data = bytearray(state.read_bytes())
    if damage == "cut":
        state.write_bytes(data[: len(data) // 2])
    elif damage == "empty":
        state.write_bytes(b"")
    elif damage == "garbage":
        state.write_bytes(b"not a checkpoint" * 99)
    elif damage == "bit":
        data[middle_of_a_tensor(state)] ^= 64
        state.write_bytes(data)
    elif damage == "facts":
        facts.write_text("[]")
    else:
        facts.write_text(facts.read_text()[:100])
    line = expect(2, diffalign(*arguments(options, out), "--quiet"))
    assert str(newest) in line and "pass another to --resume" in line
    earlier = out / "checkpoints" / "step-000008"
    if damage == "cut":
        assert diffalign(*arguments(options, out), "--resume", earlier).status == 0
        assert_same_end(straight, out)


def test_a_file_that_cannot_grow_keeps_the_last_checkpoint(
    straight: Path, options: dict[str, object], place: Path
) -> None:
    """The system refuses every file beyond a size, in the middle of a checkpoint; without the limit it goes on."""
    out = place / "limited"
    size = (straight / "checkpoints" / "step-000012" / "state.pt").stat().st_size
    assert diffalign(*arguments(options, out, train__steps=4)).status == 0
    line = expect(1, diffalign(*arguments(options, out), "--quiet", file_bytes=size // 2))
    assert "checkpoint of step 8 could not be written" in line and "the last good one is" in line
    assert checkpoints(out) == [4]
    assert [p.name for p in (out / "checkpoints").iterdir()] == ["step-000004"]
    assert diffalign(*arguments(options, out)).status == 0
    assert same_tree(lora_of(straight), lora_of(out))


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own."""
    with small_disk(tmp_path / "disk", "1200k") as found:
        if found is None:
            pytest.skip("no right to mount a small file system here; the test with a limit on files covers the save")
        yield found


def test_a_full_disk_at_any_moment(disk: Path, straight: Path, options: dict[str, object]) -> None:
    """Less and less room: the run stops in one line, wherever it was, and goes on when there is room again."""
    out, filler = disk / "run", disk / "filler"
    places = set()
    for room in (20, 120, 260, 420, 700):
        filler.unlink(missing_ok=True)
        free = shutil.disk_usage(disk).free
        filler.write_bytes(b"0" * max(0, free - room * 1024))
        done = diffalign(*arguments(options, out), "--quiet")
        if done.status == 0:
            break
        places.add(expect(1, done)[:60])
        assert not list((out / "checkpoints").glob("*.tmp")) and checkpoints(out) is not None
    filler.unlink()
    assert len(places) >= 2, places
    assert diffalign(*arguments(options, out)).status == 0
    assert same_tree(lora_of(straight), lora_of(out))


# A loss that is not finite for chosen steps, put into the method of the run.
POISON = """
import diffalign.methods.preference.dpo as module
import torch
cls = module.DPO
plain, calls = cls.loss, [0]
def loss(self, ctx, batch, phase):
    found = plain(self, ctx, batch, phase)
    if ctx.phase != "validate":
        calls[0] += 1
        if calls[0] in {steps}:
            found.values = found.values * torch.tensor([float("nan")] + [1.0] * (len(found.values) - 1))
    return found
cls.loss = loss
"""


def test_gradients_that_are_not_finite_are_skipped_and_counted(options: dict[str, object], place: Path) -> None:
    out = place / "poisoned"
    done = diffalign(*arguments(options, out), code=POISON.format(steps="{3, 7}"))
    assert done.status == 0, done.err
    assert [row.get("skipped", 0) for row in log_of(out)] == [1, 2, 2]
    assert all(bool(torch.isfinite(w).all()) for w in lora_of(out).values())
    assert float(final_state(out)["optimizers"]["student"]["state"][0]["step"]) == STEPS - 2
    assert all(json.dumps(row, allow_nan=False) for row in log_of(out)), "the log is plain JSON"


def test_too_many_of_them_stop_the_run(options: dict[str, object], place: Path) -> None:
    out = place / "stopped"
    args = arguments(options, out, train__max_nonfinite=2, train__save_every=3)
    done = diffalign(*args, code=POISON.format(steps="range(7, 99)"))
    assert done.status == 1
    last = done.err.splitlines()[-1]
    assert "in a row had non-finite gradients (train.max_nonfinite=2)" in last
    assert f"the last checkpoint is {out}/checkpoints/step-" in last
    tensors, _ = load_checkpoint(checkpoint_dirs(out / "checkpoints")[-1])
    assert all(bool(torch.isfinite(w).all()) for w in tensors["roles"]["student"].values())


# Whatever is learned, the winner's held-out error is above the base's.
WORSE = """
import diffalign.run as run
plain = run.heldout_metrics
def metrics(*args):
    found = plain(*args)
    return {**found, "chosen_gain": -0.5} if args[0].step else found
run.heldout_metrics = metrics
"""


def test_the_winner_guard_warns_or_stops(options: dict[str, object], place: Path) -> None:
    warned = diffalign(*arguments(options, place / "warned", validate__every=4), code=WORSE)
    assert warned.status == 0 and warned.err.count("may be unlearning") == 1
    out = place / "guarded"
    done = diffalign(*arguments(options, out, validate__every=4, train__guards__winner="stop"), code=WORSE)
    assert done.status == 1 and "stopped by train.guards.winner=stop" in done.err.splitlines()[-1]
    assert checkpoints(out) == [4] and not (out / "model").exists()
