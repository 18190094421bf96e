"""LPIPS: the package's own numbers on the same weights, gradients, DMD's regression by it, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from world import Rows, batch_of, make_trainer

from diffalign import perceptual
from diffalign.data.teacher import teacher_noise
from diffalign.denoiser import Denoiser
from diffalign.errors import UserError
from diffalign.keyed import normal
from diffalign.methods import make_method
from diffalign.perceptual import LEVELS, WIDTHS, load_lpips


@pytest.fixture(scope="module")
def vgg(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights under torchvision's names, and even linear layers beside them."""
    trunk: dict[str, Tensor] = {}
    channels, place = 3, 0
    for number, width in enumerate(WIDTHS):
        if width:
            scale = (2 / (9 * channels)) ** 0.5
            trunk[f"features.{place}.weight"] = normal((width, channels, 3, 3), "vgg", number) * scale
            trunk[f"features.{place}.bias"] = 0.1 * normal((width,), "vgg-bias", number)
            channels = width
        place += 2 if width else 1
    folder = tmp_path_factory.mktemp("vgg")
    torch.save(trunk, folder / "vgg16.pth")
    even = {f"lin{k}.model.1.weight": torch.full((1, n, 1, 1), 1 / n) for k, n in enumerate(LEVELS)}
    torch.save(even, folder / "vgg.pth")
    return folder / "vgg16.pth"


def test_the_numbers_are_the_packages(vgg: Path) -> None:
    """Golden values: what the package lpips 0.1.4 says of these pictures with these weights."""
    network = load_lpips(str(vgg))
    a, b = (normal((2, 3, 48, 40), "picture", k).sigmoid() for k in "ab")
    assert network(a, b).tolist() == pytest.approx([0.017819490, 0.017861940], rel=1e-4)
    torch.testing.assert_close(network(a, b), network(b, a))
    black = torch.zeros(1, 3, 32, 32, requires_grad=True)
    network(black, a[:1, :, :32, :32]).sum().backward()
    assert black.grad is not None and bool(torch.isfinite(black.grad).all()) and bool(black.grad.any())
    assert not any(p.requires_grad for p in network.parameters()) and not bool(network(a, a).any())


class TeacherRows(Rows):
    def __init__(self) -> None:
        super().__init__(kind="image")
        self.ids = [f"teacher|0|0|{i}" for i in range(len(self.ids))]


def test_dmd_regresses_on_pictures(vgg: Path) -> None:
    """Beside matching, which is 0 while the scores are one: LPIPS of both pictures, and it moves the student."""
    options = {"guidance": 1.0, "regression": "lpips", "lpips": str(vgg), "regression_weight": 0.5}
    method = make_method("dmd", options)
    trainer = make_trainer(method, rows=TeacherRows())
    ctx, batch = trainer.ctx, batch_of(trainer, [0, 1])
    ctx.phase = "student"
    trainer.roles.train_only(("student",))
    loss = method.loss(ctx, batch, method.phases[0])
    with torch.no_grad():
        noise = teacher_noise(batch.ids, (4, 8, 8))
        x = method.call_student(ctx, noise, torch.full((2,), 999), batch.cond["prompt"])[0]
        expected = load_lpips(str(vgg))(ctx.decode(x), ctx.decode(batch.latents["image"]))
    torch.testing.assert_close(loss.metrics["regression"], expected, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(loss.values.detach(), 0.5 * expected, rtol=1e-3, atol=1e-5)
    loss.values.sum().backward()
    assert any(p.grad is not None and bool(p.grad.any()) for p in trainer.roles.parameters("student"))
    assert method.needs.decode and not any("perceptual" in role for role in method.roles)


def test_what_is_absent_is_named(vgg: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValidationError, match=r"vgg16-397923af.pth, and pip install lpips"):
        make_method("dmd", {"regression": "lpips"})
    denoiser = Denoiser.from_config({})
    monkeypatch.setattr(perceptual, "find_spec", lambda name: None)
    (tmp_path / "alone.pth").write_bytes(vgg.read_bytes()[:100])
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "vgg16.pth").write_bytes(vgg.read_bytes()[:100])
    (tmp_path / "torn" / "vgg.pth").write_bytes(vgg.with_name("vgg.pth").read_bytes())
    for file, said in (
        (tmp_path / "none.pth", "there is no file"),
        (tmp_path / "alone.pth", "pip install lpips, or put its weights/v0.1/vgg.pth beside"),
        (tmp_path / "torn" / "vgg16.pth", "holds no plain tensors"),
        (vgg.with_name("vgg.pth"), "is no VGG16 of torchvision"),
    ):
        with pytest.raises(UserError, match=said) as caught:
            make_method("dmd", {"regression": "lpips", "lpips": str(file)}).check(denoiser)
        assert "\n" not in str(caught.value)
    make_method("dmd", {"regression": "lpips", "lpips": "none", "regression_weight": 0.0}).check(denoiser)  # not asked
    with pytest.raises(UserError, match=r"feature_time 5000 is beyond"):
        make_method("dmd", {"feature_time": 5000}).check(denoiser)
