"""FID (Heusel et al. 2017, arXiv 1706.08500) and KID (Binkowski et al. 2018, arXiv 1801.01401): features by
torch-fidelity's port of the original Inception (extra ``[fid]``), distances here, in fp64.

The network resizes uint8 pictures to 299 as TensorFlow 1 did. FID is biased by the number of pictures: compare equal
numbers only."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ...errors import UserError
from ..preprocess import Pixels
from ..scorers._base import CODE_VERSION, check_known, read_state, resolve_device, resolve_weights, weights_sha256
from ._base import Gathered, SetMetric, SetResult

SETS: dict[str, dict[str, object]] = {
    "fid": {
        "about": "Frechet inception distance: fid=weights-inception-2015-12-05-6726825d.pth (torch-fidelity's)",
        "needs": "reference",
        "better": "low",
        "extra": "fid",
    },
    "kid": {
        "about": "kernel inception distance (unbiased, 100 subsets of at most 1000): kid=the same file",
        "needs": "reference",
        "better": "low",
        "extra": "fid",
    },
}
SUBSETS, SUBSET = 100, 1000


@dataclass
class Moments:
    """Count, sum and sum of outer products in fp64, so that streams and shards add up."""

    count: int
    total: torch.Tensor
    outer: torch.Tensor

    @classmethod
    def of(cls, features: torch.Tensor) -> Moments:
        """Features (N, D)."""
        x = features.double()
        return cls(len(x), x.sum(0), x.T @ x)

    def __add__(self, other: Moments) -> Moments:
        return Moments(self.count + other.count, self.total + other.total, self.outer + other.outer)

    @property
    def mean(self) -> torch.Tensor:
        return self.total / self.count

    @property
    def covariance(self) -> torch.Tensor:
        """Of the sample, divided by N - 1."""
        return (self.outer - self.count * torch.outer(self.mean, self.mean)) / (self.count - 1)


def frechet(a: Moments, b: Moments) -> float:
    """|mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)), the root by symmetric eigenvalues; sharp for N > D."""
    left, right = a.covariance, b.covariance
    values, vectors = torch.linalg.eigh(left)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ right @ root).clamp(min=0).sqrt().sum()
    return float((a.mean - b.mean).square().sum() + left.trace() + right.trace() - 2 * cross)


def frechet_of(x: torch.Tensor, y: torch.Tensor) -> float:
    """The same of features (N, D), (M, D). With few pictures the root's trace is the nuclear norm of A B^T, with A, B
    the centred features over sqrt(n - 1): exact where the covariances are singular."""
    if min(len(x), len(y)) > x.shape[1]:
        return frechet(Moments.of(x), Moments.of(y))
    x, y = x.double(), y.double()
    a, b = ((v - v.mean(0)) / (len(v) - 1) ** 0.5 for v in (x, y))
    cross = torch.linalg.matrix_norm(a @ b.T, ord="nuc")
    return float((x.mean(0) - y.mean(0)).square().sum() + a.square().sum() + b.square().sum() - 2 * cross)


def kid_of(x: torch.Tensor, y: torch.Tensor, seed: int = 0) -> tuple[float, float]:
    """Mean and standard deviation over subsets of the unbiased MMD^2 with kernel (a.b / D + 1)^3."""
    size = min(SUBSET, len(x), len(y))
    draw = np.random.default_rng(seed)
    values = []
    for _ in range(SUBSETS):
        a = x[torch.from_numpy(draw.permutation(len(x))[:size])].double()
        b = y[torch.from_numpy(draw.permutation(len(y))[:size])].double()
        aa, bb, ab = ((u @ v.T / x.shape[1] + 1) ** 3 for u, v in ((a, a), (b, b), (a, b)))
        within = (aa.sum() - aa.trace() + bb.sum() - bb.trace()) / (size * (size - 1))
        values.append(float(within - 2 * ab.mean()))
    return float(np.mean(values)), float(np.std(values))


@dataclass(frozen=True)
class Raw:
    """uint8 pictures as they are; the network resizes."""

    size: int = 299

    @property
    def id(self) -> str:
        return "fidelity-299-tf1_bilinear-alpha_white"

    def crop(self, image: Image.Image) -> np.ndarray:
        return np.asarray(image)

    def normalise(self, crops: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(crops)).permute(0, 3, 1, 2)

    def tensor(self, images: torch.Tensor) -> torch.Tensor:
        return (images.clamp(0, 1) * 255).round().to(torch.uint8)


class InceptionDistance(SetMetric):
    """``load_set("fid=WEIGHTS.pth")(folder, reference=folder)``."""

    def load(self, source: str, device: str, dtype: str) -> None:
        extractor = _extractor()
        file = resolve_weights(source, self.name, ("*.pth",))
        note = check_known([file], self.name)
        self.device = resolve_device(device)
        with tempfile.TemporaryDirectory() as folder:
            # The package unpickles its file without weights_only; it gets one that was read with it.
            plain = Path(folder) / "weights.pth"
            torch.save(read_state(file, self.name), plain)
            try:
                self.network = extractor("inception", ["2048"], feature_extractor_weights_path=str(plain))
            except RuntimeError as error:
                raise UserError(
                    f"'{source}' does not fit torch-fidelity's Inception; take its release's file"
                ) from error
        self.network = self.network.to(self.device)
        self.fingerprint = {
            "scorer": self.name,
            "formula": f"{self.name} of inception 2048",
            "weights": weights_sha256([file]),
            "weights_note": note,
            "preprocess": Raw().id,
            "dtype": "fp32",
            "code": CODE_VERSION,
        }

    @property
    def pixels(self) -> Pixels:
        return Raw()

    def features(self, crops: np.ndarray) -> torch.Tensor:
        (features,) = self.network(Raw().normalise(crops).to(self.device))
        return features

    def measure(self, pictures: Gathered, reference: Gathered | None) -> SetResult:
        assert reference is not None
        x, y = pictures.features, reference.features
        if min(len(x), len(y)) < 2:
            raise UserError(f"set metric '{self.name}' needs at least two pictures on either side")
        if self.name == "fid":
            return SetResult("fid", frechet_of(x, y), len(x), len(y))
        value, spread = kid_of(x, y)
        return SetResult("kid", value, len(x), len(y), parts={"subset_std": spread})


def _extractor() -> Any:
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except (ImportError, RuntimeError) as error:
        raise UserError(
            f"fid and kid need torch-fidelity ({type(error).__name__}); pip install 'diffalign[fid]' with a "
            "torchvision that fits this torch"
        ) from error
    return FeatureExtractorInceptionV3
