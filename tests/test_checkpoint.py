"""Checkpoints as files: order, what is whole, what is kept, what is refused. Kills and full disks: test_faults.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from diffalign.checkpoint import checkpoint_dirs, load_checkpoint, prune, save_checkpoint, write_atomic
from diffalign.errors import RunError, UserError
from diffalign.run import find_checkpoint


def save(folder: Path, step: int) -> Path:
    return save_checkpoint(folder, step, {"x": torch.tensor([float(step)])}, {"step": step})


def steps(folder: Path) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in checkpoint_dirs(folder)]


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    path = save(tmp_path, 7)
    tensors, facts = load_checkpoint(path)
    assert path.name == "step-000007" and torch.equal(tensors["x"], torch.tensor([7.0])) and facts == {"step": 7}


def test_order_is_by_number_and_halves_are_not_seen(tmp_path: Path) -> None:
    for step in (900, 1000000, 20):
        save(tmp_path, step)
    (tmp_path / "step-000030").mkdir()
    (tmp_path / "step-last").mkdir()
    (tmp_path / ".tmp-step-000040-1").mkdir()
    assert steps(tmp_path) == [20, 900, 1000000]
    assert steps(tmp_path / "nowhere") == []


def test_the_newest_and_the_spared_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4, 5):
        save(tmp_path, step)
    (tmp_path / ".tmp-step-000006-1").mkdir()
    prune(tmp_path, 2, [2])
    assert steps(tmp_path) == [2, 4, 5] and {p.name for p in tmp_path.iterdir()} == {
        f"step-00000{n}" for n in (2, 4, 5)
    }


def test_the_same_step_again_replaces(tmp_path: Path) -> None:
    save(tmp_path, 1)
    save_checkpoint(tmp_path, 1, {"x": torch.zeros(2)}, {"step": 1, "new": True})
    tensors, facts = load_checkpoint(tmp_path / "step-000001")
    assert facts["new"] and len(tensors["x"]) == 2 and len(list(tmp_path.iterdir())) == 1


def test_no_place_to_write(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="checkpoint of step 1 could not be written") as caught:
        save(tmp_path / "file", 1)
    assert "there is none yet" in str(caught.value)


def test_where_to_go_on_from(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert find_checkpoint(folder, "auto") is None and find_checkpoint(folder, "never") is None
    first, second = save(folder / "checkpoints", 5), save(folder / "checkpoints", 10)
    assert find_checkpoint(folder, "auto") == second
    for place, expected in ((folder, second), (folder / "checkpoints", second), (first, first)):
        assert find_checkpoint(tmp_path / "new", str(place)) == expected
    with pytest.raises(UserError, match="holds a run at step-000010"):
        find_checkpoint(folder, "never")
    with pytest.raises(UserError, match="no checkpoint there"):
        find_checkpoint(folder, str(tmp_path / "nowhere"))


def test_a_text_file_is_old_or_new(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    write_atomic(file, json.dumps([1]))
    write_atomic(file, json.dumps([2]))
    assert json.loads(file.read_text()) == [2] and [p.name for p in tmp_path.iterdir()] == ["a.json"]
