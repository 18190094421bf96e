"""Any tower of the open_clip package, run by the package itself, with its own pixels and tokenizer: the extra
``[openclip]``. Plain ViTs in OpenCLIP's layout need no extra: ``clip=``, ``hps=``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from PIL import Image

from ...errors import UserError
from ..preprocess import P1
from ._base import (
    CODE_VERSION,
    check_known,
    model_files,
    resolve_device,
    resolve_dtype,
    resolve_weights,
    weights_sha256,
)
from ._clip import OPENCLIP_CONFIG, ClipScorer, unit

SCORERS: dict[str, dict[str, object]] = {
    "openclip": {
        "about": "100 x cosine of any open_clip tower: openclip=FOLDER or HUB_ID or FILE@ARCH (extra [openclip])"
    },
}


@dataclass(frozen=True)
class Transform:
    """open_clip's own picture transform as a pixel pipeline."""

    apply: Any  # PIL -> normalised float (3, S, S)
    stated: dict[str, Any]

    @property
    def size(self) -> int:
        side = self.stated["size"]
        return int(side if isinstance(side, int) else side[0])

    @property
    def id(self) -> str:
        said = "-".join(f"{k}={self.stated[k]}" for k in ("resize_mode", "interpolation", "mean", "std"))
        return f"openclip-{self.size}-{said}-alpha_white"

    def crop(self, image: Image.Image) -> np.ndarray:
        return np.asarray(self.apply(image))

    def normalise(self, crops: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(crops))

    def tensor(self, images: torch.Tensor) -> torch.Tensor:
        """As P1's; UserError for a tower whose pixels are not cropped so."""
        if (self.stated["resize_mode"], self.stated["interpolation"]) != ("shortest", "bicubic"):
            raise UserError(f"this open_clip tower resizes by '{self.stated['resize_mode']}'; it gives no gradients")
        (r, g, b), (sr, sg, sb) = self.stated["mean"], self.stated["std"]
        return P1(self.size, "torchvision", (r, g, b), (sr, sg, sb)).tensor(images)


class OpenClip(ClipScorer):
    """``OpenClip.from_pretrained("weights.pt@ViT-B-16-SigLIP")(images, prompts)``: 100 x cosine, fp32 (N,)."""

    formula = "100*cos"

    def __init__(
        self, model: Any, tokenizer: Any, pixels: Transform, device: torch.device, dtype: torch.dtype, name: str
    ) -> None:
        self.model = model.eval().requires_grad_(False).to(device=device, dtype=dtype)
        self.tokenizer, self.pixels = tokenizer, pixels
        self.name, self.device, self.dtype, self.clean = name, device, dtype, "its own"
        self.max_tokens = int(tokenizer.context_length)
        self.preprocess_id = pixels.id
        self.texts_encoded = 0
        self._texts, self._block = {}, {}

    @classmethod
    def from_pretrained(
        cls, path: str | Path | None = None, device: str = "auto", dtype: str = "auto", name: str | None = None
    ) -> Self:
        """``path``: a folder with open_clip_config.json, a hub id of such, or FILE@ARCH with an architecture's name.

        Raises UserError without the extra, for an unknown architecture, or weights that do not fit."""
        if path is None:
            raise UserError("scorer 'openclip' needs a path; say openclip=FOLDER_OR_HUB_ID or openclip=FILE@ARCH")
        open_clip = _package()
        source, _, arch = str(path).partition("@")
        place = resolve_weights(source, "openclip", (OPENCLIP_CONFIG,))
        if place.is_file() and not arch:
            raise UserError(f"'{source}' does not say its architecture; say openclip={source}@ARCH, such as @ViT-B-32")
        if place.is_file() and arch not in open_clip.list_models():
            raise UserError(f"open_clip knows no architecture '{arch}'; see open_clip.list_models()")
        where = resolve_device(device)
        dtype_name, torch_dtype = resolve_dtype(dtype, where)
        named = arch if place.is_file() else f"local-dir:{place}"
        weights = {"pretrained": str(place)} if place.is_file() else {}
        try:
            model, _, transform = open_clip.create_model_and_transforms(named, pretrained_text=False, **weights)
            tokenizer = open_clip.get_tokenizer(named)
        except (RuntimeError, ValueError, OSError, KeyError, AssertionError) as error:
            reason = str(error).splitlines()[0][:120]
            raise UserError(f"open_clip cannot load '{path}' ({reason}); do file and architecture match?") from error
        stated = {**asdict(open_clip.transform.PreprocessCfg()), **open_clip.get_model_preprocess_cfg(model)}
        scorer = cls(model, tokenizer, Transform(transform, stated), where, torch_dtype, name or "openclip")
        files = [place] if place.is_file() else model_files(place)
        scorer.path, scorer.weights_note = str(path), check_known(files, scorer.name)
        scorer.fingerprint = {
            "scorer": "openclip",
            "formula": cls.formula,
            "scale": "100",
            "weights": weights_sha256(files),
            "arch": arch,
            "preprocess": scorer.preprocess_id,
            "max_tokens": str(scorer.max_tokens),
            "dtype": dtype_name,
            "code": f"{CODE_VERSION}, open_clip {open_clip.__version__}",
        }
        return scorer

    @property
    def scale(self) -> float:
        return 100.0

    def embed_pixels(self, pixels: torch.Tensor) -> torch.Tensor:
        return unit(self.model.encode_image(pixels.to(self.dtype)))

    def _encode(self, prompts: Sequence[str]) -> torch.Tensor:
        return unit(self.model.encode_text(self.tokenizer(list(prompts)).to(self.device)))

    def _lengths(self, prompts: Sequence[str]) -> list[int]:
        inner = getattr(self.tokenizer, "tokenizer", None)  # of Hugging Face, for towers that are not CLIP's own
        if inner is not None:
            return [len(ids) for ids in inner(list(prompts)).input_ids] if prompts else []
        return [len(self.tokenizer.encode(prompt)) + 2 for prompt in prompts]


def _package() -> Any:
    try:
        import open_clip
    except ImportError as error:
        raise UserError("scorer 'openclip' needs open-clip-torch; pip install 'diffalign[openclip]'") from error
    except RuntimeError as error:
        raise UserError(
            f"open_clip cannot be imported ({str(error).splitlines()[0][:80]}); torchvision does not fit this torch"
        ) from error
    return open_clip
