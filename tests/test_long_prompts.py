"""Long prompts: encoded by segments for every family, trained and sampled alike; scored by segments, reweighted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from eval_tiny import golden, write_tiny_clip
from small import settings, write_pairs
from tiny import tiny_pipeline, tiny_sd2_pipeline, tiny_sdxl_pipeline, write_tiny_model

from diffalign import load_recipe, train
from diffalign.data.layout import made_by_of
from diffalign.errors import UserError
from diffalign.eval.prompts import Prompt
from diffalign.eval.score import score_images
from diffalign.eval.scorers import load_scorer
from diffalign.eval.scorers.denscore import reweight
from diffalign.families import Model, load_model
from diffalign.families.segments import HEAD, encode_segments, towers_of
from diffalign.memory import shapes_of
from diffalign.pipelines.long_prompts import segment_embeds
from diffalign.pipelines.sample import SampleSpec, TextCache, sample
from diffalign.recipe import DataRecipe, ModelRecipe
from diffalign.sentences import sentences

CPU = torch.device("cpu")
FAMILIES = [tiny_pipeline, tiny_sd2_pipeline, tiny_sdxl_pipeline]
SHORT, TWO = "a red cat!", "A red cat. A dog beside it!"
LONG = "A cat sits on a wall. " + "Behind it there is a very long garden wall with many green leaves and flowers " * 3


def opened(make: Any, folder: Path, long_prompts: int | None = 120) -> Model:
    make().save_pretrained(folder)
    return load_model(ModelRecipe(path=str(folder), long_prompts=long_prompts), CPU, torch.float32)


def test_sentences() -> None:
    assert sentences(" A cat.  Two dogs! v1.5 is\nout; yes? no") == [
        "A cat.",
        "Two dogs!",
        "v1.5 is out;",
        "yes?",
        "no",
    ]
    assert sentences("") == sentences(" \n") == []


@pytest.mark.parametrize("make", FAMILIES)
def test_segments_stand_one_after_another(make: Any, tmp_path: Path) -> None:
    """Each sentence as the encoder has it alone, its start token and words; then filling; the same in any batch."""
    model = opened(make, tmp_path)
    plain = load_model(ModelRecipe(path=str(tmp_path)), CPU, torch.float32)
    found = model.encode_prompts([SHORT, TWO, "", LONG])
    assert found.embeds.shape == (4, 120, plain.encode_prompts([""]).embeds.shape[-1])
    alone = plain.encode_prompts([SHORT, *sentences(TWO), ""]).embeds
    count = [1 + len(towers_of(model)[0].pieces(text)[0]) for text in (SHORT, *sentences(TWO))]
    close = {"rtol": 1e-4, "atol": 1e-5}
    filling = alone[3, HEAD:].mean(0)
    torch.testing.assert_close(found.embeds[0, : count[0]], alone[0, : count[0]], **close)
    torch.testing.assert_close(found.embeds[0, count[0] :], filling.expand(120 - count[0], -1), **close)
    both = torch.cat([alone[1, : count[1]], alone[2, : count[2]]])
    torch.testing.assert_close(found.embeds[1, : len(both)], both, **close)
    torch.testing.assert_close(found.embeds[2, 0], alone[3, 0], **close)
    torch.testing.assert_close(found.embeds[2, 1:], filling.expand(119, -1), **close)
    for i, text in enumerate([SHORT, TWO, "", LONG]):
        one = model.encode_prompts([text])
        torch.testing.assert_close(one.embeds[0], found.embeds[i], **close)
        for name, tensor in one.added.items():
            torch.testing.assert_close(tensor[0], found.added[name][i], **close)
    if found.added:  # SDXL's pooled text: the mean over the segments
        parts = plain.encode_prompts(sentences(TWO)).added["text_embeds"]
        torch.testing.assert_close(found.added["text_embeds"][1], parts.mean(0), **close)
        assert model.uncond().embeds.shape[1] == 120 and not model.uncond().embeds.any()
    assert len(model.encode_prompts([])) == 0


def test_nothing_is_cut_that_has_a_place(tmp_path: Path) -> None:
    """A sentence longer than the encoder is split further; what is beyond the length is counted."""
    model = opened(tiny_pipeline, tmp_path, 300)
    (tower,) = towers_of(model)
    pieces = tower.pieces(LONG)
    words = sum(map(len, pieces))
    assert max(map(len, pieces)) == 75 and words > 200 and model.token_overflow([LONG, SHORT]) == [0, 0]
    end = model.encode_prompts([LONG]).embeds[0, words + len(pieces) - 1]
    changed = model.encode_prompts([LONG[:-2] + "x "]).embeds[0, words + len(pieces) - 1]
    assert float((end - changed).abs().max()) > 1e-3, "the last word is seen"
    model.long_prompts = 100
    assert model.token_overflow([LONG]) == [words + len(pieces) - 100]
    torch.testing.assert_close(
        model.encode_prompts([LONG]).embeds[0], encode_segments([tower], [LONG], 300).embeds[0, :100]
    )


@pytest.mark.parametrize("make", FAMILIES)
def test_sampling_sees_what_training_saw(make: Any, tmp_path: Path) -> None:
    model = opened(make, tmp_path)
    pipe, texts = make(), [SHORT, LONG]
    rows = TextCache(pipe, texts, None, True, 120).rows([1, 0])
    direct = segment_embeds(pipe, texts[::-1], None, 120)
    cond, uncond = model.encode_prompts(texts[::-1]), model.uncond(2)
    expected = {"prompt_embeds": cond.embeds, "negative_prompt_embeds": uncond.embeds}
    for name, tensor in cond.added.items():
        expected |= {f"pooled_prompt_{name[5:]}": tensor, f"negative_pooled_prompt_{name[5:]}": uncond.added[name]}
    assert rows.keys() == direct.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(rows[name], tensor, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(direct[name], tensor, rtol=1e-4, atol=1e-5)
    other = segment_embeds(pipe, texts, "a blue dog", 120)["negative_prompt_embeds"]
    torch.testing.assert_close(other[0], model.encode_prompts(["a blue dog"]).embeds[0], rtol=1e-4, atol=1e-5)
    options = {"output_type": "latent", "num_inference_steps": 1, "height": 64, "width": 64}
    assert pipe(**direct, **options).images.shape[0] == 2


def test_a_run_on_long_prompts(tmp_path: Path) -> None:
    """Prompts of mixed lengths train together under a cache of their own; the run's folder samples the same way."""
    model, data = write_tiny_model(tmp_path / "model"), write_pairs(tmp_path / "pairs", 6)
    lines = [json.loads(line) for line in (data / "metadata.jsonl").read_text().splitlines()]
    lines[0]["prompt"] = LONG
    (data / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    name, *options = settings(model, data, tmp_path / "run", train__steps=1, validate__every=100)
    options += ["model.long_prompts=90"]
    done = train(name, options)
    made = sample(SampleSpec(str(done.dir), steps=1, device="cpu"), [Prompt("a", LONG, None)], tmp_path / "out", False)
    assert json.loads((made.parent / "sample.json").read_text())["settings"]["long_prompts"] == 90
    base = load_model(ModelRecipe(path=str(model)), CPU, torch.float32)
    plain = made_by_of(base, DataRecipe(path="x"), 64)
    base.long_prompts = 90
    assert made_by_of(base, DataRecipe(path="x"), 64)["prompts"] != plain["prompts"]
    assert shapes_of(base, load_recipe(name, options)).tokens == 90
    with pytest.raises(UserError, match="long_prompts"):
        load_recipe(name, ["model.long_prompts=1"])


# ---- scores ---------------------------------------------------------------------------------------------------------


def test_reweighting_identities() -> None:
    """Sheet 14: w = 1, w = 0, one text, and a picture orthogonal to what the texts share."""
    text = F.normalize(torch.randn(5, 8, generator=torch.Generator().manual_seed(0)).double() + 1, dim=-1)
    common = F.normalize(text.mean(0), dim=-1)
    torch.testing.assert_close(reweight(text, 1.0), text)
    assert float((reweight(text, 0.0) @ common).abs().max()) < 1e-12
    torch.testing.assert_close(reweight(text[:1], 0.3), 0.3 * text[:1])
    picture = torch.randn(8, generator=torch.Generator().manual_seed(1)).double()
    picture -= (picture @ common) * common
    torch.testing.assert_close(reweight(text, 0.3) @ picture, text @ picture)
    by_hand = torch.stack([e - 0.7 * (e @ common) * common for e in text])
    torch.testing.assert_close(reweight(text), by_hand)
    torch.testing.assert_close(reweight(text[:2], 0.3, common), by_hand[:2])


def test_scores_by_sentences(tmp_path: Path) -> None:
    folder = write_tiny_clip(tmp_path / "clip")
    clip, dense = load_scorer("clip", str(folder), "cpu"), load_scorer("segments", str(folder), "cpu")
    pictures = [golden(40, 40), golden(64, 32)]
    torch.testing.assert_close(dense(pictures, [SHORT, "a dog"]), clip(pictures, [SHORT, "a dog"]))
    parts = torch.stack([clip(pictures, part) for part in sentences(TWO)])
    torch.testing.assert_close(dense(pictures, TWO), parts.mean(0))
    long = "A cat on a mat, red. " * 4  # 84 bytes: more than the 40 tokens of this model, no sentence is
    assert clip.truncated([long, LONG]) == [True, True] and dense.truncated([long, LONG]) == [False, True]
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0), requires_grad=True)
    dense.reward(pixels, [TWO, SHORT]).sum().backward()
    assert float(pixels.grad.abs().max()) > 0


def test_reweighted_scores_do_not_depend_on_the_batch(tmp_path: Path) -> None:
    folder = write_tiny_clip(tmp_path / "clip")
    texts, name = [SHORT, TWO, "a dog", "a house by the sea"], f"segments_reweighted={folder}"
    dense = load_scorer(name, device="cpu")
    pictures = [golden(40 + 8 * i, 40) for i in range(4)]
    own = F.normalize(load_scorer(f"segments={folder}", device="cpu").embed_texts(texts).mean(0), dim=-1)
    plain = load_scorer(f"segments={folder}", device="cpu")
    features = dense.embed_images([dense.prepare(p) for p in pictures])
    expected = 100 * (reweight(plain.embed_texts(texts), 0.3, own) * features).sum(1)
    torch.testing.assert_close(dense(pictures, texts), expected)  # unplanned: of the call's own texts
    before = dense.fingerprint_id
    dense.plan_texts([*texts, SHORT])
    torch.testing.assert_close(dense(pictures, texts, batch=1), expected)
    assert dense.fingerprint_id != before
    for i, image in enumerate(pictures):
        image.save(tmp_path / f"{i}.png")
    rows = [{"id": str(i), "image": f"{i}.png", "prompt": text} for i, text in enumerate(texts)]
    counts = []
    for part in (rows, rows, rows[:3]):  # a shorter list has another common part: its scores are not taken over
        (tmp_path / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
        found = score_images(
            tmp_path / "list.jsonl", None, name, tmp_path / "scores.jsonl", device="cpu", progress=False
        )
        counts.append(found.scored)
    assert counts == [4, 0, 3]
