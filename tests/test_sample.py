"""Sampling: one noise for every model, any batch size, any interruption; and what a folder says about itself."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from command import script
from diffusers import DDIMScheduler, StableDiffusionPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image
from tiny import write_tiny_model

from diffalign.data.batch import Cond
from diffalign.denoiser import guide
from diffalign.errors import Interrupted, UserError
from diffalign.eval.prompts import Prompt
from diffalign.families import Model, load_model, save_lora
from diffalign.keyed import normal
from diffalign.pipelines import sample as module
from diffalign.pipelines.grid import grid
from diffalign.pipelines.sample import SampleSpec, sample, sample_model
from diffalign.recipe import ModelRecipe

PROMPTS = [Prompt(f"p{i}", f"a cat with {i} hats", "hats" if i % 2 else None) for i in range(5)]


def load(folder: Path) -> Model:
    return load_model(ModelRecipe(path=str(folder)), torch.device("cpu"), torch.float32)


def spec(model: Path, **options: object) -> SampleSpec:
    return SampleSpec(**{"model": str(model), "steps": 3, "batch": 4, **options})


def pixels(file: Path) -> np.ndarray:
    return np.asarray(Image.open(file)).astype(int)


def images(out: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted((out / "images").iterdir())}


def test_images_and_manifest(tmp_path: Path, tiny_model_folder: Path) -> None:
    manifest = sample(spec(tiny_model_folder, per_prompt=2), PROMPTS, tmp_path, progress=False)
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    assert manifest == tmp_path / "manifest.jsonl"
    assert [(r["id"], r["k"]) for r in rows] == [(p.id, k) for p in PROMPTS for k in (0, 1)]
    assert rows[3] == {
        "id": "p1",
        "prompt": "a cat with 1 hats",
        "category": "hats",
        "k": 1,
        "seed": 0,
        "image": "images/000001-1.png",
    }
    for row in rows:
        image = Image.open(tmp_path / row["image"])
        assert (image.size, image.mode) == ((64, 64), "RGB")
    assert len(set(images(tmp_path).values())) == 10, "all images differ"
    facts = json.loads((tmp_path / "sample.json").read_text())
    assert facts["family"] == "sd1" and facts["settings"]["scheduler"] == "ddim"
    assert set(facts["settings"]["hashes"]) == {"unet", "vae", "text_encoder", "tokenizer", "scheduler"}


def test_an_image_is_what_the_plain_pipeline_draws(tmp_path: Path, tiny_model_folder: Path) -> None:
    """From the keyed noise, with guidance and a negative prompt, at another size than the default."""
    options = {"guidance": 5.0, "negative_prompt": "a dog", "height": 64, "width": 96, "seed": 7, "per_prompt": 2}
    sample(spec(tiny_model_folder, **options), PROMPTS, tmp_path, progress=False)
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_model_folder)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    expected = pipeline(
        PROMPTS[3].prompt,
        negative_prompt="a dog",
        latents=normal((4, 8, 12), 7, "sample", "p3", 1)[None],
        num_inference_steps=3,
        guidance_scale=5.0,
        height=64,
        width=96,
    ).images[0]
    difference = np.abs(pixels(tmp_path / "images" / "000003-1.png") - np.asarray(expected).astype(int))
    assert difference.max() <= 1


@pytest.mark.parametrize("scheduler", ["default", "ddim", "euler", "dpm++", "unipc", "lcm"])
def test_batch_size_and_company_do_not_matter(scheduler: str, tmp_path: Path, tiny_model_folder: Path) -> None:
    """Eight at once, or three of the prompts alone in another order: the same pictures. lcm adds noise at each step."""
    options = {"scheduler": scheduler, "per_prompt": 2, "steps": 4}
    sample(spec(tiny_model_folder, batch=8, **options), PROMPTS, tmp_path / "a", progress=False)
    few = [PROMPTS[4], PROMPTS[1], PROMPTS[2]]
    sample(spec(tiny_model_folder, batch=1, **options), few, tmp_path / "b", progress=False)
    for place, prompt in enumerate(few):
        for k in (0, 1):
            there = pixels(tmp_path / "a" / "images" / f"{PROMPTS.index(prompt):06d}-{k}.png")
            assert np.abs(there - pixels(tmp_path / "b" / "images" / f"{place:06d}-{k}.png")).max() <= 1
    assert np.abs(pixels(tmp_path / "b/images/000000-0.png") - pixels(tmp_path / "b/images/000000-1.png")).max() > 5


def test_every_model_sees_the_same_noise(
    tmp_path: Path, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Recorded where the pipeline takes it: the same latents for two models, none twice, others for another seed."""
    other = write_tiny_model(tmp_path / "other", seed=9)
    seen: list[torch.Tensor] = []
    original = StableDiffusionPipeline.prepare_latents

    def record(self: StableDiffusionPipeline, *args: object, **kwargs: object) -> torch.Tensor:
        latents = original(self, *args, **kwargs)
        seen.append(latents.clone())
        return latents

    monkeypatch.setattr(StableDiffusionPipeline, "prepare_latents", record)
    for number, (folder, seed) in enumerate(((tiny_model_folder, 0), (other, 0), (other, 1))):
        sample(spec(folder, seed=seed, batch=8), PROMPTS, tmp_path / str(number), progress=False)
    assert torch.equal(seen[0], seen[1])
    assert not torch.isclose(seen[1], seen[2]).all(dim=(1, 2, 3)).any()
    assert len(torch.unique(seen[0].flatten(1), dim=0)) == len(PROMPTS)
    assert images(tmp_path / "0") != images(tmp_path / "1")


def test_text_is_encoded_once_a_prompt(
    tmp_path: Path, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[str] = []
    original = StableDiffusionPipeline.encode_prompt

    def record(self: StableDiffusionPipeline, prompt: list[str] | None, *args: object, **kwargs: object) -> object:
        encoded.extend(prompt or [])
        return original(self, prompt, *args, **kwargs)

    monkeypatch.setattr(StableDiffusionPipeline, "encode_prompt", record)
    monkeypatch.setattr(module, "ENCODED_TOGETHER", 2)
    sample(spec(tiny_model_folder, per_prompt=3, batch=2, steps=1), PROMPTS, tmp_path, progress=False)
    assert sorted(encoded) == sorted(["", *(p.prompt for p in PROMPTS)])


SCRIPT = """
import sys
import torch
torch.set_num_threads(int(sys.argv[3]))
sys.path.insert(0, sys.argv[4])
from test_sample import many
many(sys.argv[1], sys.argv[2])
"""


def many(model: Path | str, out: Path | str) -> None:
    prompts = [Prompt(f"p{i}", f"a cat with {i} hats") for i in range(40)]
    sample(SampleSpec(str(model), steps=6, batch=2, scheduler="lcm"), prompts, Path(out), progress=False)


def test_a_killed_run_goes_on_and_ends_the_same(tmp_path: Path, tiny_model_folder: Path) -> None:
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    many(tiny_model_folder, whole)
    process = script(SCRIPT, tiny_model_folder, torn, torch.get_num_threads(), Path(__file__).parent)
    while len(list(torn.glob("images/*.png"))) < 7:
        assert process.running(), "it ended before it was killed"
        time.sleep(0.005)
    process.send(signal.SIGKILL)
    assert process.wait().status == -signal.SIGKILL
    assert not (torn / "manifest.jsonl").exists()
    done = {name: (torn / "images" / name).stat().st_mtime_ns for name in images(torn) if name.endswith(".png")}
    assert 7 <= len(done) < 40
    victim = sorted(done)[2]  # a file torn by something else is made again, from its batch
    (torn / "images" / victim).write_bytes(images(whole)[victim][:50])
    many(tiny_model_folder, torn)
    assert (torn / "manifest.jsonl").read_bytes() == (whole / "manifest.jsonl").read_bytes()
    assert {k: v for k, v in images(torn).items() if k.endswith(".png")} == images(whole)
    untouched = [n for n, at in done.items() if n != victim and (torn / "images" / n).stat().st_mtime_ns == at]
    assert len(untouched) == len(done) - 1


def test_ctrl_c_lists_what_is_there(tmp_path: Path, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, calls = StableDiffusionPipeline.__call__, []

    def interrupt(self: StableDiffusionPipeline, *args: object, **kwargs: object) -> object:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    monkeypatch.setattr(StableDiffusionPipeline, "__call__", interrupt)
    with pytest.raises(Interrupted, match="stopped after 4 of 5 images"):
        sample(spec(tiny_model_folder), PROMPTS, tmp_path, progress=False)
    assert len((tmp_path / "manifest.jsonl").read_text().splitlines()) == 4
    sample(spec(tiny_model_folder), PROMPTS, tmp_path, progress=False)
    assert len(calls) == 3 and len((tmp_path / "manifest.jsonl").read_text().splitlines()) == 5


def test_a_folder_of_other_settings_is_not_mixed(tmp_path: Path, tiny_model_folder: Path) -> None:
    sample(spec(tiny_model_folder), PROMPTS[:2], tmp_path / "out", progress=False)
    before = images(tmp_path / "out")
    for change in ({"steps": 4}, {"guidance": 2.0}, {"seed": 1}, {"scheduler": "euler"}, {"width": 128}):
        with pytest.raises(UserError, match=f"images of other settings .{next(iter(change))}"):
            sample(spec(tiny_model_folder, **change), PROMPTS[:2], tmp_path / "out", progress=False)
    other = write_tiny_model(tmp_path / "other", seed=9)
    with pytest.raises(UserError, match=r"images of other settings .the model or LoRA"):
        sample(spec(other), PROMPTS[:2], tmp_path / "out", progress=False)
    assert images(tmp_path / "out") == before
    # more prompts or images a prompt, another batch size: goes on; a changed text under an old id is drawn again
    changed = [PROMPTS[0], Prompt("p1", "something else"), PROMPTS[2]]
    sample(spec(tiny_model_folder, per_prompt=2, batch=3), changed, tmp_path / "out", progress=False)
    after = images(tmp_path / "out")
    assert after["000000-0.png"] == before["000000-0.png"] and after["000001-0.png"] != before["000001-0.png"]
    assert len(after) == 6


@pytest.fixture
def lora(tmp_path: Path, tiny_model_folder: Path) -> Path:
    """A run's folder: recipe.yaml with the base, a strong LoRA (alpha unequal to rank) in model/."""
    model = load(tiny_model_folder)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=model.lora_targets("all"))
    model.unet.add_adapter(config, adapter_name="student")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.unet.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    run = tmp_path / "run"
    save_lora(get_peft_model_state_dict(model.unet, adapter_name="student"), config, run / "model")
    (run / "recipe.yaml").write_text(f"name: x\nmodel:\n  path: {tiny_model_folder}\n  lora: {{rank: 4}}\n")
    return run


def test_loras_and_run_folders(tmp_path: Path, tiny_model_folder: Path, lora: Path) -> None:
    ways = {
        "file": spec(tiny_model_folder, lora=str(lora / "model" / "pytorch_lora_weights.safetensors")),
        "folder": spec(tiny_model_folder, lora=str(lora / "model")),
        "run": spec(tiny_model_folder, lora=str(lora)),
        "run alone": spec(lora),
        "none": spec(tiny_model_folder),
        "zero": spec(tiny_model_folder, lora=str(lora), lora_scale=0.0),
        "half": spec(tiny_model_folder, lora=str(lora), lora_scale=0.5),
    }
    drawn = {}
    for name, one in ways.items():
        sample(one, PROMPTS[:2], tmp_path / name, progress=False)
        drawn[name] = pixels(tmp_path / name / "images" / "000000-0.png")
    for name in ("folder", "run", "run alone"):
        assert np.array_equal(drawn[name], drawn["file"])
    assert np.abs(drawn["zero"] - drawn["none"]).max() <= 1
    assert np.abs(drawn["file"] - drawn["none"]).max() > 10
    assert np.abs(drawn["half"] - drawn["file"]).max() > 2 and np.abs(drawn["half"] - drawn["none"]).max() > 2
    facts = json.loads((tmp_path / "run alone" / "sample.json").read_text())
    assert facts["model"] == str(tiny_model_folder) and facts["lora"] == str(lora)
    assert len(facts["settings"]["hashes"]["lora"]) == 64


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scheduler": "dimm"}, "unknown scheduler 'dimm'; did you mean 'ddim'"),
        ({"guidance": -1.0}, "guidance must be at least 0"),
        ({"guidance": float("nan")}, "guidance must be at least 0"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"per_prompt": 0}, "per_prompt must be at least 1"),
        ({"batch": 0}, "batch must be at least 1"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"height": 63}, "height 63 is not a positive multiple of 8"),
        ({"width": 0}, "width 0 is not a positive multiple of 8"),
        ({"lora": "/no/lora"}, "LoRA '/no/lora' does not exist"),
        ({"model": "/no/model"}, "model '/no/model' does not exist"),
        ({"dtype": "fp8"}, "unknown dtype 'fp8'"),
        ({"device": "tpu"}, "unknown device 'tpu'"),
    ],
)
def test_bad_input(change: dict, message: str, tmp_path: Path, tiny_model_folder: Path) -> None:
    with pytest.raises(UserError) as caught:
        sample(SampleSpec(**{"model": str(tiny_model_folder), **change}), PROMPTS, tmp_path / "out", progress=False)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_bad_prompts_and_folders(tmp_path: Path, tiny_model_folder: Path) -> None:
    with pytest.raises(UserError, match="no prompts"):
        sample(spec(tiny_model_folder), [], tmp_path, progress=False)
    with pytest.raises(UserError, match="share one id"):
        sample(spec(tiny_model_folder), [PROMPTS[0], PROMPTS[0]], tmp_path, progress=False)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be used"):
        sample(spec(tiny_model_folder), PROMPTS, tmp_path / "file", progress=False)
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "sample.json").write_text("[]")
    with pytest.raises(UserError, match="is not readable"):
        sample(spec(tiny_model_folder), PROMPTS, tmp_path / "odd", progress=False)


def test_the_trainers_grid_is_what_sampling_draws(tmp_path: Path, tiny_model_folder: Path) -> None:
    """The same DDIM, noise and guidance as `sample`, through the model's own denoiser."""
    model = load(tiny_model_folder)
    calls = []

    def call(x: torch.Tensor, t: torch.Tensor, cond: Cond) -> torch.Tensor:
        calls.append(len(x))
        both = Cond.cat([cond, model.uncond(len(x))])
        output = model.call_unet(model.unet, torch.cat([x, x]), torch.cat([t, t]), both)
        return guide(*output.chunk(2), 7.5)

    cond = model.encode_prompts([p.prompt for p in PROMPTS])
    drawn = sample_model(model, call, cond, [p.id for p in PROMPTS], steps=3, seed=2, batch=2)
    assert calls == [2, 2, 2, 2, 2, 2, 1, 1, 1]
    sample(spec(tiny_model_folder, seed=2), PROMPTS, tmp_path, progress=False)
    for number, image in enumerate(drawn):
        there = pixels(tmp_path / "images" / f"{number:06d}-0.png")
        assert np.abs(np.asarray(image).astype(int) - there).max() <= 1
    wide = sample_model(model, call, cond.take([0]), ["p0"], size=(64, 128), steps=1)
    assert wide[0].size == (128, 64)


def test_grid_places_images_and_labels() -> None:
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    tiles = [Image.new("RGB", (8, 8), colour) for colour in colours]
    sheet = grid(tiles, columns=2, labels=["one", "two", "a very long label that does not fit its cell"], upscale=4)
    assert sheet.size == (2 * 36 + 4, 2 * (32 + 2 * 16 + 4) + 4), "two lines of text above each image"
    assert [sheet.getpixel(at) for at in ((20, 52), (56, 52), (20, 120))] == colours
    assert sheet.crop((4, 4, 36, 36)).getextrema()[0][0] < 100, "the label is there"
    assert grid(tiles[:1]).size == (4 + 192 + 4, 4 + 192 + 4), "small images are enlarged"
    assert grid([Image.new("L", (512, 512))]).size == (520, 520)
    with pytest.raises(ValueError, match="at least one"):
        grid([])
    with pytest.raises(ValueError, match="labels"):
        grid(tiles, labels=["one"])
