"""Stage "oracle": the judge, trained on drawings of *all* combinations (it only judges)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from diffalign.eval.oracle import Oracle, OracleNet

from . import scenes
from .common import Log, set_lr, start, to_signed, to_tensor

STEPS, BATCH, LR, PICTURES, SEED = 1600, 64, 3e-3, 30_000, 3


def soften(x: torch.Tensor, rng: np.random.Generator, noise: float = 0.25) -> torch.Tensor:
    """Noise of random strength on every picture and a 3x3 blur on half of the batches. ``x`` in -1..1."""
    x = x + torch.randn_like(x) * torch.from_numpy(rng.random((len(x), 1, 1, 1), np.float32)) * noise
    if rng.random() < 0.5:
        x = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
    return x


def train(folder: Path, steps: int = STEPS) -> None:
    rng, log = start(SEED), Log("oracle")
    drawn = scenes.sample_scenes(PICTURES, rng, two=0.6, heldout=None)
    images, target = to_tensor(scenes.render(drawn, rng)), torch.from_numpy(scenes.labels(drawn))
    net = OracleNet()
    opt = torch.optim.AdamW(net.parameters(), LR, weight_decay=1e-3)
    for k in range(steps):
        set_lr(opt, LR * (1 - k / steps))
        pick = torch.from_numpy(rng.integers(0, PICTURES - 1000, BATCH))
        out = net(soften(to_signed(images[pick]), rng))
        losses = [F.cross_entropy(o, target[pick, j], ignore_index=-100) for j, o in enumerate(out)]
        loss = torch.stack(losses).sum()
        opt.zero_grad(set_to_none=True)
        loss.backward()
        opt.step()
        if (k + 1) % 200 == 0:
            log(k + 1, loss=loss.item())
    oracle = Oracle(net)
    right = oracle.judge(images[-1000:], [scenes.caption(s) for s in drawn[-1000:]])
    log("done", **{key: float(v.mean()) for key, v in right.items()})
    oracle.save_pretrained(folder)
