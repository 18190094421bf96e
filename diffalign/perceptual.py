"""LPIPS (Zhang et al. 2018, arXiv 1801.03924) with VGG16, version 0.1, as a distance that gradients run through.

The weights come from two files, neither of which this package ships: torchvision's VGG16 and the linear layers of the
package lpips, read without importing either (torchvision's own import breaks beside a torch of another build).
"""

from __future__ import annotations

import pickle
from importlib.util import find_spec
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .errors import UserError

LINEAR = "vgg.pth"  # of the package lpips, weights/v0.1
WIDTHS = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512)  # 0: halved; torchvision's order
ENDS = (1, 4, 8, 12, 16)  # of WIDTHS: what is compared, after its ReLU
LEVELS = (64, 128, 256, 512, 512)
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
EPS = 1e-10


class Lpips(nn.Module):
    """Distances (B,) of images (B, 3, H, W) in [0, 1], 32 px at least; frozen."""

    def __init__(self, trunk: dict[str, Tensor], linear: dict[str, Tensor]) -> None:
        super().__init__()
        self.convolutions = nn.ModuleDict()
        channels, place = 3, 0  # torchvision counts ReLUs and poolings too
        for number, width in enumerate(WIDTHS):
            if width:
                layer = nn.Conv2d(channels, width, 3, padding=1)
                layer.load_state_dict({part: trunk[f"features.{place}.{part}"] for part in ("weight", "bias")})
                self.convolutions[str(number)] = layer
                channels = width
            place += 2 if width else 1
        for k, level in enumerate(LEVELS):
            self.register_buffer(f"weight{k}", linear[f"lin{k}.model.1.weight"].float().reshape(1, level, 1, 1))
        self.register_buffer("shift", torch.tensor(SHIFT).reshape(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor(SCALE).reshape(1, 3, 1, 1))
        self.requires_grad_(False).eval()

    def levels(self, images: Tensor) -> list[Tensor]:
        """The five features (B, C, h, w) that are compared, each of length 1 at every place."""
        x, found = (2 * images - 1 - cast(Tensor, self.shift)) / cast(Tensor, self.scale), []
        for number, width in enumerate(WIDTHS):
            x = F.relu(self.convolutions[str(number)](x)) if width else F.max_pool2d(x, 2)
            if number in ENDS:
                # inside the root: a place where nothing answers has a gradient too
                found.append(x / (x.square().sum(1, keepdim=True) + EPS**2).sqrt())
        return found

    def forward(self, images: Tensor, others: Tensor) -> Tensor:
        total = images.new_zeros(len(images))
        for k, (one, other) in enumerate(zip(self.levels(images), self.levels(others), strict=True)):
            total = total + ((one - other).square() * self.get_buffer(f"weight{k}")).sum(1).mean((1, 2))
        return total


def load_lpips(trunk: str) -> Lpips:
    """LPIPS from torchvision's ``vgg16-397923af.pth`` at ``trunk``; its linear layers are the installed package lpips'
    own, or ``vgg.pth`` beside the trunk.

    Raises UserError when one of the files is absent or is something else."""
    file = Path(trunk).expanduser()
    if not file.is_file():
        raise UserError(f"method.lpips: there is no file '{trunk}'; give torchvision's VGG16, vgg16-397923af.pth")
    linear = file.with_name(LINEAR)
    if not linear.is_file():
        package = find_spec("lpips")  # finds, and does not import
        places = list(package.submodule_search_locations or []) if package is not None else []
        linear = next((Path(place, "weights", "v0.1", LINEAR) for place in places), linear)
    if not linear.is_file():
        raise UserError(
            f"method.lpips needs the linear layers of LPIPS besides '{trunk}': pip install lpips, or put its "
            f"weights/v0.1/{LINEAR} beside that file"
        )
    try:
        return Lpips(_read(file), _read(linear))
    except (KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"method.lpips: '{trunk}' is no VGG16 of torchvision ({reason}); give another") from error


def _read(file: Path) -> dict[str, Tensor]:
    try:
        with torch.device("cpu"):
            state = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(
            f"method.lpips: '{file}' holds no plain tensors ({type(error).__name__}); fetch it again"
        ) from None
    if not isinstance(state, dict):
        raise UserError(f"method.lpips: '{file}' holds no weights; fetch it again")
    return state
