"""Small data sets and small runs: what the tests of whole runs share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

WORDS = ("a red cat", "a blue dog", "two green birds", "a fish beside a tree")


def picture(key: int, size: tuple[int, int] = (64, 64)) -> Image.Image:
    """Coloured blocks, another for each key."""
    cells = np.random.default_rng(key).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(cells).resize(size, Image.Resampling.NEAREST)


def write_pairs(folder: Path, count: int = 12, first: int = 0) -> Path:
    """Pairs of 64 x 64 PNGs with metadata.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for i in range(first, first + count):
        names = {"chosen": f"{i}-a.png", "rejected": f"{i}-b.png"}
        for k, name in enumerate(names.values()):
            picture(2 * i + k).save(folder / name)
        lines.append(json.dumps({"prompt": f"{WORDS[i % 4]} {i}", **names}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def settings(model: Path, data: Path, out: Path, **changes: Any) -> list[str]:
    """A recipe's name and overrides for a run of 12 steps that takes seconds. ``changes``: section__key=value, None to
    leave a key to the recipe."""
    values: dict[str, Any] = {
        "model.path": model,
        "model.lora.rank": 4,
        "model.lora.alpha": 6,
        "method.beta": 1000,
        "data.path": data,
        "data.cache_dir": out.parent / "cache",
        "train.steps": 12,
        "train.batch": 2,
        "train.lr": 1e-2,
        "train.warmup": 0,
        "train.log_every": 4,
        "train.save_every": 4,
        "train.schedule": "constant",
        "validate.every": 100,
        "validate.pairs": 2,
        "validate.draws": 1,
        "validate.images": 1,
        "validate.steps": 2,
        "output.dir": out,
        "output.trackers": "[]",
    }
    values |= {key.replace("__", "."): value for key, value in changes.items()}
    return ["tiny/dpo", *(f"{key}={value}" for key, value in values.items() if value is not None)]


def log_of(folder: Path, kind: str = "train") -> list[dict[str, Any]]:
    """Rows of log.jsonl of one kind."""
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == kind]


def lora_of(folder: Path) -> dict[str, torch.Tensor]:
    """The exported adapter of a run."""
    return load_file(folder / "model" / "pytorch_lora_weights.safetensors")


def same_tree(a: Any, b: Any) -> bool:
    """Bit-equality of nested dicts, lists and tensors."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_tree(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same_tree, a, b))
    return bool(a == b)


def final_state(folder: Path) -> dict[str, Any]:
    """What the newest checkpoint of a run holds: weights, optimisers, curves."""
    newest = max((folder / "checkpoints").glob("step-*"))
    state: dict[str, Any] = torch.load(newest / "state.pt", weights_only=True)
    return state


def curve(folder: Path) -> list[dict[str, Any]]:
    """The log without what depends on the clock."""
    clock = {"time", "rows_per_second", "data_share"}
    rows = log_of(folder) + log_of(folder, "validate")
    return [{key: value for key, value in row.items() if key not in clock} for row in rows]
