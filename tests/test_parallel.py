"""Two processes train what one does: same trajectory, one voice, one decision (DESIGN 8). CPU, gloo, as torchrun
starts them; slowly, by torchrun itself."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from command import Result, diffalign, group
from small import curve, final_state, log_of, lora_of, settings, write_pairs
from torch import Tensor

BATCH = 5  # odd: 2 rows on one rank, 3 on the other

# Builds each run as `train` does and writes down what this rank sees of two batches, and how its weights begin.
LOOK = """
import json
from diffalign.recipe import load_recipe
from diffalign.run import train
def watch(session):
    trainer = session.trainer
    ids = [[name for part in trainer._load(draw) for name in part.ids] for draw in (0, 1)]
    norm = sum(float(p.double().square().sum()) for p in trainer.roles.parameters("student"))
    facts = {"rank": trainer.rank, "world": trainer.world, "ids": ids, "norm": norm, "shown": session.console.shown}
    with open(f"PLACE/{session.recipe.method.name}-{trainer.rank}.json", "w") as file:
        json.dump(facts, file)
for name, *overrides in RUNS:
    train(load_recipe(name, overrides), watch=watch)
"""


# The run with a loss that is not finite, at one step and on rank 1 alone.
POISON = """
import os
import diffalign.methods.preference.dpo as module
plain, calls = module.DPO.loss, [0]
def loss(self, ctx, batch, phase):
    found = plain(self, ctx, batch, phase)
    if ctx.phase != "validate":
        calls[0] += 1
        if calls[0] == 2 and os.environ.get("RANK") == "1":
            found.values = found.values * float("nan")
    return found
module.DPO.loss = loss
"""


def launch(*command: object, processes: int = 2) -> Result:
    """Under torchrun, one thread a process."""
    head = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--master_port=0"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    head += ["--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0"]
    done = subprocess.run([*head, *map(str, command)], capture_output=True, text=True, timeout=300, env=env)
    return Result(done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("parallel")


@pytest.fixture(scope="module")
def options(tiny_model_folder: Path, place: Path) -> dict[str, object]:
    """Every step logged; three held-out rows on two ranks. Rounding stays rounding: beta multiplies that of an error
    near 1, and Adam without a large eps makes a whole step of a gradient near 0."""
    return {
        "model": tiny_model_folder,
        "data": write_pairs(place / "pairs"),
        "method__beta": 50,
        "train__batch": BATCH,
        "train__eps": 1e-3,
        "train__steps": 6,
        "train__log_every": 1,
        "train__save_every": 3,
        "validate__every": 3,
        "validate__pairs": 3,
    }


@pytest.fixture(scope="module")
def coupled(options: dict[str, object]) -> dict[str, dict[str, object]]:
    """Settings of the methods whose samples enter each other's loss, in micro-batches and with weights that differ:
    KTO's Q is of the whole step, SoftREPA's groups are of one rank (one group here, two there)."""
    few = {"train__steps": 3, "train__micro_batch": 2, "data__max_pairs": 10}
    groups = {"method__beta": None, "method__group": 2, "method__temperature": 1.0, "train__batch": 6}
    return {
        "kto": options | few | {"method__positive_ratio": 0.7},
        "softrepa": options | few | groups,
    }


def recipe_of(method: str, out: Path, options: dict[str, object]) -> list[str]:
    return [f"tiny/{method}", *settings(out=out, **options)[1:]]  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def alone(options: dict[str, object], place: Path) -> Path:
    out = place / "alone"
    done = diffalign("train", *recipe_of("dpo", out, options))
    assert done.status == 0, done.err
    return out


@pytest.fixture(scope="module")
def together(
    options: dict[str, object], coupled: dict[str, dict[str, object]], place: Path
) -> tuple[Path, list[dict], Result]:
    """A run of two processes, and what each saw before its first step; one start for the coupled methods too."""
    out = place / "together"
    runs = [recipe_of("dpo", out, options)]
    runs += [recipe_of(name, place / f"{name}-two", more) for name, more in coupled.items()]
    done = group(2, code=LOOK.replace("PLACE", str(place)).replace("RUNS", repr(runs)))
    assert done.status == 0, done.err
    return out, [json.loads((place / f"dpo-{rank}.json").read_text()) for rank in (0, 1)], done


def close(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Largest difference relative to the largest weight."""
    assert a.keys() == b.keys()
    scale = max(float(t.abs().max()) for t in a.values())
    return max(float((a[name] - b[name]).abs().max()) for name in a) / scale


def assert_same_curve(a: Path, b: Path) -> None:
    """Every logged number of two runs to 1e-5; differences of errors to 1e-5 of the errors."""
    one, two = curve(a), curve(b)
    assert [(row["step"], row["kind"]) for row in one] == [(row["step"], row["kind"]) for row in two]
    for left, right in zip(one, two, strict=True):
        assert left.keys() == right.keys()
        for name in left.keys() - {"step", "kind"}:
            near = pytest.approx(right[name], rel=1e-5, abs=1e-5 * 50 / 2 if "logit" in name else 1e-5)
            assert left[name] == near, (left["step"], name)


def test_two_processes_share_the_rows_and_one_speaks(together: tuple[Path, list[dict], Result], alone: Path) -> None:
    out, ranks, done = together
    assert [facts["world"] for facts in ranks] == [2, 2] and [facts["rank"] for facts in ranks] == [0, 1]
    for first, second in zip(ranks[0]["ids"], ranks[1]["ids"], strict=True):
        assert sorted((len(first), len(second))) == [2, 3]
        assert not set(first) & set(second)
    assert ranks[0]["norm"] == ranks[1]["norm"]
    assert [facts["shown"] for facts in ranks] == [True, False]
    assert done.err.count("held-out at step 6") == done.err.count("12 rows, 12 usable") == 1
    assert {p.name for p in out.iterdir()} == {p.name for p in alone.iterdir()}
    assert not list(out.glob(".writable*"))


def test_two_processes_give_the_trajectory_of_one(alone: Path, together: tuple[Path, list[dict], Result]) -> None:
    out = together[0]
    assert len(log_of(alone)) == 6
    assert_same_curve(alone, out)
    assert close(lora_of(alone), lora_of(out)) < 1e-5
    assert final_state(out)["step"] == 6


@pytest.mark.parametrize("name", ["kto", "softrepa"])
def test_coupled_methods_see_the_whole_step(
    name: str, together: tuple[Path, list[dict], Result], coupled: dict[str, dict[str, object]], place: Path
) -> None:
    """What couples the samples of a step is the same on two processes: weights and every logged number."""
    one, two = place / f"{name}-one", place / f"{name}-two"
    done = diffalign("train", *recipe_of(name, one, coupled[name]))
    assert done.status == 0, done.err
    ids = [json.loads((place / f"{name}-{rank}.json").read_text())["ids"][0] for rank in (0, 1)]
    assert sorted(map(len, ids)) == {"kto": [2, 3], "softrepa": [2, 4]}[name] and not set(ids[0]) & set(ids[1])
    assert len(log_of(one)) == 3 and len(log_of(one, "validate")) == 2
    assert_same_curve(one, two)
    weights = [final_state(run)["roles"]["student"] for run in (one, two)]
    assert close(*weights) < 1e-5
    points = [row.get("reference_point", 1.0) for row in log_of(one)]
    assert all(point > 0 for point in points[1:]), "a Q that is cut off at 0 tells nothing"


def test_a_run_goes_on_with_more_processes(alone: Path, options: dict[str, object], place: Path) -> None:
    """One process up to a checkpoint between two logged steps, then two; the curve's sums are carried over as well."""
    out, whole = place / "grown", place / "whole"
    changes = {**options, "train__log_every": 4, "validate__every": 100}
    assert diffalign("train", *settings(out=whole, **changes)).status == 0  # type: ignore[arg-type]
    shutil.copytree(whole, out)
    shutil.rmtree(out / "checkpoints" / "step-000006")
    done = group(2, "train", *settings(out=out, **changes))  # type: ignore[arg-type]
    assert done.status == 0 and done.err.count("going on from") == 1, done.err
    assert done.out.count("model: ") == 1
    assert close(lora_of(whole), lora_of(out)) < 1e-5 and close(lora_of(alone), lora_of(out)) < 1e-5
    here, there = ({row["step"]: row["chosen_error"] for row in log_of(run)} for run in (whole, out))
    assert there[4] == pytest.approx(here[4], rel=1e-5), "steps 1 to 4 of both, each counted once"


def test_a_skip_is_one_decision(options: dict[str, object], place: Path) -> None:
    """A loss that is not finite on one rank skips the update of both; they end with the same weights as one process
    that skipped the same step."""
    out = place / "skipped"
    done = group(2, "train", *settings(out=out, **options), code=POISON)  # type: ignore[arg-type]
    assert done.status == 0, done.err
    assert [row.get("skipped", 0) for row in log_of(out)] == [0, 1, 1, 1, 1, 1]
    assert float(final_state(out)["optimizers"]["student"]["state"][0]["step"]) == 5
    one = place / "skipped-alone"
    code = POISON.replace('os.environ.get("RANK") == "1"', "True")
    assert diffalign("train", *settings(out=one, **options), code=code).status == 0  # type: ignore[arg-type]
    assert close(lora_of(one), lora_of(out)) < 1e-5


def test_wrong_input_is_said_once(options: dict[str, object], place: Path) -> None:
    """Fewer rows than processes: both end, one speaks."""
    done = group(2, "train", *settings(out=place / "wrong", **{**options, "train__batch": 1}))  # type: ignore[arg-type]
    assert done.status == 2 and done.line == "diffalign: train.batch 1 is less than the 2 processes; raise it"


@pytest.mark.slow
def test_wrong_input_under_a_launcher(options: dict[str, object], place: Path) -> None:
    """One voice, no traceback of ours, and a failure for the launcher; fewer rows than processes is one of them."""
    out = place / "wrong"
    done = launch("-m", "diffalign", "train", *settings(out=out, **{**options, "train__batch": 1}))  # type: ignore[arg-type]
    ours = [line for line in done.err.splitlines() if line.startswith("diffalign: ")]
    assert done.status != 0 and ours == ["diffalign: train.batch 1 is less than the 2 processes; raise it"]
    assert "exitcode  : 2" in done.err
    assert 'File "' not in done.err.split("torch/distributed")[0]
