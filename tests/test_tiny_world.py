"""The shipped tiny world: split, judge, models and pairs are what the README says."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import diffalign.assets as assets
from diffalign.assets import scenes
from diffalign.eval.oracle import Oracle

ROOT = Path(assets.__file__).resolve().parent


@pytest.fixture(scope="module")
def oracle() -> Oracle:
    return Oracle.from_pretrained(ROOT / "tiny-oracle")


@pytest.fixture(scope="module")
def pairs() -> list[dict]:
    return pq.read_table(ROOT / "tiny-pairs" / "pickapic.parquet").to_pylist()


def test_parse_reads_every_caption_back():
    for scene in scenes.pair_scenes() + scenes.single_scenes():
        assert {scenes.parse(scenes.caption(scene, p)) for p in (0, 1)} == {scene}
    assert scenes.parse("A red circle above a blue square.") == scenes.parse("a blue square below a red circle")
    for text in (
        "",
        "a red",
        "a red circle above",
        "a red circle above a red circle",
        "a cat",
        "a red circle and more",
    ):
        assert scenes.parse(text) is None


def test_heldout_combinations_are_in_no_training_prompt():
    held = {scenes.parse(p) for p in scenes.heldout_prompts()}
    train = {scenes.parse(p) for p in scenes.training_prompts()}
    assert None not in held | train and not held & train
    assert len(scenes.heldout_prompts()) >= 250 and len(scenes.single_prompts()) == 24
    assert 0.12 < len(held) / len(scenes.pair_scenes()) < 0.18
    assert not any(s.heldout for s in scenes.sample_scenes(2000, np.random.default_rng(0)))


def test_near_misses_stay_inside_the_training_split():
    from diffalign.assets.variants import near_miss

    rng = np.random.default_rng(1)
    for scene in scenes.sample_scenes(500, rng, heldout=None):
        miss = near_miss(scene, rng)
        assert miss != scene and not miss.heldout


def test_prompt_files_are_the_functions():
    for name, prompts in (
        ("heldout", scenes.heldout_prompts()),
        ("single", scenes.single_prompts()),
        ("train", scenes.training_prompts()),
    ):
        rows = [json.loads(x) for x in (ROOT / "prompts" / f"tiny-{name}.jsonl").read_text().splitlines()]
        assert [r["prompt"] for r in rows] == prompts and len({r["id"] for r in rows}) == len(rows)


def test_drawings_depend_on_the_generator_alone():
    drawn = scenes.sample_scenes(8, np.random.default_rng(3))
    a, b, c = (scenes.render(drawn, np.random.default_rng(s)) for s in (1, 1, 2))
    assert a.shape == (8, 32, 32, 3) and a.dtype == np.uint8
    assert (a == b).all() and (a != c).any()


def test_oracle_reads_fresh_drawings(oracle):
    rng = np.random.default_rng(11)
    drawn = scenes.sample_scenes(600, rng, heldout=None)
    images, prompts = scenes.render(drawn, rng), scenes.random_captions(drawn, rng)
    assert oracle.judge(images, prompts)["all"].mean() > 0.99
    large = [Image.fromarray(i).resize((64, 64), Image.Resampling.BICUBIC) for i in images[:64]]
    assert oracle.judge(large, prompts[:64])["all"].mean() > 0.95
    tensor = torch.from_numpy(images[:64]).permute(0, 3, 1, 2)
    assert (oracle.read(tensor) == oracle.read(images[:64])).all()


def test_oracle_tells_what_is_wrong(oracle):
    def judged(shown: str, asked: str) -> dict[str, bool]:
        scene = scenes.parse(shown)
        assert scene is not None
        image = scenes.render([scene], np.random.default_rng(5))
        return {k: bool(v[0]) for k, v in oracle.judge(image, [asked]).items()}

    asked = "a red circle above a blue square"
    assert all(judged("a blue square below a red circle", asked).values())
    assert judged("a blue circle above a red square", asked) == {
        "layout": True,
        "colours": False,
        "shapes": True,
        "all": False,
    }
    assert judged("a red square above a blue circle", asked) == {
        "layout": True,
        "colours": True,
        "shapes": False,
        "all": False,
    }
    assert not judged("a red circle left of a blue square", asked)["layout"]
    assert not judged("a red circle", asked)["layout"]
    assert not judged(asked, "a red circle")["layout"]
    with pytest.raises(ValueError, match="a cat"):
        judged("a red circle", "a cat")


def test_tiny_sd_is_a_plain_pipeline_that_draws(oracle):
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(ROOT / "tiny-sd")
    assert pipe.scheduler.config.set_alpha_to_one is False and pipe.scheduler.config.steps_offset == 1
    assert {next(m.parameters()).dtype for m in (pipe.unet, pipe.vae, pipe.text_encoder)} == {torch.float32}
    assert pipe.tokenizer.model_max_length == 24
    pipe.set_progress_bar_config(disable=True)
    prompts = scenes.single_prompts() * 2
    seeds = [torch.Generator().manual_seed(s) for s in range(len(prompts))]
    images = pipe(prompts, num_inference_steps=20, guidance_scale=3.0, generator=seeds).images
    assert images[0].size == (32, 32)
    assert oracle.judge(images, prompts)["all"].mean() >= 0.85
    dark = np.mean([np.asarray(i).mean() < 128 for i in images])
    assert 0.25 <= dark <= 0.75  # no caption speaks of the background: it must stay free


def test_tiny_sdxl_is_a_plain_pipeline_that_draws_and_listens_to_sizes(oracle):
    from diffusers import StableDiffusionXLPipeline

    from diffalign.assets.quality import sharpness
    from diffalign.assets.sampling import sample

    pipe = StableDiffusionXLPipeline.from_pretrained(ROOT / "tiny-sdxl")
    pipe.set_progress_bar_config(disable=True)
    parts = (pipe.unet, pipe.vae, pipe.text_encoder, pipe.text_encoder_2)
    assert {next(m.parameters()).dtype for m in parts} == {torch.float32}
    assert pipe.unet.config.addition_embed_type == "text_time" and pipe.tokenizer_2.pad_token_id == 0
    size = sum(f.stat().st_size for f in (ROOT / "tiny-sdxl").rglob("*") if f.is_file())
    assert size < 8e6
    prompts, seeds = scenes.single_prompts(), range(24)
    images = sample(pipe, prompts, seeds, steps=10)
    assert oracle.judge(images, prompts)["all"].mean() >= 0.8
    small = sample(pipe, prompts, seeds, steps=10, original_size=(14, 14), negative_original_size=(14, 14))
    assert sharpness(small) < 0.99 * sharpness(images), "a small original is softer"  # seen: 0.970
    states, pooled = torch.zeros(1, 24, 160), torch.zeros(1, 64)
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        outputs = [
            pipe.unet(x, 500, states, added_cond_kwargs={"text_embeds": pooled, "time_ids": torch.tensor([ids])}).sample
            for ids in ([32.0, 32, 0, 0, 32, 32], [32.0, 48, 0, 0, 32, 32], [32.0, 48, 0, 16, 32, 32])
        ]
    for i, j in ((0, 1), (1, 2)):
        assert (outputs[i] - outputs[j]).square().mean() > 1e-6 * outputs[i].square().mean()


def _gaps(name: str, asked: list[str], good: np.ndarray, bad: np.ndarray) -> np.ndarray:
    """Score differences by plain transformers, from the shipped files alone."""
    from transformers import CLIPModel, CLIPProcessor

    model = CLIPModel.from_pretrained(ROOT / name).eval()
    assert model.dtype == torch.float32
    processor = CLIPProcessor.from_pretrained(ROOT / name)
    images = [Image.fromarray(i) for i in np.concatenate([good, bad])]
    batch = processor(text=asked, images=images, padding=True, return_tensors="pt")
    with torch.no_grad():
        out = model(**batch)
    score = model.logit_scale.exp() * (out.text_embeds.repeat(2, 1) * out.image_embeds).sum(1)
    return (score[: len(asked)] - score[len(asked) :]).detach().numpy()


@pytest.mark.parametrize(("name", "least"), [("tiny-pickscore", 0.9), ("tiny-clip", 0.85)])
def test_scorers_prefer_the_picture_that_fits(name, least):
    from dataclasses import replace

    rng = np.random.default_rng(21)
    drawn = [
        s
        for s in scenes.sample_scenes(300, rng, two=1.0)
        if s.second and s.first[0] != s.second[0] and s.first[1] != s.second[1]  # else the swap only turns the order
    ]
    swapped = [replace(s, first=(s.second[0], s.first[1]), second=(s.first[0], s.second[1])) for s in drawn if s.second]
    asked = scenes.random_captions(drawn, rng)
    assert (_gaps(name, asked, scenes.render(drawn, rng), scenes.render(swapped, rng)) > 0).mean() >= least


def test_pairs_have_pick_a_pic_columns_ties_and_flaws(pairs):
    assert len(pairs) >= 1000
    wanted = {"are_different", "best_image_uid", "caption", "created_at", "has_label", "image_0_uid", "image_1_uid"}
    wanted |= {"jpg_0", "jpg_1", "label_0", "label_1", "model_0", "model_1", "ranking_id", "user_id"}
    assert wanted <= set(pairs[0])
    labelled = [r for r in pairs if r["has_label"]]
    assert len(labelled) == len(pairs) - 1
    assert {r["label_0"] for r in labelled} == {0.0, 0.5, 1.0}
    assert all(r["label_0"] + r["label_1"] == 1 for r in labelled)
    assert 0.4 < np.mean([r["label_0"] == 1 for r in labelled if r["label_0"] != 0.5]) < 0.6
    assert sum(r["jpg_0"] == r["jpg_1"] for r in pairs) == 1
    broken = 0
    for r in pairs:
        try:
            assert Image.open(io.BytesIO(r["jpg_1"])).convert("RGB").size == (32, 32)
        except OSError:
            broken += 1
    assert broken == 1


def test_no_pair_shows_a_heldout_combination(pairs):
    lines = (ROOT / "tiny-pairs" / "folder" / "metadata.jsonl").read_text().splitlines()
    prompts = [r["caption"] for r in pairs] + [json.loads(line)["prompt"] for line in lines]
    asked = [scenes.parse(p) for p in prompts]
    assert all(s is not None and not s.heldout for s in asked)
    assert 0.8 < np.mean([s.second is not None for s in asked if s]) < 0.97


def test_folder_pairs_are_files_but_for_the_flaws():
    folder = ROOT / "tiny-pairs" / "folder"
    rows = [json.loads(x) for x in (folder / "metadata.jsonl").read_text().splitlines()]
    assert len(rows) == 150 and set(rows[0]) == {"prompt", "chosen", "rejected"}
    missing = [r for r in rows if not (folder / r["chosen"]).exists() or not (folder / r["rejected"]).exists()]
    assert len(missing) == 1 and sum(r["chosen"] == r["rejected"] for r in rows) == 1


def test_all_assets_are_small_and_the_gates_held():
    size = sum(f.stat().st_size for f in ROOT.rglob("*") if f.is_file() and "__pycache__" not in f.parts)
    assert size < 40e6
    assert json.loads((ROOT / "QUALITY.json").read_text())["passed"] is True


def test_ranked_lists_are_shares_of_duels_on_training_prompts():
    from diffalign.data.ranked import open_ranked
    from diffalign.recipe import data_recipe

    rows = list(open_ranked(data_recipe("tiny-ranked", ["cache=false"])).rows)
    assert len(rows) >= 350 and len({r.prompt for r in rows}) == len(rows)
    asked = [scenes.parse(r.prompt) for r in rows]
    assert all(s is not None and not s.heldout for s in asked)
    for row in rows:
        k = sum(score is not None for score in row.scores)
        scores = np.array(row.scores[:k])
        assert (np.diff(scores) <= 0).all() and scores[0] > scores[-1]
        halves = scores * 4 * (k - 1)  # two scorers, each against k - 1 others
        assert scores.sum() == pytest.approx(k / 2) and np.abs(halves - halves.round()).max() < 1e-6
        assert all(ref.size == (32, 32) for ref in row.pictures)
    assert sum(len(r.pictures) == 4 for r in rows) > 0.9 * len(rows)
