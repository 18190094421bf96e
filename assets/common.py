"""What the training scripts of the tiny world share: seeds, pictures as tensors, a plain log."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
HERE = Path(__file__).resolve().parent


def start(seed: int) -> np.random.Generator:
    """One thread and fixed seeds: a stage gives the same weights again on the same machine."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    return np.random.default_rng(seed)


def to_tensor(images: np.ndarray) -> torch.Tensor:
    """uint8 (N, H, W, 3) -> uint8 (N, 3, H, W)."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


def to_signed(images: torch.Tensor) -> torch.Tensor:
    """uint8 (N, 3, H, W) -> float32 in -1..1."""
    return images.float() / 127.5 - 1


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """float (N, 3, H, W) in -1..1 -> uint8."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


class Log:
    """Prints ``stage step seconds name=value``, flushed, so that a background build can be followed."""

    def __init__(self, stage: str) -> None:
        self.stage, self.began = stage, time.time()

    def __call__(self, step: int | str, **values: float) -> None:
        text = " ".join(f"{k}={v:.5g}" for k, v in values.items())
        print(f"{self.stage} {step} {time.time() - self.began:.0f}s {text}", flush=True)


def set_lr(optimiser: torch.optim.Optimizer, lr: float) -> None:
    for group in optimiser.param_groups:
        group["lr"] = lr
