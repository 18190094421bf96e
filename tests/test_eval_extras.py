"""FID, KID and LPIPS by their packages, with random weights. `make test-openclip` runs these."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from eval_tiny import golden
from PIL import Image

from diffalign.errors import UserError
from diffalign.eval.sets import load_set

if any(importlib.util.find_spec(name) is None for name in ("torch_fidelity", "lpips", "torchvision")):
    pytest.skip("the extras [fid] and [lpips] are not installed (make test-openclip)", allow_module_level=True)

import lpips
import torchvision
from torch_fidelity import feature_extractor_inceptionv3 as fidelity
from torch_fidelity.metric_kid import kernel_poly, mmd2


def noise(count: int, seed: int, low: int = 0, high: int = 256) -> list[Image.Image]:
    rng = np.random.default_rng(seed)
    return [Image.fromarray(rng.integers(low, high, (48, 64, 3), dtype=np.uint8)) for _ in range(count)]


@pytest.fixture(scope="module")
def inception(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights under the names of torch-fidelity's file."""
    file = tmp_path_factory.mktemp("inception") / "random.pth"
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        patch.setattr(fidelity.FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        patch.setattr(fidelity, "load_state_dict_from_url", lambda url, progress: {})
        torch.save(fidelity.FeatureExtractorInceptionV3("random", ["2048"]).state_dict(), file)
    return file


def test_fid_and_kid(inception: Path, tmp_path: Path) -> None:
    fid, kid = load_set(f"fid={inception}", device="cpu"), load_set(f"kid={inception}", device="cpu")
    bright, dark = noise(6, 0), noise(6, 1, high=100)
    assert abs(fid(bright, bright).value) < 1e-6
    apart, near = fid(bright, reference=dark).value, fid(bright, reference=noise(4, 2)).value
    assert apart > near > 0
    x, y = (kid.gather(p, None, 4).features.double().numpy() for p in (bright, dark))
    theirs = mmd2(
        *(
            kernel_poly(a, b, kid_kernel_poly_degree=3, kid_kernel_poly_gamma=None, kid_kernel_poly_coef0=1.0)
            for a, b in ((x, x), (x, y), (y, y))
        )
    )
    assert kid(bright, dark).value == pytest.approx(float(theirs), rel=1e-6)
    assert kid([*bright[:2], golden(33, 70)], dark).count == 3  # sizes may differ
    with pytest.raises(UserError, match="at least two"):
        fid(bright[:1], dark)
    torch.save({"x": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="does not fit"):
        load_set(f"fid={tmp_path / 'other.pth'}")
    (tmp_path / "weights-inception-2015-12-05-6726825d.pth").write_bytes((tmp_path / "other.pth").read_bytes())
    with pytest.raises(UserError, match="not the published"):
        load_set(f"fid={tmp_path / 'weights-inception-2015-12-05-6726825d.pth'}")


def test_lpips(tmp_path: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        torch.save(torchvision.models.alexnet(weights=None).state_dict(), tmp_path / "alexnet.pth")
    metric = load_set(f"lpips={tmp_path / 'alexnet.pth'}", device="cpu")
    pictures = noise(4, 0)
    found = metric(pictures, groups=["a", "a", "b", "b"])
    assert metric([pictures[0]] * 2, groups=[0, 0]).value == pytest.approx(0, abs=1e-7)
    assert found.value == pytest.approx(sum(found.by_group.values()) / 2) and found.value > 0
    crops = torch.from_numpy(np.stack([metric.pixels.crop(p) for p in pictures[:2]])).permute(0, 3, 1, 2) / 255
    theirs = float(metric.network(crops[:1], crops[1:], normalize=True))  # type: ignore[attr-defined]
    assert found.by_group["a"] == pytest.approx(theirs, rel=1e-5)
    assert isinstance(metric.network, lpips.LPIPS)  # type: ignore[attr-defined]
    torch.save({"x": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="no AlexNet"):
        load_set(f"lpips={tmp_path / 'other.pth'}")
