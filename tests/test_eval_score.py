"""Score files: one decode for all scorers, resume after a kill, broken images, Parquet, bad input."""

from __future__ import annotations

import csv
import io
import json
import shutil
import signal
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from command import group, script
from eval_tiny import write_samples, write_tiny_clip
from PIL import Image

from diffalign.errors import UserError
from diffalign.eval.rows import Meta, meta_path, read_rows, read_score_file
from diffalign.eval.score import score_images
from diffalign.eval.scorers import load_scorer

Change = Callable[[dict[str, object], int], dict[str, object]]
PROMPTS = [f"prompt number {i}" + " and more" * (i % 3) for i in range(10)]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture
def samples(tmp_path: Path) -> Path:
    return write_samples(tmp_path / "samples", PROMPTS, per_prompt=2)


def both(clip: Path) -> list[str]:
    return [f"clip={clip}", f"pickscore={clip}"]


def run(samples: Path, out: Path, scorers: list[str], **options: object) -> object:
    return score_images(samples, None, scorers, out, batch=3, device="cpu", progress=False, **options)  # type: ignore[arg-type]


def test_rows_say_everything(samples: Path, clip: Path, tmp_path: Path) -> None:
    result = score_images(samples, None, both(clip), tmp_path / "s.jsonl", batch=7, device="cpu", progress=False)
    file = read_score_file(tmp_path / "s.jsonl")
    assert len(file.rows) == 40 and result.scored == 40 and result.reused == 0 and not result.errors
    row = file.rows[0]
    assert (row.id, row.k, row.scorer, row.category, row.seed) == ("p000", 0, "clip", "even", 0)
    assert row.image_sha256 and len(row.image_sha256) == 64 and row.error is None
    scorer = load_scorer("pickscore", str(clip), device="cpu")
    pictures = [Image.open(samples / r.image) for r in file.rows if r.scorer == "pickscore"]
    want = scorer(pictures, [r.prompt for r in file.rows if r.scorer == "pickscore"]).tolist()
    assert [r.value for r in file.rows if r.scorer == "pickscore"] == pytest.approx(want, abs=1e-4)
    assert file.meta.scorers["pickscore"] == scorer.fingerprint and file.meta.complete
    assert (
        file.meta.prompts == 10
        and file.meta.images == 20
        and file.meta.sampling["settings"] == {"steps": 20, "seed": 0}
    )
    assert any("truncated" in r.flags for r in file.rows) == any(scorer.truncated(PROMPTS))


def test_one_decode_for_all_scorers(samples: Path, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffalign.eval import preprocess

    decoded: list[int] = []
    real = preprocess.decode
    monkeypatch.setattr(preprocess, "decode", lambda data: decoded.append(1) or real(data))
    run(samples, tmp_path / "s.jsonl", both(clip))
    assert len(decoded) == 20
    run(samples, tmp_path / "s.jsonl", both(clip))  # everything is known: nothing is decoded again
    assert len(decoded) == 20


KILLED = """
import sys, time
from diffalign.eval import score, scoring
real = scoring.score_chunk
def slow(*args):
    time.sleep(0.15)
    return real(*args)
scoring.score_chunk = slow
score.score_images(sys.argv[1], None, sys.argv[3:], sys.argv[2], batch=3, device="cpu", progress=False)
"""


def check_resumed(samples: Path, clip: Path, torn: Path, whole: Path, log: Path) -> None:
    """What a kill left in ``log``, with a line cut in the middle, ends as if nothing had happened."""
    lines = log.read_text().count("\n")
    assert 6 <= lines < 40
    with pytest.raises(UserError, match=r"unfinished|does not exist"):
        read_score_file(torn)
    with log.open("a") as stream:
        stream.write('{"id": "p009", "prom')
    result = run(samples, torn, both(clip))
    assert result.reused == lines and result.scored == 40 - lines  # type: ignore[attr-defined]
    assert read_rows(torn) == read_rows(whole) and meta_path(torn).read_bytes() == meta_path(whole).read_bytes()
    assert sorted(p.name for p in torn.parent.iterdir()) == sorted(p.name for p in whole.parent.iterdir())


def test_killed_and_resumed_is_equal(samples: Path, clip: Path, tmp_path: Path) -> None:
    whole, torn = tmp_path / "whole" / "s.jsonl", tmp_path / "torn" / "s.jsonl"
    run(samples, whole, both(clip))
    process = script(KILLED, samples, torn, *both(clip))
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and not (torn.is_file() and torn.read_text().count("\n") >= 6):
        time.sleep(0.02)
    process.send(signal.SIGKILL)
    assert process.wait().status == -signal.SIGKILL
    check_resumed(samples, clip, torn, whole, torn)
    assert torn.read_bytes() == whole.read_bytes()


def test_cut_parquet_goes_on_from_its_log(samples: Path, clip: Path, tmp_path: Path) -> None:
    whole, torn = tmp_path / "whole" / "s.parquet", tmp_path / "torn" / "s.parquet"
    run(samples, whole, both(clip))
    torn.parent.mkdir()
    log = torn.with_suffix(".partial.jsonl")
    log.write_text("".join(row.json() + "\n" for row in read_rows(whole)[:17]))
    meta_path(torn).write_text(meta_path(whole).read_text().replace('"complete": true', '"complete": false'))
    check_resumed(samples, clip, torn, whole, log)


def test_a_changed_image_a_new_scorer_and_new_weights(samples: Path, clip: Path, tmp_path: Path) -> None:
    out = tmp_path / "s.jsonl"
    run(samples, out, both(clip)[:1])
    first = {(r.id, r.k): r.value for r in read_rows(out)}
    added = run(samples, out, both(clip)[1:])
    assert (added.scored, added.reused) == (20, 0)  # type: ignore[attr-defined]
    assert len(read_rows(out)) == 40 and set(read_score_file(out).meta.scorers) == {"clip", "pickscore"}
    Image.fromarray(np.full((40, 40, 3), 90, np.uint8)).save(samples / "images" / "000004-1.png")
    again = run(samples, out, both(clip))
    assert (again.scored, again.reused) == (2, 38)  # type: ignore[attr-defined]
    values = {(r.id, r.k): r.value for r in read_rows(out) if r.scorer == "clip"}
    assert {key for key in first if values[key] != first[key]} == {("p004", 1)}
    other = write_tiny_clip(tmp_path / "other", seed=3)
    fresh = run(samples, out, [f"clip={other}"])
    assert (fresh.scored, fresh.reused) == (20, 0)  # type: ignore[attr-defined]
    assert len({r.fingerprint for r in read_rows(out) if r.scorer == "clip"}) == 1


def test_unreadable_images_are_rows_with_an_error(samples: Path, clip: Path, tmp_path: Path) -> None:
    (samples / "images" / "000003-0.png").unlink()
    (samples / "images" / "000005-1.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    whole = (samples / "images" / "000007-0.png").read_bytes()
    (samples / "images" / "000007-0.png").write_bytes(whole[: len(whole) // 2])
    result = run(samples, tmp_path / "s.jsonl", both(clip))
    assert len(result.errors) == 3 and result.scored == 40  # type: ignore[attr-defined]
    rows = read_rows(tmp_path / "s.jsonl")
    broken = [r for r in rows if r.error]
    assert len(broken) == 6 and all(r.value is None for r in broken)
    assert {r.image for r in broken} == {f"images/{n}.png" for n in ("000003-0", "000005-1", "000007-0")}
    with pytest.raises(UserError, match="3 images could not be scored"):
        run(samples, tmp_path / "s.jsonl", both(clip), strict=True)
    (samples / "images" / "000007-0.png").write_bytes(whole)  # mended: only this one is computed
    mended = run(samples, tmp_path / "s.jsonl", both(clip))
    assert sum(r.error is None for r in read_rows(tmp_path / "s.jsonl")) == 36
    assert mended.reused == 34  # type: ignore[attr-defined]


def test_each_prompt_is_encoded_once(samples: Path, clip: Path, tmp_path: Path) -> None:
    found = run(samples, tmp_path / "s.jsonl", both(clip))
    assert found.texts == {"clip": 10, "pickscore": 10}  # type: ignore[attr-defined]  20 images each
    assert run(samples, tmp_path / "s.jsonl", both(clip)).texts == {"clip": 0, "pickscore": 0}  # type: ignore[attr-defined]


def test_rows_of_other_files_are_taken_over(samples: Path, clip: Path, tmp_path: Path) -> None:
    run(samples, tmp_path / "whole" / "s.jsonl", both(clip))
    moved = tmp_path / "moved"
    shutil.copytree(samples, moved)
    Image.new("RGB", (40, 40), (9, 9, 9)).save(moved / "images" / "000000-0.png")
    found = run(moved, tmp_path / "new" / "s.jsonl", both(clip), reuse=[tmp_path / "whole" / "s.jsonl"])
    assert (found.scored, found.reused) == (2, 38)  # type: ignore[attr-defined]
    other = write_tiny_clip(tmp_path / "other", seed=3)
    found = run(samples, tmp_path / "s.jsonl", both(other), reuse=[tmp_path / "whole" / "s.jsonl"])
    assert (found.scored, found.reused) == (40, 0)  # type: ignore[attr-defined]  other weights


def as_tables(samples: Path, folder: Path) -> dict[str, Path]:
    """The same pictures and prompts as JSON lines, CSV, Parquet and tar."""
    folder.mkdir()
    rows = [json.loads(line) for line in (samples / "manifest.jsonl").read_text().splitlines()]
    found = {suffix: folder / f"pictures.{suffix}" for suffix in ("jsonl", "csv", "parquet", "tar")}
    named = [{**row, "image": str(samples / row["image"])} for row in rows]
    found["jsonl"].write_text("".join(json.dumps(row) + "\n" for row in named))
    with found["csv"].open("w") as stream:
        writer = csv.DictWriter(stream, list(named[0]))
        writer.writeheader()
        writer.writerows(named)
    data = [{**row, "image": (samples / row["image"]).read_bytes()} for row in rows]
    pq.write_table(pa.Table.from_pylist(data), found["parquet"], row_group_size=7)
    with tarfile.open(found["tar"], "w") as tar:
        for number, row in enumerate(data):
            facts = {key: row[key] for key in ("id", "k", "seed", "category")}
            members = {"png": row["image"], "txt": row["prompt"].encode(), "json": json.dumps(facts).encode()}
            for suffix, content in members.items():
                info = tarfile.TarInfo(f"{number:05d}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return found


def test_every_form_of_input_gives_the_same_scores(samples: Path, clip: Path, tmp_path: Path) -> None:
    run(samples, tmp_path / "s.jsonl", both(clip))
    want = [(r.id, r.k, r.seed, r.category, r.image_sha256, r.scorer, r.value) for r in read_rows(tmp_path / "s.jsonl")]
    for suffix, table in as_tables(samples, tmp_path / "tables").items():
        run(table, tmp_path / f"{suffix}.parquet", both(clip))
        rows = read_rows(tmp_path / f"{suffix}.parquet")
        assert [(r.id, r.k, r.seed, r.category, r.image_sha256, r.scorer, r.value) for r in rows] == want, suffix


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda row, n: {**row, "prompt": " "} if n == 3 else row, "line 4 of .* has an empty prompt"),
        (lambda row, n: {**row, "id": "p000", "k": 0} if n == 3 else row, "stands at .* line 1 and .* line 4"),
        (lambda row, n: {**row, "id": "p000", "k": 9} if n == 3 else row, "two prompts under id 'p000'"),
        (lambda row, n: {k: v for k, v in row.items() if k != "image"}, "no column of pictures"),
        (lambda row, n: {k: v for k, v in row.items() if k != "prompt"}, "needs a column 'prompt'"),
    ],
)
def test_bad_tables(samples: Path, clip: Path, tmp_path: Path, change: Change, says: str) -> None:
    rows = [json.loads(line) for line in (samples / "manifest.jsonl").read_text().splitlines()]
    table = samples / "table.jsonl"
    table.write_text("".join(json.dumps(change(row, n)) + "\n" for n, row in enumerate(rows)))
    with pytest.raises(UserError, match=says):
        run(table, tmp_path / "s.jsonl", both(clip))


def test_two_processes_equal_one(samples: Path, clip: Path, tmp_path: Path) -> None:
    run(samples, tmp_path / "one" / "s.jsonl", both(clip))
    options = ["--scorers", ",".join(both(clip)), "--batch", "3", "--device", "cpu", "--quiet"]
    target = tmp_path / "jsonl" / "s.jsonl"
    done = group(2, "score", samples, *options, "--out", target)
    assert done.status == 0, done.err
    assert "40 scores new" in done.out and done.out.count(str(target)) == 2, "one process speaks"
    assert target.read_bytes() == (tmp_path / "one" / "s.jsonl").read_bytes()
    assert {p.name for p in target.parent.iterdir()} == {"s.jsonl", "s.meta.json"}
    torn = tmp_path / "torn" / "s.jsonl"  # two processes were killed, one goes on
    torn.parent.mkdir()
    lines = (tmp_path / "one" / "s.jsonl").read_text().splitlines(keepends=True)
    torn.write_text("".join(lines[:6]))
    (torn.parent / "s.rank1.partial.jsonl").write_text("".join(lines[6:14]) + lines[14][:20])
    meta = meta_path(tmp_path / "one" / "s.jsonl").read_text().replace('"complete": true', '"complete": false')
    meta_path(torn).write_text(meta)
    found = run(samples, torn, both(clip))
    assert (found.scored, found.reused) == (26, 14)  # type: ignore[attr-defined]
    assert torn.read_bytes() == (tmp_path / "one" / "s.jsonl").read_bytes()
    assert {p.name for p in torn.parent.iterdir()} == {"s.jsonl", "s.meta.json"}


def test_nothing_usable_is_an_error(samples: Path, clip: Path, tmp_path: Path) -> None:
    for image in (samples / "images").iterdir():
        image.write_bytes(b"")
    with pytest.raises(UserError, match="none of the 20 images got a score"):
        run(samples, tmp_path / "s.jsonl", both(clip))


def test_bad_output(samples: Path, clip: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"\.jsonl or \.parquet"):
        run(samples, tmp_path / "s.csv", both(clip))
    with pytest.raises(UserError, match="did you mean"):
        run(samples, tmp_path / "s.jsonl", ["pikscore"])
    (tmp_path / "mine.jsonl").write_text('{"my": "data"}\n')
    with pytest.raises(UserError, match="no score file"):
        run(samples, tmp_path / "mine.jsonl", both(clip))
    assert (tmp_path / "mine.jsonl").read_text() == '{"my": "data"}\n'
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        run(samples, tmp_path / "file" / "s.jsonl", both(clip))
    run(samples, tmp_path / "s.jsonl", both(clip))
    others = write_samples(tmp_path / "others", PROMPTS[:3])
    manifest = others / "manifest.jsonl"
    manifest.write_text(manifest.read_text().replace('"id": "p', '"id": "q'))
    with pytest.raises(UserError, match="scores of other images"):
        run(others, tmp_path / "s.jsonl", both(clip))
    with pytest.raises(UserError, match="tiny world only"):
        run(samples, tmp_path / "o.jsonl", ["oracle"])


def test_reading_score_files(samples: Path, clip: Path, tmp_path: Path) -> None:
    run(samples, tmp_path / "a" / "scores.jsonl", both(clip))
    assert read_score_file(tmp_path / "a").path.name == "scores.jsonl"
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no score file"):
        read_score_file(tmp_path / "empty")
    with pytest.raises(UserError, match="does not exist"):
        read_score_file(tmp_path / "b.jsonl")
    meta = meta_path(tmp_path / "a" / "scores.jsonl")
    meta.write_text(json.dumps({**json.loads(meta.read_text()), "format": 99}))
    with pytest.raises(UserError, match="format 99"):
        read_score_file(tmp_path / "a")
    meta.unlink()
    with pytest.raises(UserError, match=r"no scores\.meta\.json"):
        read_score_file(tmp_path / "a")
    assert Meta("x", 1, 1, {}).format == 1
