"""Full fine-tuning in shards (FSDP2): two processes train what one does, and go on from its checkpoints. CPU, gloo."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from command import diffalign, group
from diffusers import UNet2DConditionModel
from small import curve, final_state, log_of, same_tree, settings, write_pairs
from test_parallel import POISON
from torch import Tensor

BATCH = 5  # 2 rows on one rank, 3 on the other: with micro-batches of 2, the first must add an empty one


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shards")


@pytest.fixture(scope="module")
def options(tiny_model_folder: Path, place: Path) -> dict[str, Any]:
    """Rounding stays rounding: a small learning rate, and an eps that is large beside it."""
    return {
        "model": tiny_model_folder,
        "data": write_pairs(place / "pairs"),
        "model__storage": "copies",
        "model__gradient_checkpointing": True,
        "model__lora__rank": None,
        "model__lora__alpha": None,
        "method__beta": 50,
        "train__batch": BATCH,
        "train__micro_batch": 2,
        "train__lr": 1e-4,
        "train__eps": 1e-3,
        "train__ema": 0.9,
        "train__steps": 4,
        "train__log_every": 1,
        "train__save_every": 2,
        "validate__every": 2,
        "validate__pairs": 3,
    }


@pytest.fixture(scope="module")
def alone(options: dict[str, Any], place: Path) -> Path:
    done = diffalign("train", *settings(out=place / "alone", **options))
    assert done.status == 0, done.err
    return place / "alone"


@pytest.fixture(scope="module")
def sharded(options: dict[str, Any], place: Path) -> Path:
    out = place / "sharded"
    done = group(2, "train", *settings(out=out, **options, train__parallel="fsdp"))
    assert done.status == 0, done.err
    assert done.out.count("model: ") == 1
    return out


def unet_of(run: Path) -> dict[str, Tensor]:
    return dict(UNet2DConditionModel.from_pretrained(run / "model", subfolder="unet").state_dict())


def gap(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Largest difference relative to the largest weight."""
    assert a.keys() == b.keys() and all(a[name].shape == b[name].shape for name in a)
    return max(float((a[n] - b[n]).abs().max()) for n in a) / max(float(t.abs().max()) for t in a.values())


def moments(state: dict[str, Any]) -> dict[str, Tensor]:
    """Every tensor of the optimiser and the averages, whole."""
    found = {f"{i}.{k}": v for i, held in state["optimizers"]["student"]["state"].items() for k, v in held.items()}
    return found | {f"ema.{i}": tensor for i, tensor in enumerate(state["ema"]["student"]["shadow"])}


def test_shards_train_what_one_process_trains(alone: Path, sharded: Path) -> None:
    one, two = final_state(alone), final_state(sharded)
    assert gap(one["roles"]["student"], two["roles"]["student"]) < 1e-5
    assert gap(moments(one), moments(two)) < 1e-5
    assert gap(unet_of(alone), unet_of(sharded)) < 1e-5
    for left, right in zip(curve(alone), curve(sharded), strict=True):
        assert left.keys() == right.keys()
        for name in left.keys() - {"kind"}:
            rough = 1e-5 * 50 / 2 if "logit" in name else 2e-5
            assert left[name] == pytest.approx(right[name], rel=1e-4, abs=rough), (left["step"], name)
    assert {p.name for p in sharded.iterdir()} == {p.name for p in alone.iterdir()}
    assert len(list((sharded / "samples").iterdir())) == 3


def test_the_export_is_plain_diffusers(sharded: Path) -> None:
    state = unet_of(sharded)
    averages = [t for k, t in moments(final_state(sharded)).items() if k.startswith("ema.")]
    assert all(torch.equal(a, b) for a, b in zip(state.values(), averages, strict=True)), "EMA weights are exported"
    assert '"UNet2DConditionModel"' in (sharded / "model" / "unet" / "config.json").read_text()


def test_resume_is_exact(options: dict[str, Any], place: Path, sharded: Path) -> None:
    out = place / "resumed"
    shutil.copytree(sharded, out)
    shutil.rmtree(out / "checkpoints" / "step-000004")
    done = group(2, "train", *settings(out=out, **options, train__parallel="fsdp"))
    assert done.status == 0 and done.err.count("going on from") == 1, done.err
    first, second = final_state(sharded), final_state(out)
    assert all(same_tree(first[key], second[key]) for key in ("step", "roles", "optimizers", "ema"))


@pytest.mark.slow
def test_one_process_goes_on_from_shards(options: dict[str, Any], place: Path, alone: Path, sharded: Path) -> None:
    out = place / "gathered"
    shutil.copytree(sharded, out)
    shutil.rmtree(out / "checkpoints" / "step-000004")
    assert diffalign("train", *settings(out=out, **options)).status == 0
    assert gap(final_state(alone)["roles"]["student"], final_state(out)["roles"]["student"]) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("method", ["mapo", "sft"])
def test_methods_without_a_reference(method: str, options: dict[str, Any], place: Path) -> None:
    changes = {**options, "method__beta": None}
    runs = []
    for name, extra in (("one", []), ("two", ["train.parallel=fsdp"])):
        runs.append(place / f"{method}-{name}")
        args = [f"tiny/{method}", *settings(out=runs[-1], **changes)[1:], *extra]
        done = group(2, "train", *args) if extra else diffalign("train", *args)
        assert done.status == 0, done.err
    assert gap(*(final_state(run)["roles"]["student"] for run in runs)) < 1e-5
    assert gap(*map(unet_of, runs)) < 1e-5


@pytest.mark.slow
def test_a_skip_is_one_decision(options: dict[str, Any], place: Path) -> None:
    out = place / "skipped"
    done = group(2, "train", *settings(out=out, **options, train__parallel="fsdp"), code=POISON)
    assert done.status == 0, done.err
    assert [row.get("skipped", 0) for row in log_of(out)] == [1, 1, 1, 1]
    assert float(final_state(out)["optimizers"]["student"]["state"][0]["step"]) == 3


WRONG = {
    "adapters": ({"model__storage": "adapters"}, "does not go with model.storage=adapters; adapters are small"),
    "quantised": ({"model__quantize": "4bit"}, "does not go with model.quantize=4bit; set model.quantize=none"),
    "compiled": ({"model__compile": True}, "does not go with model.compile=true; set model.compile=false"),
    "offloaded": ({"model__offload": True}, "does not go with model.offload=true"),
    "strided": ({"model__channels_last": True}, "does not go with model.channels_last=true"),
    "optimiser": ({"train__optimizer": "adafactor"}, "does not go with train.optimizer=adafactor"),
    "fp16": ({"train__precision": "fp16"}, "does not go with train.precision=fp16; set train.precision=bf16"),
    "cached errors": ({"data__reference_errors": 2}, "does not go with columns that are computed ahead"),
    "one process": ({}, "needs several processes; start it with torchrun"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_go_with_shards(case: str, options: dict[str, Any], tmp_path: Path) -> None:
    changes, expected = WRONG[case]
    done = diffalign("train", *settings(out=tmp_path / "out", **{**options, **changes, "train__parallel": "fsdp"}))
    assert done.status == 2 and expected in done.line
    assert not (tmp_path / "out").exists()
