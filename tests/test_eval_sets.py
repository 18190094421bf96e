"""Set metrics: identities 23-25 of spec/evaluators.md 16, golden values, folders and groups."""

from __future__ import annotations

import io
import math
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from eval_tiny import golden, write_samples, write_tiny_clip
from PIL import Image

from diffalign.errors import UserError
from diffalign.eval.preprocess import P1, decode
from diffalign.eval.sets import list_sets, load_set
from diffalign.eval.sets.cmmd import Square, cmmd
from diffalign.eval.sets.diversity import pairwise_diversity, vendi_score
from diffalign.eval.sets.fid import Moments, frechet, frechet_of, kid_of


def normal(count: int, width: int, seed: int) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def unit(count: int, width: int, seed: int) -> torch.Tensor:
    return torch.nn.functional.normalize(normal(count, width, seed), dim=1)


def whitened(count: int, width: int, seed: int) -> torch.Tensor:
    """Exactly mean 0 and sample covariance 1."""
    x = normal(count, width, seed)
    x = x - x.mean(0)
    values, vectors = torch.linalg.eigh(x.T @ x / (count - 1))
    return x @ (vectors / values.sqrt()) @ vectors.T


def test_listing_imports_no_torch() -> None:
    code = (
        "import sys; from diffalign.eval.sets import list_sets; print(*list_sets()); assert 'torch' not in sys.modules"
    )
    names = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert {"fid", "kid", "cmmd", "diversity_clip", "vendi", "lpips"} <= set(names)
    assert {s.needs for s in list_sets().values()} == {"reference", "groups"}


def test_frechet_closed_form_and_forms_agree() -> None:
    x = whitened(200, 64, 0)
    y = whitened(300, 64, 1) * 1.7 + 0.3
    closed = 64 * (0.3**2 + (1 - 1.7) ** 2)
    assert closed == pytest.approx(37.12)
    assert frechet(Moments.of(x), Moments.of(y)) == pytest.approx(closed, abs=1e-9)
    a, b = normal(150, 16, 2), normal(120, 16, 3) @ normal(16, 16, 4) + 1
    by_eigh = frechet(Moments.of(a), Moments.of(b))
    centred = [(v - v.mean(0)) / math.sqrt(len(v) - 1) for v in (a, b)]
    nuclear = torch.linalg.matrix_norm(centred[0] @ centred[1].T, ord="nuc")
    product = torch.linalg.eigvals(torch.cov(a.T) @ torch.cov(b.T)).sqrt().real.sum()
    rest = (a.mean(0) - b.mean(0)).square().sum() + torch.cov(a.T).trace() + torch.cov(b.T).trace()
    assert by_eigh == pytest.approx(float(rest - 2 * nuclear), rel=1e-9)
    assert by_eigh == pytest.approx(float(rest - 2 * product), rel=1e-9)


def test_frechet_identities() -> None:
    x, y = normal(300, 32, 0), normal(250, 32, 1) * 1.2 + 0.1
    assert abs(frechet_of(x, x)) <= 1e-9
    assert frechet_of(x, y) == pytest.approx(frechet_of(y, x), abs=1e-9)
    turn = torch.linalg.qr(normal(32, 32, 2)).Q
    assert frechet_of(x @ turn + 5, y @ turn + 5) == pytest.approx(frechet_of(x, y), abs=1e-7)
    parts = Moments.of(x[:70]) + Moments.of(x[70:200]) + Moments.of(x[200:])
    assert frechet(parts, Moments.of(y)) == pytest.approx(frechet_of(x, y), abs=1e-9)
    few, others = normal(20, 64, 3), normal(25, 64, 4)  # singular covariances
    assert abs(frechet_of(few, few)) <= 1e-9
    assert frechet_of(few, others) == pytest.approx(frechet(Moments.of(few), Moments.of(others)), abs=1e-4)
    small, large = (frechet_of(normal(n, 64, 5), normal(n, 64, 6)) for n in (200, 2000))
    assert small == pytest.approx(11.1, abs=0.7) and large == pytest.approx(1.1, abs=0.1)  # the bias, sheet 8


def test_kid_is_unbiased_and_by_hand() -> None:
    x, y = normal(40, 8, 0), normal(40, 8, 1) + 0.5
    kernel = lambda a, b: (float(a @ b) / 8 + 1) ** 3  # noqa: E731
    within = sum(kernel(v[i], v[j]) for v in (x, y) for i in range(40) for j in range(40) if i != j) / (40 * 39)
    across = sum(kernel(a, b) for a in x for b in y) / 1600
    value, spread = kid_of(x, y)
    assert value == pytest.approx(within - 2 * across, rel=1e-9) and spread == pytest.approx(0, abs=1e-9)
    same = [kid_of(normal(100, 8, 2 * s), normal(100, 8, 2 * s + 1))[0] for s in range(30)]
    assert abs(np.mean(same)) < 3 * np.std(same) / math.sqrt(30)


def test_cmmd_identities() -> None:
    x, y = unit(60, 24, 0), unit(50, 24, 1)
    y = torch.nn.functional.normalize(y + 0.3, dim=1)
    assert abs(cmmd(x, x)) < 1e-9 and cmmd(x, y) == pytest.approx(cmmd(y, x), abs=1e-9)
    near = 10 * float((x.mean(0) - y.mean(0)).square().sum())
    assert cmmd(x, y) == pytest.approx(near, rel=0.02) and cmmd(x, y) > 0.1
    ends = torch.zeros(5, 24, dtype=torch.float64)
    ends[:, 0] = 1
    bound = 2000 * (1 - math.exp(-0.02))
    assert cmmd(ends, -ends) == pytest.approx(bound, abs=1e-6) and bound == pytest.approx(39.6, abs=0.01)
    by_hand = 1000 * sum(
        sign * float(torch.exp(-torch.cdist(a, b).square() / 200).mean())
        for sign, a, b in [(1, x, x), (1, y, y), (-2, x, y)]
    )
    assert cmmd(x, y) == pytest.approx(by_hand, abs=1e-6)
    from diffalign.eval.sets import cmmd as module

    whole, module.CHUNK = cmmd(x, y), 7
    try:
        assert cmmd(x, y) == pytest.approx(whole, abs=1e-9)
    finally:
        module.CHUNK = 1024


def test_cmmd_pixels_take_the_square_first() -> None:
    picture = golden(50, 91)
    square = picture.crop((20, 0, 70, 50))
    assert np.array_equal(Square(32).crop(picture), P1(32).crop(square))
    assert not np.array_equal(Square(32).crop(picture), P1(32).crop(picture)) and Square(32).id != P1(32).id


def test_diversity_identities() -> None:
    e = unit(6, 16, 0)
    pairs = [float(e[i] @ e[j]) for i in range(6) for j in range(i)]
    assert pairwise_diversity(e) == pytest.approx(1 - np.mean(pairs), abs=1e-12)
    copies, apart = e[:1].repeat(5, 1), torch.eye(5, dtype=torch.float64)
    assert pairwise_diversity(copies) == pytest.approx(0, abs=1e-12) and vendi_score(copies) == pytest.approx(1)
    assert pairwise_diversity(apart) == pytest.approx(1) and vendi_score(apart) == pytest.approx(5)
    half = torch.cat([apart[:1].repeat(2, 1), apart[1:2].repeat(2, 1)])
    assert vendi_score(half) == pytest.approx(2) and 1 < vendi_score(e) < 6
    cosine = 0.5
    two = torch.tensor([[1.0, 0.0], [cosine, math.sqrt(1 - cosine**2)]], dtype=torch.float64)
    p = (1 + cosine) / 2  # eigenvalues p and 1 - p
    assert vendi_score(two) == pytest.approx(math.exp(-p * math.log(p) - (1 - p) * math.log(1 - p)))


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_clip(tmp_path_factory.mktemp("clip"))


def test_a_picture_that_is_opened_once_is_read_by_many_threads() -> None:
    noise = np.random.default_rng(0).integers(0, 255, (256, 256, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "PNG")
    for _ in range(20):  # without the lock nearly every round fails
        opened = Image.open(io.BytesIO(file.getvalue()))
        with ThreadPoolExecutor(8) as pool:
            assert all(np.array_equal(found.image, noise) for found in pool.map(decode, [opened] * 16))


def test_diversity_of_a_folder(clip: Path, tmp_path: Path) -> None:
    folder = write_samples(tmp_path / "a", ["a", "b", "c"], per_prompt=4)
    metric = load_set(f"diversity_clip={clip}", device="cpu")
    found = metric(folder)
    assert set(found.by_group) == {"p000", "p001", "p002"} and found.count == 12 and not found.errors
    assert found.value == pytest.approx(np.mean(list(found.by_group.values())))
    assert found.fingerprint["scorer"] == "diversity_clip" and found.fingerprint["weights"]
    paths = sorted((folder / "images").iterdir())
    assert metric(paths, groups=[p.name[:6] for p in paths], batch=5).value == pytest.approx(found.value, abs=1e-6)
    alike = [Image.open(paths[0])] * 3
    assert metric(alike, groups=[0] * 3).value == pytest.approx(0, abs=1e-6)
    vendi = load_set("vendi", str(clip), device="cpu")
    assert vendi(alike, groups=[0] * 3).value == pytest.approx(1, abs=1e-4)
    assert 1 < vendi(folder).value < 4
    paths[1].write_bytes(b"torn")
    again = metric(folder)
    assert again.count == 11 and len(again.errors) == 1 and paths[1].name in again.errors[0][0]
    with pytest.raises(UserError, match="give groups"):
        metric(paths[2:])
    with pytest.raises(UserError, match="two pictures"):
        metric([golden(32, 32)], groups=["x"])
    with pytest.raises(UserError, match="takes no reference"):
        metric(folder, reference=folder)


def test_cmmd_of_folders(clip: Path, tmp_path: Path) -> None:
    a, b = (write_samples(tmp_path / str(s), ["a", "b", "c", "d"], salt=s) for s in (0, 1))
    metric = load_set(f"cmmd={clip}", device="cpu")
    assert metric(a, a).value == pytest.approx(0, abs=1e-6)
    dark = [Image.new("RGB", (40, 50), (10, 10, 10)) for _ in range(4)]
    found = metric(a, reference=b)
    assert metric(dark, b).value > found.value > 0 and (found.count, found.reference_count) == (4, 4)
    with pytest.raises(UserError, match="needs reference"):
        metric(a)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no images"):
        metric(tmp_path / "empty", a)


def test_names() -> None:
    for name, says in [("fdi", "unknown set metric"), ("fid", "needs its weights"), ("cmmd=/nowhere", "do not exist")]:
        with pytest.raises(UserError, match=says):
            load_set(name)
