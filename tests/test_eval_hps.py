"""HPS and what came with it: OpenCLIP files by key map, the letterbox, OpenCLIP's text, Hessel's CLIPScore, flags."""

from __future__ import annotations

import hashlib
import json
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import torch
from eval_tiny import AWKWARD_SIZES, golden, write_tiny_clip, write_tiny_openclip
from PIL import Image
from transformers import CLIPConfig, CLIPModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from diffalign.errors import UserError
from diffalign.eval.preprocess import CLIP_MEAN, CLIP_STD, P1, P2
from diffalign.eval.scorers import load_scorer
from diffalign.eval.scorers._openclip import from_openclip, to_openclip
from diffalign.eval.scorers._text import VOCABULARY, clip_tokenizer, openclip_clean
from diffalign.eval.scorers.clip import Clip
from diffalign.eval.scorers.hps import HPS

PROMPTS = ["a cat", "two dogs", "x", "a red circle above a blue square", "hello"]
# (height, width): mean, min, max, pixel [0, 112, 112] in [0, 1], with antialias and without (spec/evaluators.md 19)
LETTERBOX = {
    (512, 512): ((0.497925, -0.03137, 1.02899, 0.10943), (0.498177, -0.18619, 1.19196, -0.04555)),
    (768, 512): ((0.331477, -0.00813, 1.01980, 0.64387), (0.331600, -0.18689, 1.18475, 0.64621)),
    (227, 224): ((0.486968, -0.10873, 1.11422, 0.84385), (0.486998, -0.17968, 1.18446, 0.84367)),
    (300, 451): ((0.330251, -0.03195, 1.04575, 0.92018), (0.330144, -0.18437, 1.18748, 0.87725)),
}
# sum and sha256[:12] of the crop with torchvision's rounding and with the floor; mean of the former, normalised
CROP = {
    (512, 512): (19108009, "f5c00bf1c11a", 19108009, "f5c00bf1c11a", 0.179364),
    (768, 512): (19150720, "722aa1ff0233", 19150720, "722aa1ff0233", 0.183623),
    (227, 224): (19002904, "1e9669109959", 18974194, "7ef104ed6286", 0.168939),
    (300, 451): (19128868, "2c091f1b3e3b", 19128868, "2c091f1b3e3b", 0.181437),
}
TOKENS = {  # OpenCLIP's cleaning, and the tokenizer alone as Hugging Face has it
    "a cat": ([320, 2368], None),
    "A photo depicts a cat": ([320, 1125, 29340, 320, 2368], None),
    "  Two   CATS!! ": ([1237, 3989, 748], None),
    "café ☃": ([15304, 1741, 481], None),
    "a corgi’s head": ([320, 31320, 568, 1375], [320, 31320, 728, 503, 338, 1375]),
    "salt &amp; pepper": ([6611, 261, 8253], [6611, 261, 6259, 282, 8253]),
}


@pytest.mark.parametrize("size", LETTERBOX)
def test_letterbox_has_the_golden_values(size: tuple[int, int]) -> None:
    for antialias, wanted in zip((True, False), LETTERBOX[size], strict=True):
        pixels = P2(antialias=antialias).crop(golden(*size))
        have = (pixels.mean(), pixels.min(), pixels.max(), pixels[0, 112, 112])
        assert pixels.shape == (3, 224, 224) and have == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize("size", CROP)
def test_crop_has_the_golden_values(size: tuple[int, int]) -> None:
    total, sha, floor_total, floor_sha, mean = CROP[size]
    for rounding, want_sum, want_sha in (("torchvision", total, sha), ("hf", floor_total, floor_sha)):
        pixels = P1(rounding=rounding).crop(golden(*size))  # type: ignore[arg-type]
        assert int(pixels.astype(np.int64).sum()) == want_sum
        assert hashlib.sha256(np.ascontiguousarray(pixels).tobytes()).hexdigest()[:12] == want_sha
    assert float(P1(rounding="torchvision")([golden(*size)]).mean()) == pytest.approx(mean, abs=1e-6)


@pytest.mark.parametrize("size", AWKWARD_SIZES)
def test_crop_is_transformers_own(size: tuple[int, int]) -> None:
    theirs = CLIPImageProcessorPil()(golden(*size), return_tensors="np").pixel_values[0]
    assert np.array_equal(P1()([golden(*size)])[0].numpy(), np.asarray(theirs, np.float32))


def test_letterbox_by_hand() -> None:
    black = -(torch.tensor(CLIP_MEAN) / torch.tensor(CLIP_STD))
    for size in (
        (100, 50),
        (97, 31),
        (451, 300),
        (300, 451),
        (224, 112),
        (40, 224),
    ):  # a long side of 224 already is padded as well
        pixels = P2()([golden(*size)])[0]
        height, width = (round(side * 224 / max(size)) for side in size)
        top, left = (224 - height) // 2, (224 - width) // 2
        lit = ~torch.isclose(pixels, black[:, None, None], atol=1e-5).all(0)
        rows, columns = (torch.arange(224)[lit.any(1 - axis)].tolist() for axis in (0, 1))
        assert (rows[0], rows[-1] + 1, columns[0], columns[-1] + 1) == (top, top + height, left, left + width)
    exact = np.asarray(golden(224, 100)).transpose(2, 0, 1) / np.float32(255)
    assert np.array_equal(P2().crop(golden(224, 100))[:, :, 62:162], exact)
    assert np.array_equal(P2().crop(golden(224, 224)), P2(antialias=False).crop(golden(224, 224)))
    assert not np.array_equal(P2().crop(golden(300, 300)), P2(antialias=False).crop(golden(300, 300)))
    grey = P2()([Image.new("RGB", (333, 333), (90, 90, 90))])[0]
    assert torch.allclose(grey, grey[:, :1, :1].expand_as(grey), atol=1e-5)
    assert P2().crop(golden(2000, 3)).shape == (3, 224, 224)
    assert P2().id != P2(antialias=False).id


@pytest.mark.parametrize("text", TOKENS)
def test_token_ids(text: str) -> None:
    ours, plain = TOKENS[text]
    assert clip_tokenizer()(openclip_clean(text)).input_ids == [49406, *ours, 49407]
    assert clip_tokenizer()(text).input_ids == [49406, *(plain or ours), 49407]
    raw = resources.files("diffalign.eval.scorers").joinpath(VOCABULARY).read_bytes()
    assert hashlib.sha256(raw).hexdigest().startswith("924691ac") and len(clip_tokenizer()) == 49408


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_openclip(tmp_path_factory.mktemp("openclip"))


@pytest.fixture(scope="module")
def hps(folder: Path) -> HPS:
    scorer = load_scorer("hps", str(folder), device="cpu")
    assert isinstance(scorer, HPS)
    return scorer


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    return [golden(*size) for size in [(40, 40), (32, 32), (33, 70), (90, 41), (227, 224)]]


def test_key_map_there_and_back(folder: Path) -> None:
    state = CLIPModel.from_pretrained(folder / "plain").state_dict()
    there = to_openclip(state)
    assert all(k.startswith(("visual.", "transformer.")) or "." not in k or "weight" in k or "bias" in k for k in there)
    back = from_openclip(there)
    assert set(back) == {k for k in state if not k.endswith("position_ids")}
    assert all(torch.equal(back[k], state[k]) for k in back)
    with pytest.raises(ValueError, match=r"visual\.trunk"):
        from_openclip({**there, "visual.trunk.weight": torch.zeros(1)})


def test_hps_is_hundred_cosine_of_the_plain_model(hps: HPS, folder: Path, pictures: list[Image.Image]) -> None:
    config = CLIPConfig.from_pretrained(folder / "plain")
    config.vision_config.hidden_act = config.text_config.hidden_act = "gelu"  # what open_clip_config.json says
    model = CLIPModel.from_pretrained(folder / "plain", config=config).eval()
    tokens = hps.tokenizer([openclip_clean(p) for p in PROMPTS], padding="max_length", return_tensors="pt")
    with torch.no_grad():
        out = model(pixel_values=P2(32)(pictures), input_ids=tokens.input_ids)
    cosine = torch.nn.functional.cosine_similarity(out.image_embeds, out.text_embeds)
    scores = hps(pictures, PROMPTS)
    assert torch.allclose(scores / 100, cosine, atol=1e-6) and float(scores.std()) > 1
    alone = torch.cat([hps(p, t) for p, t in zip(pictures, PROMPTS, strict=True)])
    assert torch.allclose(scores, alone, atol=1e-4)
    assert hps.picture_flags(40, 40) == () and hps.picture_flags(41, 40) == ("letterboxed",)
    assert hps.clean == "openclip" and hps.preprocess_id == P2(32).id and hps.note == "letterbox with antialias"


def test_cleaning_decides_what_is_read(hps: HPS, folder: Path) -> None:
    straight, curly = hps.embed_texts(["a corgi's head", "a corgi’s   HEAD"])
    assert torch.equal(straight, curly)
    plain = load_scorer("pickscore", str(folder / "plain"), device="cpu")
    straight, curly = plain.embed_texts(["a corgi's head", "a corgi’s head"])  # type: ignore[attr-defined]
    assert float((straight - curly).abs().max()) > 1e-3


def test_files_of_every_kind_load_alike(hps: HPS, folder: Path, tmp_path: Path, pictures: list[Image.Image]) -> None:
    from safetensors.torch import save_file

    want, state = hps(pictures, PROMPTS), torch.load(folder / "open_clip_pytorch_model.bin", weights_only=True)
    for name in ("open_clip_config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_text((folder / name).read_text())
    file = tmp_path / "HPS.pt"
    torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}, "epoch": 3}, file)
    assert torch.equal(load_scorer("hps", str(tmp_path), device="cpu")(pictures, PROMPTS), want)
    file.unlink()
    save_file(state, tmp_path / "open_clip_model.safetensors")
    assert torch.equal(load_scorer("hps", str(tmp_path), device="cpu")(pictures, PROMPTS), want)
    as_clip = load_scorer("clip", str(tmp_path), device="cpu")
    assert isinstance(as_clip, Clip) and as_clip.preprocess_id.startswith("p1-32-torchvision")
    assert as_clip.clean == "openclip"
    assert torch.allclose(as_clip(pictures[1], "x"), want[:0].new_tensor([float(hps(pictures[1], "x"))]), atol=1e-4)


def test_a_bare_file_with_clips_own_vocabulary(tmp_path: Path) -> None:
    """As HPS_v2.1_compressed.pt comes: fp16, no config, no tokenizer; head widths by the published rule."""
    folder = write_tiny_openclip(tmp_path)
    state = torch.load(folder / "open_clip_pytorch_model.bin", weights_only=True)
    state["token_embedding.weight"] = torch.randn(49408, 16) * 0.25
    (tmp_path / "bare").mkdir()
    file = tmp_path / "bare" / "HPS.pt"
    torch.save({"state_dict": {k: v.half() for k, v in state.items()}}, file)
    scorer = load_scorer("hps", str(file), device="cpu")
    assert isinstance(scorer, HPS) and scorer.model.config.text_config.hidden_act == "gelu"
    assert scorer.model.dtype == torch.float32 and len(scorer.tokenizer) == 49408
    assert bool(torch.isfinite(scorer(golden(50, 40), "a corgi’s head")).all())
    assert scorer.truncated(["word " * 38, "word " * 39]) == [False, True]
    assert scorer.weights_note == "unknown hash: not checked"
    with pytest.raises(UserError, match="does not say its activation"):
        load_scorer("clip", str(file))
    with pytest.raises(UserError, match="not what 'hpsv21' stands for"):
        load_scorer("hpsv21", str(file))
    with pytest.raises(UserError, match="49408 tokens, its tokenizer"):
        (tmp_path / "bare" / "tokenizer.json").write_text((folder / "tokenizer.json").read_text())
        (tmp_path / "bare" / "tokenizer_config.json").write_text((folder / "tokenizer_config.json").read_text())
        load_scorer("hps", str(tmp_path / "bare"))


def test_reward_goes_through_the_letterbox(hps: HPS) -> None:
    images = torch.rand(3, 3, 48, 30, generator=torch.Generator().manual_seed(0)).mul(255).round().div(255)
    live = images.clone().requires_grad_()
    reward = hps.reward(live, PROMPTS[:3])
    assert torch.allclose(reward.detach(), hps(images, PROMPTS[:3]), atol=1e-4)  # the same arithmetic, resize included
    reward.sum().backward()
    assert live.grad is not None and bool((live.grad.flatten(1).abs().sum(1) > 0).all())
    direction = torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        slope = (
            hps.reward(images + 1e-3 * direction, PROMPTS[:3]) - hps.reward(images - 1e-3 * direction, PROMPTS[:3])
        ) / 2e-3
    along = (live.grad * direction).flatten(1).sum(1)
    assert torch.allclose(slope, along, rtol=0.05, atol=0.5)


def test_no_antialias_is_another_scorer(hps: HPS, folder: Path, pictures: list[Image.Image]) -> None:
    from diffalign.eval.scorers._clip import load_towers

    rough = HPS(
        load_towers(folder, "hpsv21_noaa", activation="gelu"), torch.device("cpu"), torch.float32, "hpsv21_noaa"
    )
    assert rough.preprocess_id == P2(32, antialias=False).id and "without" in rough.note
    scores, smooth = rough(pictures, PROMPTS), hps(pictures, PROMPTS)
    assert float(abs(scores[1] - smooth[1])) < 1e-4  # 32 x 32: no resize
    assert float((scores - smooth)[[0, 2, 3, 4]].abs().min()) > 1e-3


def test_hessels_clipscore(tmp_path: Path, pictures: list[Image.Image]) -> None:
    from diffalign.eval.scorers._clip import load_towers

    folder = write_tiny_clip(tmp_path)
    plain = Clip.from_pretrained(folder, device="cpu", name="clip")
    original = Clip(load_towers(folder, "clip"), torch.device("cpu"), torch.float32, "clipscore_hessel")
    prompts = ["a cat", "cafe", "x", "ab", "hello"]
    cosine = plain(pictures[:2], [f"A photo depicts {p}" for p in prompts[:2]]) / 100
    assert torch.allclose(original(pictures[:2], prompts[:2]), 2.5 * cosine.clamp(min=0), atol=1e-6)
    many = original(pictures * 5, [p for p in prompts for _ in pictures])
    signed = plain(pictures * 5, [f"A photo depicts {p}" for p in prompts for _ in pictures])
    assert float(many.min()) == 0 and float(many.max()) > 0 and bool(((signed < -1) <= (many == 0)).all())
    assert original.preprocess_id == "p1-32-torchvision-bicubic-alpha_white" and original.formula == "2.5*max(cos,0)"
    assert original.truncated(["x" * 25, "x" * 26]) == [False, True]  # the prefix takes 13 of 40 tokens
    with pytest.raises(UserError, match="not what 'clipscore_hessel' stands for"):
        load_scorer("clipscore_hessel", str(folder))


def test_wrong_files_are_refused_in_one_line(folder: Path, tmp_path: Path) -> None:
    torn = tmp_path / "torn.pt"
    torn.write_bytes((folder / "open_clip_pytorch_model.bin").read_bytes()[:2000])
    other, code = tmp_path / "other.pt", tmp_path / "code.pt"
    torch.save({"layer.weight": torch.zeros(2)}, other)
    torch.save({"state_dict": Path("x")}, code)  # needs code to load: never run
    (tmp_path / "notes.txt").write_text("x")
    short = tmp_path / "short.pt"
    state = torch.load(folder / "open_clip_pytorch_model.bin", weights_only=True)
    torch.save({k: v for k, v in state.items() if k != "visual.ln_post.weight"}, short)
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"]["vision_cfg"]["timm_model_name"] = "vit_base"
    siglip = tmp_path / "siglip"
    siglip.mkdir()
    (siglip / "open_clip_config.json").write_text(json.dumps(config))
    torch.save(state, siglip / "open_clip_pytorch_model.bin")
    for path, says in [
        (torn, "holds no plain tensors"),
        (code, "holds no plain tensors"),
        (other, "no OpenCLIP ViT"),
        (short, "do not fit|tokens, its tokenizer"),
        (siglip, "timm_model_name"),
        (tmp_path / "notes.txt", "no weights file"),
        (tmp_path / "gone.pt", "do not exist"),
        ("xswu/HPSv2:HPS_v2.1_compressed.pt", "hub"),
    ]:
        with pytest.raises(UserError, match=says) as found:
            load_scorer("hps", str(path))
        assert "\n" not in str(found.value)
