"""LPIPS (Zhang et al. 2018, arXiv 1801.03924), AlexNet v0.1, as diversity: the mean over the pairs of pictures of a
prompt. By the package lpips (extra ``[lpips]``); inputs in [-1, 1]."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from ...errors import UserError
from ..preprocess import Pixels
from ..scorers._base import CODE_VERSION, check_known, read_state, resolve_device, resolve_weights, weights_sha256
from ._base import Gathered, SetMetric, SetResult, by_group

SETS: dict[str, dict[str, object]] = {
    "lpips": {
        "about": "mean LPIPS (AlexNet) of a prompt's pairs of pictures: lpips=alexnet-owt-7be5be79.pth (torchvision's)",
        "needs": "groups",
        "better": "high",
        "extra": "lpips",
    },
}


@dataclass(frozen=True)
class Signed:
    """Square of ``size``: Lanczos resize of the short side, centre crop; normalised to [-1, 1]."""

    size: int = 512

    @property
    def id(self) -> str:
        return f"lpips-{self.size}-lanczos-signed-alpha_white"

    def crop(self, image: Image.Image) -> np.ndarray:
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        box = (left, top, left + side, top + side)
        return np.asarray(image.resize((self.size, self.size), Image.Resampling.LANCZOS, box=box))

    def normalise(self, crops: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(crops)).permute(0, 3, 1, 2).float() / 127.5 - 1

    def tensor(self, images: torch.Tensor) -> torch.Tensor:
        return images * 2 - 1


class Lpips(SetMetric):
    """``load_set("lpips=alexnet-owt-7be5be79.pth")(folder)``: mean over prompts; ``by_group`` has each prompt's."""

    def load(self, source: str, device: str, dtype: str) -> None:
        package = _package()
        file = resolve_weights(source, self.name, ("*.pth",))
        note = check_known([file], self.name)
        state = read_state(file, self.name)
        self.device = resolve_device(device)
        self.network = package.LPIPS(net="alex", version="0.1", pnet_rand=True, verbose=False)
        trunk = self.network.net
        try:  # the trunk's slices keep torchvision's layer numbers
            for name, tensor in trunk.state_dict().items():
                tensor.copy_(state[f"features.{name.partition('.')[2]}"])
        except (KeyError, RuntimeError) as error:
            raise UserError(f"'{source}' for set metric 'lpips' is no AlexNet of torchvision ({error})") from error
        self.network = self.network.eval().requires_grad_(False).to(self.device)
        self.fingerprint = {
            "scorer": "lpips",
            "formula": "lpips alex 0.1, mean of pairs",
            "weights": weights_sha256([file]),
            "weights_note": note,
            "preprocess": Signed().id,
            "dtype": "fp32",
            "code": CODE_VERSION,
        }

    @property
    def pixels(self) -> Pixels:
        return Signed()

    def features(self, crops: np.ndarray) -> torch.Tensor:
        """The pictures themselves, uint8 as float: the distance is a network of two pictures."""
        return torch.from_numpy(crops)

    def measure(self, pictures: Gathered, reference: Gathered | None) -> SetResult:
        values = {}
        for group, places in by_group(pictures.groups).items():
            signed = Signed().normalise(pictures.features[places].numpy()).to(self.device)
            pairs = [float(self.network(signed[i : i + 1], signed[j : j + 1])) for i, j in _pairs(len(places))]
            values[group] = sum(pairs) / len(pairs)
        return SetResult(self.name, sum(values.values()) / len(values), len(pictures.features), by_group=values)


def _pairs(count: int) -> list[tuple[int, int]]:
    return list(itertools.combinations(range(count), 2))


def _package() -> Any:
    try:
        import lpips
    except (ImportError, RuntimeError) as error:
        raise UserError(
            f"lpips needs its package ({type(error).__name__}); pip install 'diffalign[lpips]' with a torchvision that "
            "fits this torch"
        ) from error
    return lpips
