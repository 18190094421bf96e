"""The command line: every wrong input is one line and exit status 2, and nothing is written or lost."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command import diffalign, installed
from small import settings, write_pairs

import diffalign as package


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cli")


@pytest.fixture(scope="module")
def pairs(place: Path) -> Path:
    return write_pairs(place / "pairs")


@pytest.fixture(scope="module")
def run(tiny_model_folder: Path, pairs: Path, place: Path) -> Path:
    """A run of 2 steps by the installed command, from start-up to the end of the interpreter."""
    out = place / "run"
    done = installed("train", *settings(tiny_model_folder, pairs, out, train__steps=2, train__save_every=2))
    assert done.status == 0, done.err
    assert done.out.splitlines()[1:] == [f"model: {out}/model", f"report: {out}/report.html"]
    assert "12 rows, 12 usable" in done.err and "\x1b" not in done.out + done.err
    assert "Warning" not in done.err and "torchvision" not in done.err
    return out


def contents(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file below a folder with its size and time."""
    files = (p for p in folder.rglob("*") if p.is_file())
    return {str(p): (p.stat().st_size, p.stat().st_mtime_ns) for p in files}


# ---- wrong input of train ----------------------------------------------------------------------------------------

Change = Callable[[Path, Path], dict[str, Any]]


def model_with(folder: Path, source: Path, part: str, **changes: object) -> Path:
    """A copy of the model with other entries in one of its configs."""
    shutil.copytree(source, folder)
    file = folder / part
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return folder


def rows_file(folder: Path, rows: list[dict[str, Any]]) -> Path:
    folder.mkdir()
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


WRONG: dict[str, tuple[str | Change, str]] = {
    "key": ("train.step=5", "unknown key 'train.step' in recipe 'tiny/dpo'; did you mean 'train.steps'?"),
    "option": ("method.bta=5", "did you mean 'method.beta'?"),
    "method": ("method.name=dop", "unknown method 'dop'; did you mean 'dpo'?"),
    "type": ("train.steps=many", "'train.steps' in recipe 'tiny/dpo': input should be a valid integer"),
    "range": ("data.caption_dropout=2", "less than or equal to 1, got 2"),
    "form": ("train.steps", "not of the form key.sub=value"),
    "no data": (lambda d, m: {"data__path": d / "nowhere"}, "nowhere"),
    "missing image": (
        lambda d, m: {"data__path": rows_file(d / "gone", [{"prompt": "x", "chosen": "a.png", "rejected": "b.png"}])},
        "no usable",
    ),
    "missing column": (
        lambda d, m: {"data__path": rows_file(d / "col", [{"prompt": "x", "chosen": "a.png", "rejectd": "b.png"}])},
        "did you mean 'rejectd'?",
    ),
    "strict": (
        lambda d, m: {"data__path": damaged(d / "strict"), "data__strict": "true"},
        "missing image",
    ),
    "only ties": (lambda d, m: {"data__path": ties(d / "ties")}, "tie"),
    "no model": (lambda d, m: {"model__path": d / "no-model"}, "does not exist"),
    "family": (
        lambda d, m: {"model__path": model_with(d / "inpaint", m, "unet/config.json", in_channels=9)},
        "an inpainting U-Net (9 input channels)",
    ),
    "other family": (
        lambda d, m: (
            {"model__path": model_with(d / "sd2", m, "unet/config.json", use_linear_projection=True)}
            | {"model__family": "sd1"}
        ),
        "is sd2, not sd1",
    ),
    "folder": (lambda d, m: {"output__dir": "/proc/diffalign"}, "cannot write to '/proc/diffalign'"),
    "file as folder": (lambda d, m: {"output__dir": touch(d / "file") / "run"}, "set output.dir to a folder you own"),
    "cuda": ("train.device=cuda", "device 'cuda' was asked for but"),
    "mps": ("train.device=mps", "train.device=cpu"),
    "attention": ("model.attention=xformers", "xformers"),
    "8 bit": ("train.optimizer=adamw8bit", "needs bitsandbytes; pip install"),
    "tracker": ("output.trackers=[trackio]", "names 'trackio', which is not installed"),
    "layers": ("model.lora.targets=[to_w]", "to_w"),
    "resolution": ("data.resolution=65", "data.resolution 65 is no multiple of 8"),
    "prompts": ("validate.prompts=nowhere.txt", "nowhere.txt"),
}
NOT_HERE = {"8 bit": "bitsandbytes", "tracker": "trackio", "attention": "xformers"}


def damaged(folder: Path) -> Path:
    write_pairs(folder, 4)
    (folder / "1-b.png").unlink()
    return folder


def ties(folder: Path) -> Path:
    write_pairs(folder, 3)
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps({**row, "label": 0.5}) for row in rows))
    return folder


def touch(file: Path) -> Path:
    file.write_text("")
    return file


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_input_is_one_line(kind: str, tiny_model_folder: Path, pairs: Path, tmp_path: Path) -> None:
    change, expected = WRONG[kind]
    if kind in NOT_HERE and importlib.util.find_spec(NOT_HERE[kind]):
        pytest.skip(f"{NOT_HERE[kind]} is installed here")
    changes = {} if isinstance(change, str) else change(tmp_path, tiny_model_folder)
    out = tmp_path / "deep" / "run"
    args = settings(tiny_model_folder, pairs, out, data__cache_dir=tmp_path / "cache", **changes)
    before = contents(tmp_path)
    done = diffalign("train", *args, *([change] if isinstance(change, str) else []), "--quiet")
    assert done.status == 2, done.err
    assert expected in done.line and done.out == ""
    assert len(done.line) < 400
    kept = {path for path in contents(tmp_path) if "/cache/" not in path}
    assert kept == {path for path in before if "/cache/" not in path}, "nothing of a run is written"
    assert not out.parent.exists(), "not even a folder"


def test_an_unknown_recipe(place: Path) -> None:
    """Through the installed command: one line, no box, no traceback, in well under a second of work."""
    done = installed("train", "sd15/dop")
    assert done.status == 2 and done.line == "diffalign: unknown recipe 'sd15/dop'; did you mean 'sd15/dpo'?"
    done = installed("train", place / "nowhere.yaml", module=True)
    assert done.status == 2 and "does not exist" in done.line


def test_usage_errors_are_one_line() -> None:
    for args, expected in (
        (["trian"], "No such command 'trian'"),
        (["train"], "Missing argument 'recipe'"),
        (["train", "tiny/dpo", "--pln"], "--pln"),
        (["sample", "x", "--out", "y"], "--prompts"),
        (["sample", "x", "--prompts", "a", "--out", "y", "--steps", "0"], "--steps"),
        (["demo", "--prompts", "few"], "--prompts"),
    ):
        done = diffalign(*args)
        assert done.status == 2 and expected in done.line, done.err


def test_a_cache_of_other_weights_is_refused(tiny_model_folder: Path, pairs: Path, tmp_path: Path) -> None:
    """A folder that `diffalign cache --out` filled serves the weights it was made with and no others."""
    from tiny import write_tiny_model

    cache, out = tmp_path / "cache", tmp_path / "run"
    args = settings(tiny_model_folder, pairs, out, train__steps=2, data__cache_dir=cache)
    made = diffalign("cache", *args, "--out", cache)
    assert made.status == 0 and made.out.startswith("12 rows, 38 entries encoded, cache "), made.err
    assert not out.exists()
    before = contents(cache)
    other = write_tiny_model(tmp_path / "other", seed=1)
    done = diffalign("train", *settings(other, pairs, out, data__cache_dir=cache), "--quiet")
    assert done.status == 2 and "is a cache of other weights or settings (other vae weights)" in done.line
    assert "set data.cache_dir to another folder" in done.line
    assert contents(cache) == before
    good = diffalign("train", *args)
    assert good.status == 0 and "encoding" not in good.err, "nothing is encoded again"
    assert diffalign("cache", *args, "--out", cache).out.startswith("12 rows, 0 entries encoded")


def test_a_disk_too_small_for_the_cache(tiny_model_folder: Path, pairs: Path, tmp_path: Path) -> None:
    small = "import diffalign.data.fill as fill; fill.free_bytes = lambda folder: 1000"
    args = settings(tiny_model_folder, pairs, tmp_path / "run")
    for command in (["train", *args, "--quiet"], ["train", *args, "--plan"], ["cache", *args, "--quiet"]):
        done = diffalign(*command, code=small)
        assert done.status == 2 and "disk too small for the cache" in done.line, done.err
        assert "bytes needed, 1,000 free" in done.line and "data.cache_dir" in done.line
    assert not list(tmp_path.rglob("*.safetensors"))
    without = diffalign("train", *args, "data.cache=false", "train.steps=1", code=small)
    assert without.status == 0, without.err


def test_wrong_places_to_resume_from(run: Path, tiny_model_folder: Path, pairs: Path, tmp_path: Path) -> None:
    args = settings(tiny_model_folder, pairs, run, train__steps=2, train__save_every=2)
    before = contents(run)
    for where, expected in (
        ("never", "set another output.dir, or use --resume auto"),
        (tmp_path, "no checkpoint there"),
    ):
        done = diffalign("train", *args, "--resume", where)
        assert done.status == 2 and expected in done.line
    other = diffalign("train", *args, "train.lr=1e-9")
    assert other.status == 2 and "train.lr was 0.01, now 1e-09" in other.line
    assert contents(run) == before


# ---- what works --------------------------------------------------------------------------------------------------


def test_a_plan_trains_nothing(tiny_model_folder: Path, pairs: Path, tmp_path: Path) -> None:
    args = settings(tiny_model_folder, pairs, tmp_path / "run")
    done = diffalign("train", *args, "--plan", "--json")
    assert done.status == 0, done.err
    plan = json.loads(done.out)
    assert (plan["rows"], plan["steps"], plan["batch"]) == (12, 12, 2) and plan["roles"].keys() == {"student"}
    assert plan["cache_missing_bytes"] > 0 and plan["calls_per_step"] == 8
    shown = diffalign("train", *args, "--plan")
    assert shown.status == 0 and "role student" in shown.out and shown.err == ""
    assert not (tmp_path / "run").exists() and not list(tmp_path.rglob("*.safetensors"))


def test_listings() -> None:
    listed: dict[str, list[dict[str, Any]]] = {}
    for name in ("methods", "recipes", "scorers", "prompts"):
        done = diffalign(name, "--json")
        assert done.status == 0 and done.err == ""
        listed[name] = json.loads(done.out)
        plain = diffalign(name)
        assert plain.status == 0 and len(plain.out.splitlines()) == len(listed[name])
        assert all(row["name"] in plain.out for row in listed[name])
    assert {"dpo", "mapo", "sft"} <= {row["name"] for row in listed["methods"]}
    assert {"sd15/dpo", "tiny/dpo"} <= {row["name"] for row in listed["recipes"]}
    assert "oracle" in {row["name"] for row in listed["scorers"]}
    dpo = next(row for row in listed["methods"] if row["name"] == "dpo")
    assert dpo["arxiv"] == "2311.12908" and dpo["needs"] == "pair"


def test_version_help_and_module() -> None:
    assert installed("--version").out == package.__version__ + "\n"
    done = installed("--help", module=True)
    assert done.status == 0 and "train" in done.out and done.err == ""
    bare = diffalign("train", "--help")
    assert bare.status == 0 and "--resume" in bare.out


@pytest.mark.parametrize("command", ["--help", "methods", "recipes", "scorers", "prompts", "train --help"])
def test_no_torch_for_help_and_lists(command: str) -> None:
    code = (
        "import sys\nfrom diffalign.cli import main\ntry:\n    main()\nfinally:\n"
        "    heavy = {'torch', 'diffusers', 'transformers', 'datasets'} & set(sys.modules)\n"
        "    assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code, *command.split()], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_checking_pairs(tmp_path: Path) -> None:
    data = damaged(tmp_path / "data")
    done = diffalign("pairs", "check", data, "--out", tmp_path / "report")
    assert done.status == 0 and "missing image" in done.out, done.err
    assert {"sheet.png", "report.json"} <= {p.name for p in (tmp_path / "report").iterdir()}
    facts = json.loads(diffalign("pairs", "check", data, "--json").out)
    assert facts["rows"] == 4 and facts["usable"] == 3
    strict = diffalign("pairs", "check", data, "--strict")
    assert strict.status == 2 and "missing image" in strict.line
    assert diffalign("pairs", "check", data, "data.ties=keep").status == 0
    wrong = diffalign("pairs", "check", data, "ties=never")
    assert wrong.status == 2 and "'ties' in the data options" in wrong.line


def test_sampling_a_run(run: Path, tiny_model_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "images"
    args = ["sample", tiny_model_folder, "--lora", run, "--prompts", "a red cat", "--steps", 2, "--out", out]
    done = diffalign(*args)
    assert done.status == 0 and done.out.strip() == f"{out}/manifest.jsonl", done.err
    rows = [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["a red cat"] and (out / rows[0]["image"]).is_file()
    wrong = diffalign("sample", tmp_path / "none", "--prompts", "a cat", "--out", tmp_path / "x")
    assert wrong.status == 2 and "does not exist" in wrong.line


def test_comparing_score_files(tmp_path: Path) -> None:
    from test_eval_compare import write

    write(tmp_path / "a", 1.0)
    write(tmp_path / "b", 0.0)
    done = diffalign("compare", tmp_path / "a", tmp_path / "b", "--json")
    assert done.status == 0, done.err
    assert json.loads(done.out)
    shown = diffalign("compare", tmp_path / "a", tmp_path / "b", "--scorers", "clip")
    assert shown.status == 0 and "clip" in shown.out
    wrong = diffalign("compare", tmp_path / "a", tmp_path / "c")
    assert wrong.status == 2 and wrong.line


def test_json_of_a_run_that_is_done(run: Path, tiny_model_folder: Path, pairs: Path) -> None:
    args = settings(tiny_model_folder, pairs, run, train__steps=2, train__save_every=2)
    done = diffalign("train", *args, "--quiet", "--json")
    assert done.status == 0 and done.err == ""
    facts = json.loads(done.out)
    assert facts["step"] == 2 and Path(facts["model"]).is_dir() and os.path.getsize(facts["report"]) > 1000
