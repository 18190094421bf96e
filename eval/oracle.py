"""The oracle of the tiny world: reads a drawn scene back (layout, colours, shapes). It only judges, it never trains.

The network is a small CNN with five heads: layout (single, vertical, horizontal), then colour and shape of the
top/left object, then colour and shape of the bottom/right one.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from diffalign.assets.scenes import COLOURS, LAYOUTS, SHAPES, SIZE, labels, parse

HEADS = (len(LAYOUTS), len(COLOURS), len(SHAPES), len(COLOURS), len(SHAPES))
KEYS = ("layout", "colours", "shapes", "all")
Images = torch.Tensor | np.ndarray | Sequence[Image.Image]


class OracleNet(nn.Module):
    """(N, 3, 32, 32) in -1..1 -> five logits tensors, see :data:`HEADS`."""

    def __init__(self, widths: Sequence[int] = (24, 48, 64, 96, 96), strides: Sequence[int] = (2, 1, 2, 1, 2)) -> None:
        super().__init__()
        blocks: list[nn.Module] = []
        for i, o, stride in zip([3, *widths], widths, strides, strict=False):
            blocks += [nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU()]
        self.body = nn.Sequential(*blocks)
        side = SIZE // int(np.prod(strides))
        self.head = nn.Linear(widths[-1] * side * side, sum(HEADS))
        self.config = {"widths": list(widths), "strides": list(strides)}

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.head(self.body(x).flatten(1)).split(HEADS, 1)


class Oracle:
    """Judges pictures of the tiny world.

    >>> oracle = Oracle.from_pretrained("assets/tiny-oracle")
    >>> oracle.judge(images, prompts)["all"].mean()
    """

    def __init__(self, net: OracleNet) -> None:
        self.net = net.eval().requires_grad_(False)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Oracle:
        """Read ``config.json`` and ``model.safetensors``."""
        config = json.loads((Path(folder) / "config.json").read_text())
        net = OracleNet(config["widths"], config["strides"])
        net.load_state_dict(load_file(Path(folder) / "model.safetensors"))
        return cls(net)

    def save_pretrained(self, folder: str | Path) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        config = {**self.net.config, "size": SIZE, "layouts": LAYOUTS, "colours": COLOURS, "shapes": SHAPES}
        (Path(folder) / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        save_file({k: v.contiguous() for k, v in self.net.state_dict().items()}, Path(folder) / "model.safetensors")

    @torch.no_grad()
    def read(self, images: Images, batch: int = 256) -> np.ndarray:
        """What is seen: (N, 5) int64 as in ``scenes.labels``; -100 for the second object of single layouts.

        ``images``: uint8 (N, 3, H, W) or (N, H, W, 3), tensor or array, or a list of PIL images of any sizes.
        """
        pixels = prepare(images)
        parts = [torch.stack([o.argmax(1) for o in self.net(b)], 1) for b in pixels.split(batch)]
        seen = torch.cat(parts).numpy() if parts else np.zeros((0, 5), np.int64)
        seen[seen[:, 0] == 0, 3:] = -100
        return seen

    def judge(self, images: Images, prompts: Sequence[str]) -> dict[str, np.ndarray]:
        """Bool (N,) under "layout", "colours", "shapes", "all": is what the prompt asks for right?

        For single-object prompts "layout" means that exactly one object is there. Prompts that are not captions of
        this world raise ValueError.
        """
        scenes = []
        for prompt in prompts:
            scene = parse(prompt)
            if scene is None:
                raise ValueError(f"not a caption of the tiny world: {prompt!r}")
            scenes.append(scene)
        seen, asked = self.read(images), labels(scenes)
        if len(seen) != len(asked):
            raise ValueError(f"{len(seen)} images for {len(asked)} prompts")
        same = (seen == asked) | (asked == -100)
        right = {"layout": same[:, 0], "colours": same[:, [1, 3]].all(1), "shapes": same[:, [2, 4]].all(1)}
        right["all"] = right["layout"] & right["colours"] & right["shapes"]
        return right


def prepare(images: Images) -> torch.Tensor:
    """Any accepted images -> float (N, 3, 32, 32) in -1..1; other sizes are resized (antialiased)."""
    if not isinstance(images, torch.Tensor | np.ndarray):
        tensors = [prepare(np.asarray(im.convert("RGB"))[None]) for im in images]
        return torch.cat(tensors) if tensors else torch.zeros(0, 3, SIZE, SIZE)
    x = images if isinstance(images, torch.Tensor) else torch.from_numpy(np.array(images))
    if x.dtype != torch.uint8 or x.ndim != 4:
        raise ValueError(f"the oracle reads uint8 (N, 3, H, W) or (N, H, W, 3), not {x.dtype} {tuple(x.shape)}")
    if x.shape[1] != 3 and x.shape[-1] == 3:
        x = x.permute(0, 3, 1, 2)
    pixels = x.float() / 127.5 - 1
    if pixels.shape[-2:] != (SIZE, SIZE):
        pixels = F.interpolate(pixels, (SIZE, SIZE), mode="bilinear", antialias=True, align_corners=False)
    return pixels.contiguous()
