"""open_clip and torchvision beside a CPU build of torch: for tests of the extras only.

The torchvision wheel of the package index is a CUDA build. Beside a CPU torch its C++ part cannot load, and its import
dies because two operators are not defined. Defining their schemas is enough for transforms, models and open_clip
(spec/evaluators.md 0.2)."""

from __future__ import annotations

import importlib.util
import sys

import torch

_KEEP: list[torch.library.Library] = []  # a library that is collected takes its operators along


def load() -> bool:
    """Import torchvision and open_clip, mended where needed. False where they are not installed."""
    if any(importlib.util.find_spec(name) is None for name in ("torchvision", "open_clip")):
        return False
    try:
        import torchvision
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        for name in [n for n in sys.modules if n.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _KEEP.append(library)
        import torchvision  # noqa: F401
    return True
