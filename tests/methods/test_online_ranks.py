"""A round of an online method on two processes: the trajectory of one, also where one of them has nothing to learn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from command import group
from torch import Tensor
from world import SAMPLED, Rows, gap, make_trainer, small_clip, stirred, weights

from diffalign.methods import make_method

RUN = """
import sys
sys.path[:0] = PATHS
from test_online_ranks import trained
trained("FILE", NAMES)
"""
SETTINGS: dict[str, dict[str, Any]] = {
    "ddpo": {**SAMPLED, "share": 1.0, "updates": 2, "epochs": 2, "mean": "batch", "std": "batch", "clip": 0.2},
    "spo": {"steps": 4, "start_step": 1, "pool": 2, "threshold": 0.0, "updates": 2, "guidance": 1.0, "beta": 100.0},
    "grpo": {**SAMPLED, "share": 0.5, "updates": 2, "clip": 0.2, "kl": 0.1},
    "d3po": {**SAMPLED, "share": 1.0, "updates": 2, "beta": 10.0, "clip": None},
    "nft": {**SAMPLED, "share": 1.0, "updates": 2},
    "dro": {"steps": 3, "updates": 3, "kept": 3},
    "tree_rpo": {**SAMPLED, "steps": 3, "members": 1, "depth": 2, "share": 1.0, "updates": 2, "clip": 0.2},
    "pso_online": {**SAMPLED, "timesteps": [999, 749, 499], "share": 1.0, "updates": 2, "beta": 10.0, "clip": None},
    "pso_pictures": {"timesteps": [999, 749, 499], "kept": 2, "updates": 2, "beta": 100.0},
}
FIRST = ["ddpo", "spo"]


def trained(file: str, names: list[str]) -> None:
    """A step of each method; the first process saves what came of it. Rewards of the second one's prompts are all 0."""
    accelerator, found = Accelerator(cpu=True), {}
    for name in names:
        method = make_method(name, SETTINGS[name] | ({"reward": f"spm={small_clip()}"} if name == "spo" else {}))
        rows = Rows(12, kind=method.needs.batch)
        trainer = stirred(make_trainer(method, rows=rows, accelerator=accelerator, max_grad_norm=None, eps=1e-2))
        start = weights(trainer)
        alike = {rows.prompts[i] for i in trainer.source.share(0, 4, 1, 2)[0]}

        def judge(images: Tensor, prompts: Any, t: Any = None, alike: set[str] = alike) -> Tensor:
            return 10 * images.mean((1, 2, 3)) * torch.tensor([float(prompt not in alike) for prompt in prompts])

        trainer.ctx.rewards = dict.fromkeys(trainer.ctx.rewards, judge)
        trainer.train_step()
        found[name] = (start, weights(trainer), trainer.meter.read(trainer.reduce))
        trainer.close()
    if accelerator.is_main_process:
        torch.save({"world": accelerator.num_processes, **found}, file)


@pytest.mark.parametrize(
    "names", [FIRST, pytest.param([n for n in SETTINGS if n not in FIRST], marks=pytest.mark.slow)], ids=["two", "rest"]
)
def test_two_processes_give_the_round_of_one(names: list[str], tmp_path: Path) -> None:
    here = Path(__file__).parent
    code = RUN.replace("PATHS", repr([str(here), str(here.parent)])).replace("FILE", str(tmp_path / "two.pt"))
    code = code.replace("NAMES", repr(names))
    done = group(2, code=code)
    assert done.status == 0, done.err
    trained(str(tmp_path / "one.pt"), names)
    one, two = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("one", "two"))
    assert (one["world"], two["world"]) == (1, 2)
    for name in names:
        start, end, values = one[name]
        assert gap(end, two[name][1]) < 1e-2 * gap(start, end), name
        assert {k for k in values if "norm" not in k} == {k for k in two[name][2] if "norm" not in k}
        for key in {"loss", "reward", "idle", "rounds_empty"} & values.keys():
            # a loss of advantages, which sum to 0, is the rest of numbers near 1
            assert two[name][2][key] == pytest.approx(values[key], rel=1e-3, abs=1e-4), (name, key)
    if "spo" in names:
        assert one["spo"][2]["kept"] == 0.5 and one["spo"][2]["idle"] == 0.5, (
            "half of the pairs, in half of the updates"
        )
