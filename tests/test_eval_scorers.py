"""Scorers on a random CLIP of the real classes: identities 1-10 and 13-14 of spec/evaluators.md 16, and the oracle."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from eval_tiny import golden, write_tiny_clip
from PIL import Image
from transformers import CLIPModel, CLIPProcessor, CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from diffalign.errors import UserError
from diffalign.eval.preprocess import P1
from diffalign.eval.scorers import list_scorers, load_scorer, load_scorers, parse_scorers
from diffalign.eval.scorers._clip import projected
from diffalign.eval.scorers.clip import Clip
from diffalign.eval.scorers.hps import HPS
from diffalign.eval.scorers.pickscore import PickScore

SIZES = [(40, 40), (32, 32), (33, 70), (90, 41), (227, 224)]
PROMPTS = ["a cat", "two dogs", "x", "a red circle above a blue square", "hello"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_clip(tmp_path_factory.mktemp("clip"), tau=61.0)


@pytest.fixture(scope="module")
def pick(folder: Path) -> PickScore:
    scorer = load_scorer("pickscore", str(folder), device="cpu")
    assert isinstance(scorer, PickScore)
    return scorer


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    return [golden(*size) for size in SIZES]


def test_listing_imports_no_torch() -> None:
    code = (
        "import sys; from diffalign.eval.scorers import list_scorers, parse_scorers; names = list(list_scorers()); "
        "parse_scorers('oracle'); "
        " assert 'torch' not in sys.modules and 'transformers' not in sys.modules; print(*names)"
    )
    names = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert {"clip_l14", "clip_h14", "clip", "pickscore", "oracle", "tiny-clip", "tiny-pickscore"} <= set(names)
    assert all(about.about for about in list_scorers().values())


def test_pickscore_is_the_models_own_logits(pick: PickScore, folder: Path, pictures: list[Image.Image]) -> None:
    model = CLIPModel.from_pretrained(folder).eval()
    processor = CLIPProcessor(CLIPImageProcessorPil.from_pretrained(folder), CLIPTokenizer.from_pretrained(folder))
    inputs = processor(images=pictures, text=PROMPTS, padding="max_length", truncation=True, return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits_per_image.diagonal()
    scores = pick(pictures, PROMPTS)
    assert scores.dtype == torch.float32 and scores.shape == (5,)
    assert torch.allclose(scores, logits, atol=2e-4, rtol=1e-6)  # 2e-4 on a scale of 61: 3e-6 in the cosine
    assert float(scores.std()) > 1  # the comparison above means something
    assert pick.scale == pytest.approx(61, rel=1e-6) and pick.fingerprint["scale"] == "61"


def test_clip_is_hundred_cosine(pick: PickScore, folder: Path, pictures: list[Image.Image]) -> None:
    clip = Clip.from_pretrained(folder, device="cpu", name="clip")
    scores, cosine = clip(pictures, PROMPTS), pick(pictures, PROMPTS) / pick.scale
    assert torch.allclose(scores, 100 * cosine, atol=1e-4)
    assert (scores.abs() <= 100).all()
    # 100 c = 40 (2.5 c) for c > 0, and both are cut at 0 below
    assert torch.allclose((scores / 100).clamp(min=0) * 2.5 * 40, scores.clamp(min=0), atol=1e-4)


def test_a_batch_is_a_loop_of_singles_in_any_order(pick: PickScore, pictures: list[Image.Image]) -> None:
    together = pick(pictures, PROMPTS)
    alone = torch.cat([pick(p, t) for p, t in zip(pictures, PROMPTS, strict=True)])
    assert torch.allclose(together, alone, atol=1e-4, rtol=1e-6)
    assert torch.allclose(pick(pictures, PROMPTS, batch=2), together, atol=1e-4, rtol=1e-6)
    order = [3, 0, 4, 1, 2]
    assert torch.allclose(pick([pictures[i] for i in order], [PROMPTS[i] for i in order]), together[order], atol=1e-4)


def test_text_cache_changes_nothing_and_encodes_once(folder: Path, pictures: list[Image.Image]) -> None:
    cached, fresh = (PickScore.from_pretrained(folder, device="cpu", name="pickscore") for _ in range(2))
    cached.plan_texts(PROMPTS)
    first = cached(pictures, PROMPTS)
    again = cached(pictures * 3, PROMPTS * 3)
    unit = cached.embed_images([cached.prepare(p) for p in pictures])
    assert torch.allclose(cached.scale * (unit * cached.embed_texts(PROMPTS)).sum(1), first, atol=1e-4)
    assert cached.texts_encoded == len(PROMPTS)
    singles = torch.cat([fresh(p, t) for p, t in zip(pictures, PROMPTS, strict=True)])
    assert torch.equal(again[:5], again[5:10]) and torch.allclose(first, singles, atol=1e-4)
    assert torch.allclose(again[:5], first, atol=1e-5)


def test_padding_changes_nothing(pick: PickScore) -> None:
    together = pick._encode(["x", "a red circle above a blue square"])
    assert torch.allclose(together[:1], pick._encode(["x"]), atol=1e-6)
    tokens = pick.tokenizer(["x"], padding="max_length", max_length=pick.max_tokens, return_tensors="pt").input_ids
    zeros = tokens.clone()
    zeros[0, int((tokens[0] == pick.tokenizer.eos_token_id).int().argmax()) + 1 :] = 0
    for padded in (tokens, zeros):  # end tokens behind the end, or zeros behind the end, no mask
        out = projected(pick.model.get_text_features(input_ids=padded))
        assert torch.allclose(torch.nn.functional.normalize(out, dim=-1), together[:1], atol=1e-6)


def test_features_of_either_transformers_are_unwrapped() -> None:
    feature = torch.rand(2, 3)
    assert projected(feature) is feature and projected(SimpleNamespace(pooler_output=feature)) is feature


def test_two_images_of_a_prompt_give_a_probability(pick: PickScore, pictures: list[Image.Image]) -> None:
    scores = pick(pictures, "a cat").double()
    p = torch.sigmoid(scores[0] - scores[1])
    assert float(p + torch.sigmoid(scores[1] - scores[0])) == pytest.approx(1)
    assert float(torch.softmax(scores[:2], 0)[0]) == pytest.approx(float(p))
    assert torch.allclose(torch.softmax(scores + 5, 0), torch.softmax(scores, 0))


def test_every_form_of_an_image_scores_alike(pick: PickScore, pictures: list[Image.Image]) -> None:
    picture = pictures[2]
    array = np.array(picture)
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    forms = [picture, array, tensor, tensor.float() / 255, array.astype(np.float32) / 255, [picture], tensor[None]]
    scores = [float(pick(form, "a cat")) for form in forms]  # type: ignore[arg-type]
    assert scores == [scores[0]] * len(scores)
    assert pick([], []).shape == (0,)
    for wrong in (array[..., 0], np.zeros((4, 4, 4), np.uint8), torch.zeros(1, 2, 3, 4, 5)):
        with pytest.raises(UserError):
            pick(wrong, "a cat")
    with pytest.raises(UserError, match="5 images but 2 prompts"):
        pick(pictures, ["a", "b"])


def test_reward_has_gradients_and_stays_close(pick: PickScore) -> None:
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)).mul(255).round().div(255)
    exact = pick(images, PROMPTS[:3])
    live = images.clone().requires_grad_()
    reward = pick.reward(live, PROMPTS[:3])
    assert torch.allclose(reward.detach(), exact, atol=1e-4)  # no resize at 32 px: only fp32 rounding
    reward.sum().backward()
    assert live.grad is not None and bool((live.grad.flatten(1).abs().sum(1) > 0).all())
    step = images + 1e-3 * live.grad / live.grad.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    with torch.no_grad():
        assert bool((pick.reward(step.clamp(0, 1), PROMPTS[:3]) > reward).all())
    assert pick.reward(torch.rand(2, 3, 80, 64), "a cat").shape == (2,)
    assert all(p.grad is None for p in pick.model.parameters())


def test_reward_is_close_through_a_resize() -> None:
    from diffalign.assets.scenes import random_captions, render, sample_scenes

    for size in [(512, 512), (300, 451), (1000, 667)]:
        picture = golden(*size)
        floats = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 255
        apart = (P1()([picture]) - P1().tensor(floats)).abs()
        assert float(apart.mean()) < 0.01 and float(apart.max()) < 0.3
    rng = np.random.default_rng(0)
    scenes = sample_scenes(32, rng)
    pictures = [Image.fromarray(p).resize((128, 128), Image.Resampling.BICUBIC) for p in render(scenes, rng)]
    floats = torch.from_numpy(np.stack([np.asarray(p) for p in pictures])).permute(0, 3, 1, 2).float() / 255
    prompts = random_captions(scenes, rng)
    for name, share in (("tiny-clip", 0.03), ("tiny-pickscore", 0.03), ("tiny-hps", 1e-5)):
        scorer = load_scorer(name, device="cpu")
        exact = scorer(pictures, prompts)
        assert float((scorer.reward(floats, prompts) - exact).abs().mean() / exact.std()) < share


def test_towers_in_bf16_end_in_fp32(folder: Path, pick: PickScore, pictures: list[Image.Image]) -> None:
    half = load_scorer(f"pickscore={folder}", device="cpu", dtype="bf16")
    scores = half(pictures, PROMPTS)
    assert scores.dtype == torch.float32 and half.fingerprint["dtype"] == "bf16"
    assert torch.allclose(scores, pick(pictures, PROMPTS), atol=2.5)
    assert len(set((scores * 1000).round().tolist())) == 5 and not torch.equal(scores, scores.bfloat16().float())
    assert isinstance(half, PickScore) and half.scale == pick.scale  # tau is read before the cast
    assert half.fingerprint_id != pick.fingerprint_id


def test_fingerprint_follows_the_weights(folder: Path, pick: PickScore, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    assert load_scorer("pickscore", str(copy), device="cpu").fingerprint_id == pick.fingerprint_id
    other = write_tiny_clip(tmp_path / "other", seed=1, tau=61.0)
    assert load_scorer("pickscore", str(other), device="cpu").fingerprint["weights"] != pick.fingerprint["weights"]
    assert {"scorer", "formula", "scale", "weights", "preprocess", "dtype", "code"} <= set(pick.fingerprint)


def test_long_prompts_are_flagged(pick: PickScore) -> None:
    assert pick.truncated(["x" * 38, "x" * 39, "short"]) == [False, True, False]
    assert math.isfinite(float(pick(golden(32, 32), "x" * 500)))


def test_wrong_weights_are_refused_in_one_line(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not what 'clip_l14' stands for"):
        load_scorer("clip_l14", str(folder))
    with pytest.raises(UserError, match="do not exist"):
        load_scorer("pickscore", str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="holds no config"):
        load_scorer("pickscore", str(tmp_path))
    with pytest.raises(UserError, match="hub"):
        load_scorer("pickscore", "somebody/absent")
    with pytest.raises(UserError, match="needs a path"):
        load_scorer("clip")
    bert = tmp_path / "bert"
    bert.mkdir()
    (bert / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(UserError, match="holds a bert"):
        load_scorer("pickscore", str(bert))
    with pytest.raises(UserError, match="unknown dtype"):
        load_scorer("pickscore", str(folder), dtype="fp8")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="'cuda' is asked for"):
            load_scorer("pickscore", str(folder), device="cuda")
    from safetensors.torch import load_file, save_file

    lacking = shutil.copytree(folder, tmp_path / "lacking")
    state = load_file(lacking / "model.safetensors")
    del state["text_projection.weight"]
    save_file(state, lacking / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="do not fit"):
        load_scorer("pickscore", str(lacking))


def test_names(folder: Path) -> None:
    assert parse_scorers("oracle, pickscore=/m/p") == {"oracle": None, "pickscore": "/m/p"}
    assert parse_scorers(["oracle", "clip=a/b"]) == {"oracle": None, "clip": "a/b"}
    for wrong, says in [
        ("pikscore", "did you mean 'pickscore'"),
        ("hpsv3", "transformers==4.45.2"),
        ("oracle,oracle", "twice"),
        (" ", "no scorer"),
    ]:
        with pytest.raises(UserError, match=says):
            parse_scorers(wrong)
    assert [s.name for s in load_scorers(f"pickscore={folder},clip={folder}", device="cpu")] == ["pickscore", "clip"]


def test_oracle() -> None:
    from diffalign.assets.scenes import render, single_prompts, single_scenes

    oracle = load_scorer("oracle")
    scenes, prompts = single_scenes(), single_prompts()
    pictures = [Image.fromarray(pixels) for pixels in render(scenes, np.random.default_rng(0))]
    right = oracle(pictures, prompts)
    assert float(right.mean()) > 0.9 and set(right.tolist()) <= {0.0, 1.0}
    assert float(oracle(pictures, prompts[1:] + prompts[:1]).mean()) < 0.1
    found = oracle.score_prepared([oracle.prepare(p) for p in pictures], prompts)
    assert set(found.parts) == {"layout", "colours", "shapes"}
    assert torch.equal(found.values, torch.stack(list(found.parts.values())).min(0).values)
    with pytest.raises(UserError, match="judges captions of the tiny world only"):
        oracle([golden(32, 32)], "an astronaut")
    with pytest.raises(UserError, match="no gradients"):
        oracle.reward(torch.rand(1, 3, 32, 32), "a red circle")


@pytest.mark.parametrize("name", ["tiny-clip", "tiny-pickscore", "tiny-hps"])
def test_shipped_scorers_know_the_tiny_world(name: str) -> None:
    from diffalign.assets.scenes import render, single_prompts, single_scenes

    scorer = load_scorer(name, device="cpu")
    assert type(scorer) is {"tiny-clip": Clip, "tiny-pickscore": PickScore, "tiny-hps": HPS}[name]
    prompts = single_prompts()
    pictures = [Image.fromarray(pixels) for pixels in render(single_scenes(), np.random.default_rng(0))]
    assert not any(scorer.truncated(prompts))
    right, wrong = scorer(pictures, prompts), scorer(pictures, prompts[1:] + prompts[:1])
    assert float((right > wrong).float().mean()) > 0.9
