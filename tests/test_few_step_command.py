"""Few-step students by command: sampled as recorded, from a hub cache too, begun by the base; and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from command import Result, diffalign
from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler, LCMScheduler
from PIL import Image
from small import write_pairs
from test_few_step import RECORDS, TIMES, draw, student
from tiny import SD_SCHEDULE

from diffalign.eval.prompts import text_id
from diffalign.facts import Facts, find_facts, recorded, student_record
from diffalign.families import load_model, save_merged
from diffalign.keyed import normal
from diffalign.pipelines.few_step import FewStepPipeline
from diffalign.recipe import ModelRecipe

HUB = "some-one/a-student"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def cached(weights: Path, cache: Path) -> Path:
    """A folder as the hub's client keeps a snapshot of the repository ``HUB``."""
    repo = cache / f"models--{HUB.replace('/', '--')}"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(COMMIT)
    shutil.copytree(weights, repo / "snapshots" / COMMIT)
    return cache


def sampled(model: object, out: Path, *options: object, cache: Path | None = None) -> tuple[Result, np.ndarray]:
    code = "" if cache is None else f"import huggingface_hub.constants as c; c.HF_HUB_CACHE = {str(cache)!r}"
    done = diffalign("sample", model, "--prompts", "a cat", "--out", out, *options, "--quiet", code=code)
    assert done.status == 0, done.err
    return done, np.asarray(Image.open(out / "images" / "000000-0.png")).astype(int)


@pytest.fixture(scope="module")
def lora(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return student(tiny_model_folder, tmp_path_factory.mktemp("student"), RECORDS["tdm"])


def test_the_record_of_a_hub_id_is_found(
    tiny_model_folder: Path, lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A LoRA's, by `sample` and by the pipeline; other repositories, cached or not, have none."""
    cache = cached(lora, tmp_path / "hub")
    _, here = sampled(tiny_model_folder, tmp_path / "here", "--lora", lora)
    _, there = sampled(tiny_model_folder, tmp_path / "there", "--lora", HUB, cache=cache)
    assert np.array_equal(here, there)
    said = json.loads((tmp_path / "there" / "sample.json").read_text())["settings"]
    assert said["steps"] == 4 and said["recorded"]["timesteps"] == list(RECORDS["tdm"].timesteps or ())
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    assert recorded(HUB) == recorded(str(tiny_model_folder), HUB) == RECORDS["tdm"]
    assert recorded("some-one/else") is recorded("no/such/id") is recorded("not--a/name") is None
    pipe = FewStepPipeline.of(DiffusionPipeline.from_pretrained(tiny_model_folder), RECORDS["sid"])
    assert np.array_equal(draw(pipe.load_student(HUB)), draw(pipe)) and pipe.record == RECORDS["tdm"]
    (cache / f"models--{HUB.replace('/', '--')}" / "snapshots" / COMMIT / "diffalign.json").unlink()
    assert find_facts(HUB) is None


def test_guidance_is_ignored_and_said(tiny_model_folder: Path, lora: Path, tmp_path: Path) -> None:
    _, plain = sampled(tiny_model_folder, tmp_path / "plain", "--lora", lora)
    done, guided = sampled(tiny_model_folder, tmp_path / "guided", "--lora", lora, "--guidance", "7.5")
    assert np.array_equal(plain, guided)
    assert "guidance 7.5 is ignored: this student was distilled to be sampled without" in done.err


def test_steps_by_the_base_first(tiny_model_folder: Path, lora: Path, tmp_path: Path) -> None:
    """As the pipeline makes them, from the noise that `sample` keys; resumed under the same settings alone."""
    begun = ("--lora", lora, "--base-first", "1", "--base-steps", "5")
    _, found = sampled(tiny_model_folder, tmp_path / "begun", *begun)
    pipe = FewStepPipeline.of(DiffusionPipeline.from_pretrained(tiny_model_folder), RECORDS["tdm"])
    pipe.load_student(str(lora))
    latents = normal((4, 8, 8), 0, "sample", text_id("a cat"), 0)[None]
    wanted = draw(pipe, ["a cat"], latents=latents, base_first=1, base_steps=5, base_guidance=7.0)[0]
    alone = draw(pipe, ["a cat"], latents=latents)[0]
    assert np.abs(found - wanted * 255).max() <= 1 and np.abs(wanted - alone).max() > 0.01
    said = json.loads((tmp_path / "begun" / "sample.json").read_text())["settings"]
    assert (said["base_first"], said["base_steps"], said["base_guidance"]) == (1, 5, 7.0)
    command = ("sample", tiny_model_folder, "--prompts", "a cat", "--out")
    again = diffalign(*command, tmp_path / "begun", "--lora", lora)
    assert again.status == 2 and "holds images of other settings (base_first 1)" in again.line
    for options, part in (
        (("--lora", lora, "--base-first", "5"), "base_first 5 must lie between 0 and the student's 4"),
        (("--base-first", "1"), "base_first is for few-step students"),
        (("--lora", lora, "--base-first", "1", "--scheduler", "ddim"), "base_first is for few-step students"),
        (("--lora", lora, "--base-steps", "5"), "give base_first too"),
    ):
        done = diffalign(*command, tmp_path / "no", *options)
        assert done.status == 2 and part in done.line, options


def test_a_whole_student_is_begun_by_the_base_that_it_names(tiny_model_folder: Path, tmp_path: Path) -> None:
    """One that is its base, at the base's own steps, changes nothing; stock diffusers draws it by the steps' number."""
    record = student_record(SD_SCHEDULE, TIMES, renoise=False)
    model = load_model(ModelRecipe(path=str(tiny_model_folder)), torch.device("cpu"), torch.float32)
    save_merged(model, tmp_path / "run" / "model", record=record)
    facts = Facts(kind="pipeline", sampling=record, recipe={"model": {"path": str(tiny_model_folder)}})
    (tmp_path / "run" / "model" / "diffalign.json").write_text(facts.text())
    _, alone = sampled(tmp_path / "run", tmp_path / "alone")
    begun = ("--base-first", "2", "--base-steps", "4", "--base-guidance", "1")
    _, found = sampled(tmp_path / "run", tmp_path / "begun", *begun)
    assert np.abs(alone - found).max() <= 1
    stock = DiffusionPipeline.from_pretrained(tmp_path / "run" / "model")
    latents = normal((4, 8, 8), 0, "sample", text_id("a cat"), 0)[None]
    plain = draw(stock, ["a cat"], latents=latents, num_inference_steps=4, guidance_scale=0.0)[0]
    assert np.abs(plain * 255 - alone).max() <= 1


@pytest.mark.parametrize("kind", ["renoise", "even"])
def test_stock_pipelines_need_only_the_number_of_even_steps(kind: str, tiny_sdxl_folder: Path, tmp_path: Path) -> None:
    """With the saved scheduler of SDXL: trailing times, either re-noised or deterministic."""
    record = student_record(SD_SCHEDULE, TIMES, renoise=kind == "renoise")
    lora = student(tiny_sdxl_folder, tmp_path / "s", record)
    stock = DiffusionPipeline.from_pretrained(tiny_sdxl_folder)
    ours = draw(FewStepPipeline.of(stock, record).load_student(str(lora)))
    saved = {"LCMScheduler": LCMScheduler, "DPMSolverMultistepScheduler": DPMSolverMultistepScheduler}[record.scheduler]
    stock.scheduler = saved.from_pretrained(lora, subfolder="scheduler")
    assert np.abs(draw(stock, num_inference_steps=4, guidance_scale=0.0) - ours).max() < 1e-5


REFUSED: dict[str, tuple[str, list[str], str]] = {
    "times that rise": ("dmd2", ["method.timesteps=[249,499]"], "the student's times must fall"),
    "times beyond the schedule": (
        "dmd2",
        ["method.timesteps=[1200,499]"],
        "timestep 1200 is beyond the scheduler's range",
    ),
    "a GAN without pictures": (
        "dmd2",
        ["method.gan_weight=0.1", "data.path=tiny-train"],
        "the GAN learns from real captioned pictures; method.gan_weight=0 needs prompts alone",
    ),
    "a rate for nobody": ("dmd2", ["train.role_lr.fak=1e-4"], "did you mean 'fake'?"),
    "more steps than the student has": (
        "pso",
        ["method.timesteps=[999,749,499,249]", "model.loras=[{path: ONE}]"],
        "trains 4 steps, but the student",
    ),
    "a student of another prediction": (
        "pso",
        ["model.loras=[{path: V}]"],
        "distilled from a model of prediction v_prediction and this base has epsilon",
    ),
}


@pytest.fixture(scope="module")
def place(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("refused")
    write_pairs(folder / "PAIRS", 4)
    student(tiny_model_folder, folder / "ONE", student_record(SD_SCHEDULE, [399]))
    student(tiny_model_folder, folder / "V", student_record({**SD_SCHEDULE, "prediction_type": "v_prediction"}, TIMES))
    return folder


SHOWN = ("times beyond the schedule", "more steps than the student has")  # of the plan, the rest is slow


@pytest.mark.parametrize(
    ("case", "command"),
    [
        *((case, ()) for case in REFUSED),
        *(pytest.param(case, ("--plan",), marks=[] if case in SHOWN else pytest.mark.slow) for case in REFUSED),
    ],
)
def test_what_no_student_can_be_trained_with(
    case: str, command: tuple[str, ...], tiny_model_folder: Path, place: Path, tmp_path: Path
) -> None:
    """One line, exit 2, by training and by its plan; nothing is left."""
    recipe, settings, said = REFUSED[case]
    settings = [text.replace("{path: ", f"{{path: {place}/") for text in settings]
    given = [f"model.path={tiny_model_folder}", f"data.path={place / 'PAIRS'}", f"output.dir={tmp_path / 'run'}"]
    done = diffalign("train", f"tiny/{recipe}", *given, f"data.cache_dir={tmp_path / 'cache'}", *settings, *command)
    assert done.status == 2 and said in done.line, done.err
    assert not (tmp_path / "run" / "model").exists()
