"""Few-step students draw as they are recorded: here, in plain diffusers, by `sample`, on training's sheets."""

from __future__ import annotations

import json
import shutil
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    LCMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from tiny import SD_SCHEDULE

from diffalign.denoiser import Denoiser
from diffalign.errors import Note, UserError
from diffalign.eval.prompts import Prompt
from diffalign.export import save_scheduler
from diffalign.facts import Facts, SamplingRecord, student_record
from diffalign.families import load_model, save_lora
from diffalign.families.guidance import embedding_width
from diffalign.keyed import normal
from diffalign.pipelines.few_step import FewStepPipeline
from diffalign.pipelines.sample import sample, sample_model
from diffalign.pipelines.spec import SampleSpec
from diffalign.recipe import LoraFile, ModelRecipe

FILE = Path(__file__).parents[1] / "pipelines" / "few_step.py"
TIMES = (999, 749, 499, 249)
RECORDS = {
    "renoise": student_record(SD_SCHEDULE, TIMES),
    "sid": student_record(SD_SCHEDULE, (625, 468, 312, 156), scale=0.928564),
    "tdm": student_record(SD_SCHEDULE, (899, 674, 449, 224), renoise=False),
}
PROMPTS = ["a cat", "two dogs"]


def student(folder: Path, out: Path, record: SamplingRecord, seed: int = 0) -> Path:
    """A strong random LoRA for the model in ``folder``, saved as a run saves it."""
    model = load_model(ModelRecipe(path=str(folder)), torch.device("cpu"), torch.float32)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=model.lora_targets("all"))
    model.unet.add_adapter(config, adapter_name="student")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.unet.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    save_lora(get_peft_model_state_dict(model.unet, adapter_name="student"), config, out)
    save_scheduler(record, out)
    (out / "diffalign.json").write_text(Facts(kind="lora", sampling=record).text())
    return out


def opened(folder: Path) -> FewStepPipeline:
    pipe = DiffusionPipeline.from_pretrained(folder, custom_pipeline=str(FILE), trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: Any, prompts: list[str] = PROMPTS, seed: int = 3, **options: Any) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    return pipe(prompts, generator=torch.Generator().manual_seed(seed), output_type="np", **options).images


@pytest.fixture(params=["sd", "sdxl"])
def base(request: pytest.FixtureRequest, tiny_model_folder: Path, tiny_sdxl_folder: Path) -> Path:
    return tiny_model_folder if request.param == "sd" else tiny_sdxl_folder


@pytest.mark.parametrize("kind", RECORDS)
def test_the_default_call_is_a_stock_pipeline_at_the_recorded_times(kind: str, base: Path, tmp_path: Path) -> None:
    """With the saved scheduler and given times; LCM's own spacing, or guidance, draws something else."""
    record = RECORDS[kind]
    lora = student(base, tmp_path / "run" / "model", record)
    ours = draw(opened(base).load_student(str(tmp_path / "run")))
    stock = DiffusionPipeline.from_pretrained(base)
    assert isinstance(stock, StableDiffusionPipeline | StableDiffusionXLPipeline)
    stock.load_lora_weights(lora)
    cls = DPMSolverMultistepScheduler if kind == "tdm" else LCMScheduler
    stock.scheduler = cls.from_pretrained(lora, subfolder="scheduler")
    stock.scheduler.init_noise_sigma = record.scale
    there = draw(stock, timesteps=list(record.timesteps or ()), guidance_scale=0.0)
    assert np.abs(ours - there).max() < 1e-6
    stock.scheduler = LCMScheduler.from_config(DiffusionPipeline.from_pretrained(base).scheduler.config)
    trap = draw(stock, num_inference_steps=4, guidance_scale=1.0)
    assert stock.scheduler.timesteps.tolist() == [999, 759, 499, 259]
    assert np.abs(ours - trap).max() > 0.01


def test_saved_schedulers_know_even_times_by_their_number() -> None:
    for times in (TIMES, (999, 499), (999,)):
        scheduler = LCMScheduler.from_config(student_record(SD_SCHEDULE, times).scheduler_config())
        scheduler.set_timesteps(len(times))
        assert tuple(scheduler.timesteps.tolist()) == times


def test_what_plain_schedulers_do_is_the_denoisers_arithmetic() -> None:
    """Re-noising: x0, then new noise at the next time. Deterministic: DDIM from time to time, the last jump to x0."""
    denoiser = Denoiser.from_config(SD_SCHEDULE)
    start = normal((2, 4, 8, 8), 0, "start")
    predict = lambda x, t: torch.tanh(x) * (0.2 + t.view(-1, 1, 1, 1) / 1000)  # noqa: E731
    for kind in ("tdm", "sid"):
        record = RECORDS[kind]
        assert record.timesteps is not None
        scheduler = (DPMSolverMultistepScheduler if kind == "tdm" else LCMScheduler).from_config(record.config)
        scheduler.set_timesteps(timesteps=list(record.timesteps))
        x = mine = start * record.scale
        ours, theirs = torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)
        for k, t in enumerate(record.timesteps):
            time = torch.full((2,), t)
            x = scheduler.step(predict(x, time), t, x, generator=theirs).prev_sample
            output, last = predict(mine, time), k == 3
            if kind == "tdm":
                x0, eps = denoiser.to_x0(output, mine, t), denoiser.to_eps(output, mine, t)
                mine = x0 if last else denoiser.add_noise(x0, eps, record.timesteps[k + 1])
            else:
                x0 = denoiser.to_x0(output, mine, t)
                fresh = None if last else torch.randn(x0.shape, generator=ours)
                mine = x0 if fresh is None else denoiser.add_noise(x0, fresh, record.timesteps[k + 1])
        torch.testing.assert_close(x, mine, rtol=1e-4, atol=2e-5)


def test_fewer_steps_pick_among_the_recorded_times_and_more_are_refused() -> None:
    record = RECORDS["renoise"]
    assert record.times(2) == (999, 499) and record.times(1) == (999,) and record.times(3) == (999, 749, 499)
    one = student_record(SD_SCHEDULE, [399])
    with pytest.raises(UserError, match=r"made for 1 step .at 399., not for 4"):
        one.call(4)
    with pytest.raises(UserError, match="not for 8"):
        SampleSpec("m", steps=8).filled(record)
    assert SampleSpec("m", steps=8, scheduler="lcm").filled(record).steps == 8, "by hand everything goes"


@pytest.mark.parametrize(
    ("times", "said"),
    [((249, 499), "timesteps must fall"), ((1000, 499), "beyond the scheduler's range"), ((499, -1), "greater than")],
)
def test_wrong_times_are_said_in_a_line(times: tuple[int, ...], said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        student_record(SD_SCHEDULE, times)
    assert "\n" not in str(caught.value)


def test_guidance_given_to_a_guidance_free_student_is_ignored_and_said(tiny_model_folder: Path, tmp_path: Path) -> None:
    lora = student(tiny_model_folder, tmp_path / "s", RECORDS["renoise"])
    pipe = opened(tiny_model_folder).load_student(str(lora))
    plain = draw(pipe)
    with pytest.warns(Note, match="guidance 7.5 is ignored"):
        assert np.array_equal(draw(pipe, guidance_scale=7.5), plain)
    with pytest.warns(Note, match="guidance 4 is ignored"):
        sample(
            SampleSpec(str(tiny_model_folder), str(lora), guidance=4.0),
            [Prompt("p", "a cat")],
            tmp_path / "out",
            progress=False,
        )
    with warnings.catch_warnings():
        warnings.simplefilter("error", Note)
        assert SampleSpec("m", guidance=4.0, scheduler="ddim").filled(RECORDS["tdm"]).guidance == 4.0
        assert SampleSpec("m").filled(RECORDS["tdm"]).guidance == 1.0


@pytest.mark.parametrize("kind", ["sid", "tdm"])
def test_sheets_of_training_and_sample_draw_the_same(kind: str, tiny_model_folder: Path, tmp_path: Path) -> None:
    record = RECORDS[kind]
    lora = student(tiny_model_folder, tmp_path / "s", record)
    manifest = sample(
        SampleSpec(str(tiny_model_folder), str(lora)),
        [Prompt(p, p) for p in PROMPTS],
        tmp_path / "out",
        progress=False,
    )
    recipe = ModelRecipe(path=str(tiny_model_folder), loras=[LoraFile(path=str(lora))])
    model = load_model(recipe, torch.device("cpu"), torch.float32)
    call = partial(model.call_unet, model.unet)
    drawn = sample_model(model, call, model.encode_prompts(PROMPTS), PROMPTS, record=record)
    from PIL import Image

    for k, image in enumerate(drawn):
        file = np.asarray(Image.open(manifest.parent / "images" / f"00000{k}-0.png")).astype(int)
        assert np.abs(np.asarray(image).astype(int) - file).max() <= 2


def test_diversity_distillation_hands_over_at_the_students_own_time(base: Path, tmp_path: Path) -> None:
    """Split 0 is the student, the end the base alone; a base that is the student, sampled alike, changes nothing."""
    lora = student(base, tmp_path / "s", RECORDS["tdm"])
    pipe = opened(base).load_student(str(lora))
    alone, whole = draw(pipe, base_first=0), draw(pipe, base_first=4, base_steps=5)
    assert np.array_equal(alone, draw(pipe))
    plain = DiffusionPipeline.from_pretrained(base)
    plain.scheduler = DPMSolverMultistepScheduler.from_config(RECORDS["tdm"].config)
    assert np.abs(draw(plain, num_inference_steps=5, guidance_scale=7.0) - whole).max() < 1e-5
    parts = [draw(pipe, base_first=k, base_steps=5) for k in (1, 3)]
    assert all(np.abs(a - b).max() > 1e-3 for a, b in zip([alone, *parts], [*parts, whole], strict=True))
    # the adapters are back, and the same noise gives the same pictures
    assert np.array_equal(draw(pipe), alone)

    even = student_record(SD_SCHEDULE, TIMES, renoise=False)
    same = FewStepPipeline.of(DiffusionPipeline.from_pretrained(base), even)
    same.register_modules(base_unet=same.unet)
    for split in (1, 4):
        mixed = draw(same, base_first=split, base_steps=4, base_guidance=1.0)
        assert np.abs(mixed - draw(same)).max() < 1e-5
    merged = FewStepPipeline.of(DiffusionPipeline.from_pretrained(base), even)
    with pytest.raises(UserError, match="base_unet"):
        draw(merged, base_first=1)
    for wrong, said in (({"base_first": 5}, "base_first 5"), ({"base_first": 1, "base_steps": 0}, "base_steps")):
        with pytest.raises(UserError, match=said):
            draw(pipe, **wrong)


def test_the_first_noise_is_scaled_once(tiny_model_folder: Path, tmp_path: Path) -> None:
    """Given unit noise, SiD's student starts from sigma times it; after a base's steps nothing is scaled."""
    lora = student(tiny_model_folder, tmp_path / "s", RECORDS["sid"])
    pipe = opened(tiny_model_folder).load_student(str(lora))
    seen: list[torch.Tensor] = []
    hook = pipe.unet.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    noise = normal((1, 4, 8, 8), 1, "noise")
    draw(pipe, ["a cat"], latents=noise)
    torch.testing.assert_close(seen[0], 0.928564 * noise)
    seen.clear()
    draw(pipe, ["a cat"], latents=noise, base_first=1, base_steps=1, base_guidance=1.0)
    hook.remove()
    torch.testing.assert_close(seen[0], noise)
    denoiser = Denoiser.from_config(SD_SCHEDULE)
    with torch.no_grad(), pipe._as_base(pipe):
        text, _ = pipe.stock.encode_prompt(["a cat"], "cpu", 1, False)
        output = pipe.unet(noise, 999, encoder_hidden_states=text).sample
    x0, eps = denoiser.to_x0(output, noise, 999), denoiser.to_eps(output, noise, 999)
    torch.testing.assert_close(seen[1], denoiser.add_noise(x0, eps, 468), rtol=1e-4, atol=1e-4)


def test_a_student_takes_the_place_of_the_one_before(tiny_model_folder: Path, tmp_path: Path) -> None:
    """Again and again, at any weight; one that does not fit leaves the one before as it was."""
    one = student(tiny_model_folder, tmp_path / "1", RECORDS["renoise"])
    two = student(tiny_model_folder, tmp_path / "2", RECORDS["tdm"], seed=1)
    alone = {lora: draw(opened(tiny_model_folder).load_student(str(lora))) for lora in (one, two)}
    assert np.abs(alone[one] - alone[two]).max() > 0.01
    pipe = opened(tiny_model_folder)
    for lora in (one, two, one, two):
        assert np.array_equal(draw(pipe.load_student(str(lora))), alone[lora])
        assert len(pipe.unet.peft_config) == 1
    assert np.abs(draw(pipe.load_student(str(two), weight=0.5)) - alone[two]).max() > 1e-3
    half = draw(pipe)
    (file,) = one.glob("*.safetensors")
    weights = load_file(file)
    wide = {k: torch.zeros(4, 9) if k.endswith("to_q.lora_A.weight") else v for k, v in weights.items()}
    for state, said in (({"unet.nowhere.lora_A.weight": torch.zeros(4, 8)}, "nowhere"), (wide, "does not fit")):
        wrong = tmp_path / said.replace(" ", "")
        shutil.copytree(one, wrong)
        save_file(state, wrong / file.name, metadata={"format": "pt"})
        with pytest.raises(UserError, match=said):
            pipe.load_student(str(wrong))
        assert np.array_equal(draw(pipe), half) and len(pipe.unet.peft_config) == 1
    assert np.array_equal(draw(pipe.load_student(str(one))), alone[one])


def test_a_student_that_is_not_told_guidance_follows_one_that_is(tiny_model_folder: Path, tmp_path: Path) -> None:
    """The embedding that the first one brought goes with it; one that does not fit brings none."""
    plain = student(tiny_model_folder, tmp_path / "plain", RECORDS["renoise"])
    told = tmp_path / "told"
    shutil.copytree(plain, told)
    (file,) = told.glob("*.safetensors")
    pipe = opened(tiny_model_folder)
    inner = pipe.unet.time_embedding.linear_1.in_features
    down, up = torch.zeros(4, 32), torch.ones(inner, 4)
    name = "unet.time_embedding.cond_proj.lora_"
    save_file({**load_file(file), f"{name}A.weight": down, f"{name}B.weight": up}, file, metadata={"format": "pt"})
    facts = json.loads((told / "diffalign.json").read_text())
    facts["sampling"] |= {"told": [1.0, 8.0], "guidance": 4.0}
    (told / "diffalign.json").write_text(json.dumps(facts))
    broken = tmp_path / "broken"
    shutil.copytree(told, broken)
    nowhere = {f"{name}A.weight": down, f"{name}B.weight": up, "unet.nowhere.lora_A.weight": torch.zeros(4, 8)}
    save_file(nowhere, broken / file.name, metadata={"format": "pt"})

    alone = draw(opened(tiny_model_folder).load_student(str(plain)))
    with pytest.raises(UserError, match="nowhere"):
        pipe.load_student(str(plain)).load_student(str(broken))
    assert np.array_equal(draw(pipe), alone) and embedding_width(pipe.unet) == 0
    draw(pipe.load_student(str(told)))
    assert embedding_width(pipe.unet) == 32
    assert np.array_equal(draw(pipe.load_student(str(plain))), alone)
    assert embedding_width(pipe.unet) == 0 and draw(pipe, base_first=1).shape == alone.shape


def test_a_student_of_another_prediction_type_is_refused(tiny_model_folder: Path, tmp_path: Path) -> None:
    """Its LoRA would load, and draw noise: by the pipeline and by `sample`."""
    shutil.copytree(tiny_model_folder, tmp_path / "v")
    file = tmp_path / "v" / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "prediction_type": "v_prediction"}))
    lora = student(tiny_model_folder, tmp_path / "s", RECORDS["tdm"])
    with pytest.raises(UserError, match="of prediction epsilon and this base has v_prediction"):
        opened(tmp_path / "v").load_student(str(lora))
    with pytest.raises(UserError, match="base that it was made for"):
        sample(SampleSpec(str(tmp_path / "v"), str(lora)), [Prompt("p", "p")], tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_no_record_is_said(tiny_model_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="records no few-step sampler"):
        opened(tiny_model_folder)("a cat")
    lora = student(tiny_model_folder, tmp_path / "s", RECORDS["tdm"])
    (lora / "diffalign.json").unlink()
    with pytest.raises(UserError, match="records no few-step sampler"):
        opened(tiny_model_folder).load_student(str(lora))
