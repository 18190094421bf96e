"""Full disks, torn and foreign files of the cache, corrupt pictures: one clear line, nothing lost, nothing torn used.

Disks are small file systems in memory where mounting is allowed, else a limit on the size of files. The default run is
short; ``make test-faults`` tries every kind of damage, and 10,000 pictures."""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from command import Result, diffalign
from faults import leave_room, small_disk, tree
from small import lora_of, picture, same_tree, settings, write_pairs
from test_faults_kills import MANY_FILES, PIECES, entries

KIB = 1024
NO_CHECK = "import diffalign.data.layout as layout; layout.CachePlan.check = lambda self: None\n"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data-faults")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path | None]:
    with small_disk(tmp_path / "disk", "16m") as found:
        yield found


def one_line(done: Result) -> str:
    """The line of a failure that a person can mend."""
    assert done.status in (1, 2), (done.status, done.err)
    lines = [line for line in done.err.splitlines() if line.startswith("diffalign: ")]
    assert len(lines) == 1 and "Traceback" not in done.err + done.out, done.err
    return lines[0]


def fill_up(
    args: list[object], disk: Path | None, target: Path, rooms: list[int], check: Callable[[], None], code: str
) -> list[str]:
    """Run a command with more and more free space, or once with a limit on files. ``check`` looks at what is there
    after each failure."""
    told = []
    for room in rooms if disk is not None else [2 * KIB]:
        if disk is not None:
            leave_room(disk, room)
        done = diffalign(*args, code=code, file_bytes=None if disk is not None else room)
        if done.status == 0:
            break
        told.append(one_line(done))
        check()
    if disk is not None:
        leave_room(disk, 0)
    assert told, "it was never full"
    done = diffalign(*args, code=code)
    assert done.status == 0, done.err
    print(f"full disk {len(told)} times ({'tmpfs' if disk else 'RLIMIT_FSIZE'}), such as: {told[-1]}")
    return told


def some(rooms: list[int]) -> pytest.MarkDecorator:
    """One size for every day, all for the campaign."""
    return pytest.mark.parametrize(
        "rooms", [rooms[1:2], pytest.param(rooms, marks=pytest.mark.slow)], ids=["few", "all"]
    )


@some([8 * KIB, 90 * KIB, 170 * KIB, 300 * KIB, 420 * KIB])
def test_full_disk_while_caching(
    rooms: list[int], disk: Path | None, tiny_model_folder: Path, place: Path, tmp_path: Path
) -> None:
    data = write_pairs(place / "many", 60)
    root = (disk or tmp_path) / "cache"
    args = ["cache", *settings(tiny_model_folder, data, place / "none", data__cache_dir=root)]
    counts = [0]

    def check() -> None:
        now = len(entries(root)) if root.exists() else 0
        assert now >= counts[-1]
        counts.append(now)

    fill_up([*args, "--quiet"], disk, root, rooms, check, MANY_FILES + NO_CHECK)
    assert len(entries(root)) == 182 and (len(rooms) == 1 or disk is None or len(set(counts)) > 2)
    shutil.rmtree(root)
    if disk is not None:  # what is known to be too little is told before any work
        leave_room(disk, 100 * KIB)
        line = one_line(diffalign(*args, "--quiet"))
        assert "disk too small for the cache" in line and "free" in line


@some([40 * KIB, 300 * KIB, 700 * KIB, 1200 * KIB])
def test_full_disk_while_exporting(
    rooms: list[int], disk: Path | None, tiny_model_folder: Path, tmp_path: Path
) -> None:
    out, expected = (disk or tmp_path) / "merged", tmp_path / "expected"
    args: list[object] = ["export", tiny_model_folder, "--format", "merged"]
    assert diffalign(*args, "--out", expected).status == 0

    def check() -> None:
        assert not out.exists() and not list(out.parent.glob(".merged*"))

    told = fill_up([*args, "--out", out], disk, out, rooms, check, "")
    assert all("export to" in line for line in told)
    assert tree(out) == tree(expected)
    if disk is not None:  # an earlier export stays until the new one is whole
        leave_room(disk, 50 * KIB)
        one_line(diffalign(*args, "--out", out))
        assert tree(out) == tree(expected)


@some([8 * KIB, 60 * KIB, 90 * KIB, 150 * KIB])
def test_full_disk_while_converting(rooms: list[int], disk: Path | None, place: Path, tmp_path: Path) -> None:
    source = write_pairs(place / "source", 200)
    for form in ("webdataset", "folder") if len(rooms) > 1 else ("webdataset",):
        out, expected, kept = (disk or tmp_path) / form, tmp_path / f"expected-{form}", [0]
        args: list[object] = ["pairs", "convert", source, "--format", form, "--quiet"]
        assert diffalign(*args[:3], expected, *args[3:], code=PIECES).status == 0

        def check(form: str = form, out: Path = out, kept: list[int] = kept) -> None:
            note = out.parent / f".{form}.partial" / ".progress.json"
            now = json.loads(note.read_text())["kept"] if note.exists() else 0
            assert not out.exists() and now >= kept[0]
            kept[0] = now

        told = fill_up([*args[:3], out, *args[3:]], disk, out, rooms, check, PIECES)
        assert all("disk full" in line and "rows are kept" in line for line in told)
        assert tree(out, "convert.json") == tree(expected, "convert.json")


def damage(path: Path, kind: str, rng: random.Random) -> None:
    """What happens to files."""
    data = bytearray(path.read_bytes())
    if kind == "cut":
        path.write_bytes(data[: rng.randrange(1, len(data))])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "bit":
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
    elif kind == "tail":  # the header stays whole
        path.write_bytes(data[: -len(data) // 4] + rng.randbytes(len(data) // 4))
    elif kind == "garbage":
        path.write_bytes(rng.randbytes(len(data)))
    elif kind == "longer":
        path.write_bytes(data + rng.randbytes(100))
    else:
        path.unlink()


DAMAGES = ["tail", "cut", "empty", "bit", "garbage", "longer", "gone"]


def foreign(root: Path, other: Path) -> None:
    """Files that do not belong here: of another cache, of nobody."""
    for folder in [p for p in root.iterdir() if p.is_dir()]:
        (folder / "notes.txt").write_text("mine")
        (folder / ".hidden.tmp").write_bytes(b"x")
        (folder / "0123456789abcdef0123456789abcdef.safetensors").write_bytes(b"\x08" + b"\0" * 7 + b'{"a": 1}')
        (folder / "model.safetensors").write_bytes(b"weights")
        kind = folder.name.partition("-")[0]
        for shard in sorted(other.glob(f"{kind}-*/*.safetensors"))[:2]:
            shutil.copy(shard, folder / shard.name)
    (root / "something").write_text("mine")


@pytest.mark.parametrize("each", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["once", "each"])
def test_torn_and_foreign_files_of_the_cache(each: bool, tiny_model_folder: Path, place: Path, tmp_path: Path) -> None:
    """Whatever lies in the cache, training on it gives the same weights as without any."""
    data, root = write_pairs(place / "pairs"), tmp_path / "cache"
    spare = tmp_path / "spare"

    def train(number: str, cache: Path = root, **changes: object) -> Path:
        out = tmp_path / number
        args = settings(tiny_model_folder, data, out, data__cache_dir=cache, train__steps=4, **changes)
        done = diffalign("train", *args, "--quiet", code=MANY_FILES)
        assert done.status == 0, done.err
        return out

    expected = lora_of(train("straight"))
    train("other", tmp_path / "other-cache", data__resolution=128)
    shutil.copytree(root, spare)
    names = sorted(p.relative_to(root) for p in root.rglob("*") if p.is_file())
    assert len(names) >= 8, names
    rng, trials = random.Random(7), 0
    plan = [[(name, kind)] for name in names for kind in DAMAGES] if each else [[]]
    if not each:  # every file damaged at once, each in its own way
        plan = [[(name, DAMAGES[i % len(DAMAGES)]) for i, name in enumerate(names)]]
    began = time.monotonic()
    for number, faults in enumerate(plan):
        shutil.rmtree(root)
        shutil.copytree(spare, root)
        for name, kind in faults:
            damage(root / name, kind, rng)
        if not each or number % 10 == 0:
            foreign(root, tmp_path / "other-cache")
        out = train(f"try-{number}")
        assert same_tree(lora_of(out), expected), faults
        shutil.rmtree(out)
        trials += 1
    kinds = {name.parts[0].partition("-")[0] for name in names}
    print(f"{trials} damaged caches ({len(names)} files of {sorted(kinds)}) in {time.monotonic() - began:.0f} s")


CORRUPT = ("cut", "empty", "text", "random", "gone")


@pytest.mark.parametrize("count", [300, pytest.param(10_000, marks=pytest.mark.slow)])
def test_one_corrupt_picture_in_a_hundred(count: int, place: Path, tmp_path: Path) -> None:
    """Left out, counted and listed by check and by convert; everything else is used."""
    folder, rng, lines = tmp_path / "pairs", random.Random(count), []
    folder.mkdir()
    for i in range(count):
        picture(i).save(folder / f"{i}.png")
    bad = sorted(rng.sample(range(count), count // 100))
    for number, i in enumerate(bad):
        path, kind = folder / f"{i}.png", CORRUPT[number % len(CORRUPT)]
        if kind == "text":
            path.write_text("<html>404</html>")
        elif kind == "random":
            path.write_bytes(rng.randbytes(300))
        elif kind == "cut":
            path.write_bytes(path.read_bytes()[: rng.randrange(30, 100)])
        else:
            damage(path, kind, rng)
    for i in range(0, count, 2):
        lines.append(json.dumps({"prompt": f"no {i}", "chosen": f"{i}.png", "rejected": f"{i + 1}.png"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    rows = {i // 2 for i in bad}
    missing = {i // 2 for number, i in enumerate(bad) if CORRUPT[number % len(CORRUPT)] == "gone"}
    for name, args in (
        ("check", ["pairs", "check", folder, "--json", f"cache_dir={tmp_path / 'cache'}"]),
        ("check again", ["pairs", "check", folder, "--json", f"cache_dir={tmp_path / 'cache'}"]),
        ("convert", ["pairs", "convert", folder, tmp_path / "out", "--format", "webdataset", "--json", "--quiet"]),
    ):
        began = time.monotonic()
        done = diffalign(*args, timeout=600)
        taken = time.monotonic() - began
        assert done.status == 0, done.err
        report = json.loads(done.out)
        assert report["rows"] == count // 2 and report["usable"] == count // 2 - len(rows)
        assert {row["place"] for row in report["bad"]} == {f"metadata.jsonl line {row + 1}" for row in rows}
        assert sum(report["left_out"].values()) == len(rows)
        assert report["left_out"].get("missing image", 0) >= len(missing) - 2
        print(f"{name}: {count} pictures, {len(bad)} corrupt, {taken:.1f} s, {count / taken:.0f} pictures a second")
    strict = diffalign("pairs", "check", folder, "--strict", timeout=600)
    assert strict.status == 2 and "data.strict" in strict.line
