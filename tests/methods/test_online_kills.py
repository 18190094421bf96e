"""kill -9 in the middle of a round of an online method: the same command goes on, and the end is the same."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from command import diffalign, start
from small import curve, final_state, lora_of, same_tree, write_pairs

# The process kills itself at the n-th call of something in a round; runs before it and after it do not.
KILL = """
import os, signal
import {module} as module
owner, calls = module.{owner}, [0]
inner = owner.{name}
def counted(*args, **options):
    calls[0] += 1
    if calls[0] == {at}:
        os.kill(os.getpid(), signal.SIGKILL)
    return inner(*args, **options)
owner.{name} = counted
"""
STEPS = 3  # of sampling: a round of 2 prompts has 12 items, in micro-batches of 2
PLACES = {
    "in a rollout": ("diffalign.rollouts.walk", "Walk", "step", 2 * STEPS - 1),  # each in the second round
    "while it is recalled": ("diffalign.methods.policy_gradient", "PolicyGradient", "recall", 9),
    "between its updates": ("diffalign.methods.policy_gradient", "PolicyGradient", "loss", 10),
}


def settings(model: Path, data: Path, out: Path) -> list[object]:
    values = {
        "model.path": model,
        "model.lora.rank": 4,
        "method.steps": STEPS,
        "method.members": 2,
        "method.updates": 2,
        "method.guidance": 1.0,
        "method.skip_last": False,
        "method.share": 1.0,
        "data.path": data,
        "data.cache_dir": out.parent / "cache",
        "train.steps": 3,
        "train.batch": 2,
        "train.log_every": 1,
        "train.save_every": 1,
        "validate.every": 100,
        "validate.pairs": 0,
        "validate.images": 1,
        "validate.steps": 1,
        "output.dir": out,
        "output.trackers": "[]",
    }
    return ["train", "tiny/ddpo", *(f"{key}={value}" for key, value in values.items())]


@pytest.mark.slow
def test_a_round_that_was_killed_is_run_again_to_the_same_end(tiny_model_folder: Path, tmp_path: Path) -> None:
    """In the rollout, in what is said of it again, and between two of its updates: weights, optimiser and curves."""
    data = write_pairs(tmp_path / "pairs", 6)
    straight = tmp_path / "straight"
    done = diffalign(*settings(tiny_model_folder, data, straight), timeout=900)
    assert done.status == 0, done.err
    for number, (module, owner, name, at) in enumerate(PLACES.values()):
        out = tmp_path / f"killed-{number}"
        args = settings(tiny_model_folder, data, out)
        killed = start(*args, code=KILL.format(module=module, owner=owner, name=name, at=at)).wait(900)
        assert killed.status == -signal.SIGKILL, killed.err
        assert [path.name for path in (out / "checkpoints").glob("step-*")] == ["step-000001"], "in the second round"
        again = diffalign(*args, timeout=900)
        assert again.status == 0, again.err
        assert same_tree(lora_of(straight), lora_of(out)) and same_tree(final_state(straight), final_state(out))
        assert curve(straight) == curve(out), list(PLACES)[number]
