"""Against open_clip and torchvision themselves: pixels, token ids, features by the key map. `make test-openclip`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision_hook
from eval_tiny import AWKWARD_SIZES, AWKWARD_TEXTS, golden, write_tiny_openclip
from PIL import Image

from diffalign.errors import UserError
from diffalign.eval.preprocess import CLIP_MEAN, CLIP_STD, P1, P2
from diffalign.eval.scorers import load_scorer
from diffalign.eval.scorers._text import clip_tokenizer, openclip_clean

if not torchvision_hook.load():
    pytest.skip("the extra [openclip] is not installed (make test-openclip)", allow_module_level=True)

import open_clip
from torchvision.transforms import v2 as transforms
from torchvision.transforms.functional import InterpolationMode, pad, resize, to_tensor

TINY_TEXTS = ["a cat", "two dogs", "x", "a red circle above a blue square", "hello"]


@pytest.mark.parametrize("size", AWKWARD_SIZES)
def test_crop_is_torchvisions(size: tuple[int, int]) -> None:
    picture = golden(*size)
    theirs = open_clip.image_transform(224, is_train=False, mean=CLIP_MEAN, std=CLIP_STD)(picture)
    assert torch.equal(P1(rounding="torchvision")([picture])[0], theirs)
    plain = transforms.Compose([transforms.Resize(224, InterpolationMode.BICUBIC), transforms.CenterCrop(224)])(picture)
    assert np.array_equal(np.asarray(plain), P1(rounding="torchvision").crop(picture))


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("size", AWKWARD_SIZES)
def test_letterbox_is_hpsv2s(size: tuple[int, int], antialias: bool) -> None:
    picture = golden(*size)
    pixels = to_tensor(picture)
    height, width = size
    scale = 224 / float(max(height, width))
    if scale != 1:
        shape = [round(height * scale), round(width * scale)]
        pixels = resize(pixels, shape, interpolation=InterpolationMode.BICUBIC, antialias=antialias)
    down, across = 224 - pixels.shape[1], 224 - pixels.shape[2]
    pixels = pad(pixels, [across // 2, down // 2, across - across // 2, down - down // 2], fill=0)
    theirs = transforms.Normalize(mean=list(CLIP_MEAN), std=list(CLIP_STD))(pixels)
    assert torch.equal(P2(antialias=antialias)([picture])[0], theirs)


def test_hpsv2s_letterbox_as_open_clip_ships_it() -> None:
    """open_clip's own 'longest' mode pads before it normalises as HPSv2 does; it works on the uint8 picture, so it is
    close and not equal."""
    picture = golden(300, 451)
    theirs = open_clip.image_transform(224, is_train=False, mean=CLIP_MEAN, std=CLIP_STD, resize_mode="longest")(
        picture
    )
    assert float((P2()([picture])[0] - theirs).abs().mean()) < 0.02


@pytest.mark.parametrize("text", AWKWARD_TEXTS)
def test_token_ids_are_open_clips(text: str) -> None:
    theirs = open_clip.get_tokenizer("ViT-H-14")([text])[0].tolist()
    ours = clip_tokenizer()(openclip_clean(text), truncation=True, max_length=77).input_ids
    assert ours == theirs[: len(ours)] and not any(theirs[len(ours) :])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_openclip(tmp_path_factory.mktemp("openclip"))


def open_clip_model(folder: Path) -> torch.nn.Module:
    return open_clip.create_model(f"local-dir:{folder}").eval()


@pytest.mark.parametrize("quick", [False, True])
def test_key_map_gives_open_clips_features(folder: Path, tmp_path: Path, quick: bool) -> None:
    theirs = open_clip_model(folder)
    assert set(theirs.state_dict()) == set(torch.load(folder / "open_clip_pytorch_model.bin", weights_only=True))
    if quick:
        stated = json.loads((folder / "open_clip_config.json").read_text())
        stated["model_cfg"]["quick_gelu"] = True
        folder = write_tiny_openclip(tmp_path)
        (folder / "open_clip_config.json").write_text(json.dumps(stated))
        theirs = open_clip_model(folder)
    ours = load_scorer("hps", str(folder), device="cpu")
    pictures, pixels = [golden(*s) for s in [(40, 40), (33, 70), (90, 41)]], P2(32)
    with torch.no_grad():
        image = theirs.encode_image(pixels(pictures), normalize=True)
        ids = torch.zeros(3, 40, dtype=torch.long)
        for row, text in zip(ids, TINY_TEXTS, strict=False):
            one = torch.tensor(ours.tokenizer(openclip_clean(text)).input_ids)
            row[: len(one)] = one
        text = theirs.encode_text(ids, normalize=True)
    assert torch.allclose(ours.embed_pixels(pixels(pictures)), image, atol=1e-6)
    assert torch.allclose(ours.embed_texts(TINY_TEXTS[:3]), text, atol=1e-6)
    assert torch.allclose(ours(pictures, TINY_TEXTS[:3]) / 100, (image * text).sum(1), atol=1e-6)
    assert float((image[0] - image[1]).abs().max()) > 1e-2


def test_vit_h14_has_the_published_keys() -> None:
    from diffalign.eval.scorers._openclip import from_openclip

    with torch.device("meta"):
        state = open_clip.model.CLIP(**open_clip.get_model_config("ViT-H-14")).state_dict()
    assert len(state) == 686 and sum(v.numel() for v in state.values()) == 986_109_441
    from transformers import CLIPModel

    from diffalign.eval.scorers._openclip import config_of

    config = config_of(state, "gelu")
    with torch.device("meta"):
        want = {k: v.shape for k, v in CLIPModel(config).state_dict().items() if not k.endswith("position_ids")}
    assert {k: v.shape for k, v in from_openclip(state).items()} == want
    vision = config.vision_config
    assert (vision.num_attention_heads, vision.num_hidden_layers, vision.image_size) == (16, 32, 224)


def test_openclip_scorer_and_the_key_map_agree(folder: Path) -> None:
    by_package, by_map = (
        load_scorer("openclip", str(folder), device="cpu"),
        load_scorer("clip", str(folder), device="cpu"),
    )
    pictures = [golden(*s) for s in [(40, 40), (33, 70), (91, 41), (32, 32), (35, 32)]]
    # The tiny folder has no open_clip vocabulary of its own: the package would use its 49,408 tokens. Compare pixels.
    ours = by_map.embed_pixels(by_map.pixels.normalise(np.stack([by_map.prepare(p) for p in pictures])))
    theirs = by_package.embed_pixels(by_package.pixels.normalise(np.stack([by_package.prepare(p) for p in pictures])))
    assert torch.allclose(ours, theirs, atol=1e-6)
    assert by_map.preprocess_id.startswith("p1-32-torchvision") and "shortest" in by_package.preprocess_id


def test_a_stock_architecture_scores(tmp_path: Path) -> None:
    """ViT-S-32-alt, random: the package's scorer and the map on one file, texts included."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = open_clip.create_model("ViT-S-32-alt")
    torch.save({"state_dict": model.state_dict()}, tmp_path / "small.pt")
    texts = ["a corgi’s head", "salt &amp; pepper", "x"]
    pictures = [golden(300, 300), golden(300, 451), golden(227, 224)]
    package = load_scorer("openclip", f"{tmp_path / 'small.pt'}@ViT-S-32-alt", device="cpu")
    scores = package(pictures, texts)
    by_map = load_scorer("hps", str(tmp_path / "small.pt"), device="cpu")
    assert torch.allclose(by_map.embed_texts(texts), package.embed_texts(texts), atol=1e-6)
    by_map.pixels = P1(rounding="torchvision")
    assert torch.allclose(by_map(pictures, texts), scores, atol=1e-4)  # on a scale of 100
    assert package.truncated(["x " * 80, "x"]) == [True, False]
    images = torch.rand(2, 3, 64, 80, requires_grad=True)
    package.reward(images, "x").sum().backward()
    assert images.grad is not None and float(images.grad.abs().sum()) > 0


def test_wrong_architecture_is_one_line(folder: Path, tmp_path: Path) -> None:
    file = folder / "open_clip_pytorch_model.bin"
    for given, says in [
        (file, "architecture"),
        (f"{file}@ViT-Z-9", "no architecture"),
        (f"{file}@ViT-B-32", "cannot load"),
    ]:
        with pytest.raises(UserError, match=says) as found:
            load_scorer("openclip", str(given), device="cpu")
        assert "\n" not in str(found.value)


def test_hugging_faces_torchvision_pixels_are_within_a_level() -> None:
    from transformers import CLIPImageProcessor

    picture = Image.fromarray(np.asarray(golden(300, 451)))
    theirs = CLIPImageProcessor()(picture, return_tensors="pt").pixel_values[0]
    assert float((P1()([picture])[0] - theirs).abs().mean()) < 1e-3
