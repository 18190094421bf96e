"""SDXL: text and unconditional branch as the pipeline has them, and each picture's own size and crop."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from PIL import Image
from small import settings
from tiny import tiny_sd2_pipeline, tiny_sdxl_pipeline

from diffalign.data.cache import open_cache
from diffalign.data.readers import read_pairs
from diffalign.data.source import Source
from diffalign.errors import UserError
from diffalign.families import Model, load_model
from diffalign.pipelines.sample import sample_model
from diffalign.recipe import DataRecipe, ModelRecipe, load_recipe
from diffalign.run import Session

CPU = torch.device("cpu")
LONG = "abcdefghij" * 10
# (height, width) of the pictures of each pair; the shorter side becomes 64
SIZES = [((64, 96), (128, 64)), ((80, 64), (64, 64)), ((64, 160), (96, 128)), ((100, 64), (64, 72))] * 3


def load(folder: Path | str, dtype: torch.dtype = torch.float32, **options: object) -> Model:
    return load_model(ModelRecipe(path=str(folder), **options), CPU, dtype)


@pytest.fixture(scope="module")
def model(tiny_sdxl_folder: Path) -> Model:
    return load(tiny_sdxl_folder)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve pairs, every picture of a size of its own, and captioned pictures of the same."""
    folder = tmp_path_factory.mktemp("sizes")
    lines = []
    for i, sizes in enumerate(SIZES):
        row = {"prompt": f"thing {i}"}
        for name, (height, width) in zip(("chosen", "rejected"), sizes, strict=True):
            pixels = np.random.default_rng(2 * i + (name == "chosen")).integers(0, 256, (height, width, 3), np.uint8)
            row[name] = f"{i}-{name}.png"
            Image.fromarray(pixels).save(folder / row[name])
        lines.append(json.dumps(row))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def sizes_of(height: int, width: int, side: int = 64) -> list[float]:
    """What SDXL is told of a picture that is resized to ``side`` and cut in the middle."""
    scale = side / min(height, width)
    return [height, width, (round(height * scale) - side) // 2, (round(width * scale) - side) // 2, side, side]


def plain(folder: Path) -> StableDiffusionXLPipeline:
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("zeros", [True, False], ids=["zeros", "encoded"])
def test_text_is_encoded_as_the_pipeline_does_it(zeros: bool, tmp_path: Path) -> None:
    """Also the empty prompt as a prompt, and as the unconditional branch."""
    tiny_sdxl_pipeline(zeros=zeros).save_pretrained(tmp_path / "m")
    model, prompts = load(tmp_path / "m"), ["a red cat", "", LONG]
    embeds, negative, pooled, no_pooled = plain(tmp_path / "m").encode_prompt(prompts, device="cpu")
    cond, uncond = model.encode_prompts(prompts, batch=2), model.uncond(3)
    assert embeds.shape == (3, 77, 40) and pooled.shape == (3, 12)
    torch.testing.assert_close(cond.embeds, embeds)
    torch.testing.assert_close(cond.added["text_embeds"], pooled)
    torch.testing.assert_close(uncond.embeds, negative)
    torch.testing.assert_close(uncond.added["text_embeds"], no_pooled)
    assert bool(uncond.embeds.abs().max() == 0) == zeros
    empty = model.encode_prompts([])
    assert len(empty) == 0 and empty.embeds.shape[1:] == (77, 40)


def test_the_model_says_what_it_is(model: Model) -> None:
    assert (model.family, model.factor, model.default_resolution) == ("sdxl", 8, 64)
    assert model.token_overflow(["a" * 75, "a" * 76]) == [0, 1]
    assert {"text_encoder", "text_encoder_2", "tokenizer_2", "vae", "unet"} <= model.fingerprint().keys()
    assert len(model.lora_targets("attention")) == 4 * 2 * 2 * 4  # down 1, middle 1, up 2; two layers of two attentions
    model.release_encoders()
    model.ensure_encoders()


def test_both_encoders_and_the_unconditional_branch_make_the_cache(tmp_path: Path, model: Model) -> None:
    from diffalign.data.layout import made_by_of

    def key(folder: Path) -> dict[str, str]:
        return made_by_of(load(folder), DataRecipe(path="x"), 64)["prompts"]

    base = shutil.copytree(model.folder.path, tmp_path / "base")
    before = key(base)
    index = json.loads((base / "model_index.json").read_text())
    (base / "model_index.json").write_text(json.dumps({**index, "force_zeros_for_empty_prompt": False}))
    assert key(base) != before
    tiny_sdxl_pipeline(seed=1).text_encoder_2.save_pretrained(tmp_path / "other")
    other = shutil.copytree(model.folder.path, tmp_path / "changed")
    shutil.copytree(tmp_path / "other", other / "text_encoder_2", dirs_exist_ok=True)
    assert key(other) != before


def test_mixed_folders_are_refused(tmp_path: Path, model: Model) -> None:
    folder = shutil.copytree(model.folder.path, tmp_path / "m")
    config = json.loads((folder / "unet" / "config.json").read_text())
    (folder / "unet" / "config.json").write_text(json.dumps({**config, "cross_attention_dim": 48}))
    with pytest.raises(UserError, match="unet"):
        load(folder)
    shutil.rmtree(folder / "tokenizer_2")
    with pytest.raises(UserError, match="lacks its tokenizer_2/"):
        load(folder)


def test_a_grid_is_what_the_pipeline_draws(model: Model) -> None:
    """Guidance, sizes and unconditional branch of `sample_model` are those of a plain pipeline."""
    from diffalign.context import Context
    from diffalign.keyed import normal
    from diffalign.roles import Roles

    twin = copy.deepcopy(model.unet)
    pipeline = model.pipeline("ddim")
    pipeline.set_progress_bar_config(disable=True)
    noise = normal((4, 8, 12), 3, "sample", "a", 0)[None]
    theirs = pipeline(
        "a cat", latents=noise, num_inference_steps=4, guidance_scale=3.0, height=64, width=96, output_type="np"
    ).images[0]
    ctx = Context(Roles(twin, model.call_unet, (), None), model.denoiser(), 0, CPU, model.uncond())
    cond = model.encode_prompts(["a cat"])
    options: dict[str, Any] = {"size": (64, 96), "steps": 4, "seed": 3}
    ours = sample_model(model, lambda x, t, c: ctx.model("base", x, t, c, 3.0), cond, ["a"], **options)[0]
    assert np.abs(np.asarray(ours) / 255 - theirs).max() < 2 / 255
    other = sample_model(model, lambda x, t, c: ctx.model("base", x, t, c, 1.0), cond, ["a"], **options)[0]
    assert np.abs(np.asarray(other) / 255 - theirs).max() > 5 / 255


@contextmanager
def told(unet: torch.nn.Module) -> Iterator[list[dict[str, torch.Tensor]]]:
    """What the U-Net is told beside the text, call by call."""
    calls: list[dict[str, torch.Tensor]] = []

    def keep(module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        calls.append({k: v.clone() for k, v in kwargs["added_cond_kwargs"].items()})

    handle = unet.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


def session(tmp_path: Path, folder: Path, pairs: Path, method: str = "dpo", **changes: Any) -> Session:
    options = {"method__beta": None} if method == "sft" else {"method__beta": 100}
    _, *rest = settings(folder, pairs, tmp_path / "run", **{**options, **changes})
    return Session(load_recipe(f"tiny/{method}", rest), progress=False)


def batch_sizes(rows: Sequence[int], name: str) -> list[list[float]]:
    return [sizes_of(*SIZES[i][("chosen", "rejected").index(name)]) for i in rows]


@pytest.mark.parametrize("method", ["dpo", "mapo", "sft"])
def test_each_picture_is_told_its_own_size(method: str, tmp_path: Path, tiny_sdxl_folder: Path, pairs: Path) -> None:
    """Base and student see the winner's sizes with the winner and the loser's with the loser."""
    trainer = session(tmp_path, tiny_sdxl_folder, pairs, method).trainer
    rows = [0, 1, 2, 3]
    batch = trainer.source.load(rows, [0] * 4)
    with torch.no_grad(), told(trainer.roles.unet) as calls:
        trainer.method.loss(trainer.ctx, batch, trainer.method.phases[0])
    wanted = batch_sizes(rows, "chosen") + (batch_sizes(rows, "rejected") if method != "sft" else [])
    assert len({tuple(w) for w in wanted}) == len(wanted), "every picture has its own"
    assert len(calls) == (2 if method == "dpo" else 1)
    for call in calls:
        assert call["time_ids"].tolist() == wanted
        assert call["text_embeds"].shape == (len(wanted), 12)


def test_sizes_matter_and_a_batch_is_a_loop_of_singles(tmp_path: Path, tiny_sdxl_folder: Path, pairs: Path) -> None:
    trainer = session(tmp_path, tiny_sdxl_folder, pairs).trainer
    for _ in range(2):
        trainer.train_step()
    phase = trainer.method.phases[0]
    batch = trainer.source.load([0, 1, 2, 3], [0] * 4)
    with torch.no_grad():
        together = trainer.method.loss(trainer.ctx, batch, phase)
        alone = [trainer.method.loss(trainer.ctx, batch.take([i]), phase) for i in range(4)]
        batch.sizes["chosen"], batch.sizes["rejected"] = batch.sizes["rejected"], batch.sizes["chosen"]
        swapped = trainer.method.loss(trainer.ctx, batch, phase)
    torch.testing.assert_close(together.values, torch.cat([one.values for one in alone]), rtol=1e-4, atol=1e-5)
    assert (together.metrics["chosen_error"] - swapped.metrics["chosen_error"]).abs().min() > 1e-5


def test_dropped_captions_keep_the_sizes(model: Model, pairs: Path, tmp_path: Path) -> None:
    recipe = DataRecipe(path=str(pairs))
    cache = open_cache(read_pairs(recipe).rows, model, recipe, tmp_path)
    batch = Source(cache, range(len(cache)), 0, cache.uncond, caption_dropout=1.0).load([0, 1, 2], [0, 0, 0])
    for name in ("chosen", "rejected"):
        cond = batch.condition(name)
        assert float(cond.embeds.abs().max()) == float(cond.added["text_embeds"].abs().max()) == 0
        assert cond.added["time_ids"].tolist() == batch_sizes([0, 1, 2], name)
    kept = cache.batch([0], [0]).condition("chosen")
    assert float(kept.embeds.abs().max()) > 0


def test_the_unconditional_branch_keeps_the_sizes(tmp_path: Path, tiny_sdxl_folder: Path, pairs: Path) -> None:
    ctx = (trainer := session(tmp_path, tiny_sdxl_folder, pairs).trainer).ctx
    batch = trainer.source.load([0, 2], [0, 0])
    cond = batch.condition("rejected")
    with torch.no_grad(), told(trainer.roles.unet) as calls:
        ctx.model("base", batch.latents["rejected"], torch.tensor([5, 900]), cond, guidance=4.0)
    assert calls[0]["time_ids"].tolist() == 2 * batch_sizes([0, 2], "rejected")
    assert bool((calls[0]["text_embeds"][:2] == 0).all()) and bool((calls[0]["text_embeds"][2:] != 0).any())


def test_a_bf16_base_is_told_exact_sizes(tiny_sdxl_folder: Path) -> None:
    half = load(tiny_sdxl_folder, torch.bfloat16)
    cond = half.sized(half.encode_prompts(["a"]), 1001, 64)
    with torch.no_grad(), told(half.unet) as calls:
        out = half.call_unet(half.unet, torch.randn(1, 4, 8, 8), 5, cond)
    assert calls[0]["time_ids"].tolist() == [[1001, 64, 0, 0, 1001, 64]] and out.dtype == torch.float32


def test_an_aligned_sdxl_reloads_in_plain_diffusers(tmp_path: Path, tiny_sdxl_folder: Path, pairs: Path) -> None:
    """LoRA with alpha unequal to rank, and the merged pipeline, draw what the live model draws."""
    live = session(tmp_path, tiny_sdxl_folder, pairs, output__merged=True, train__steps=6, train__lr=0.3)
    run = live.run()

    def draw(pipeline: StableDiffusionXLPipeline) -> np.ndarray:
        pipeline.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        return pipeline("a cat", num_inference_steps=3, generator=generator, output_type="np").images

    with live.trainer.roles.active("student"):
        ours = draw(live.parts.model.pipeline())
    base = plain(tiny_sdxl_folder)
    before = draw(base)
    base.load_lora_weights(run.model)
    assert np.abs(draw(base) - ours).max() < 1e-4 < 0.01 < np.abs(before - ours).max()
    assert np.abs(draw(plain(run.dir / "merged")) - ours).max() < 1e-4
    assert np.abs(draw(run.pipeline()) - ours).max() < 1e-4
    assert load(run.dir / "merged").zero_uncond


def test_sd2_encodes_and_predicts_v(tmp_path: Path) -> None:
    for prediction in ("v_prediction", "epsilon"):
        tiny_sd2_pipeline(prediction_type=prediction).save_pretrained(tmp_path / prediction)
        model = load(tmp_path / prediction, family="sd2")
        assert (model.family, model.denoiser().prediction) == ("sd2", prediction)
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "epsilon")
    embeds, negative = pipeline.encode_prompt(["a red cat", LONG], "cpu", 1, True)
    torch.testing.assert_close(model.encode_prompts(["a red cat", LONG]).embeds, embeds)
    torch.testing.assert_close(model.uncond(2).embeds, negative)
    assert model.sized(model.uncond(), 64, 64).added == {}
