"""Guidance distillation (AGD, LoRA): what is regressed on, what is trained, and that w is the guidance of diffusers."""

from __future__ import annotations

import re
import warnings
from importlib import resources
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from gauss import LearnedFake, World, level
from peft import LoraConfig
from tiny import tiny_pipeline, tiny_sdxl_pipeline, tiny_unet
from torch import Tensor
from world import batch_of, forward, make_trainer, rows_of, stirred, warm

from diffalign.data.batch import Cond
from diffalign.denoiser import Denoiser
from diffalign.errors import Note, UserError
from diffalign.eval.prompts import Prompt
from diffalign.families import load_model
from diffalign.families.extras import load_extra, save_extra
from diffalign.families.guidance import (
    EMBEDDING,
    GUIDANCE,
    UNITS,
    GuidanceAdapters,
    guidance_embedding,
    in_units,
    widths_of,
)
from diffalign.keyed import normal
from diffalign.methods import make_method
from diffalign.methods.distillation.agd import AGD, guidance_loss
from diffalign.methods.distillation.lora_guidance import LoraGuidance
from diffalign.pipelines.distilled_guidance import DistilledGuidancePipeline
from diffalign.pipelines.extras import apply_extra
from diffalign.pipelines.few_step import FewStepPipeline
from diffalign.pipelines.sample import sample
from diffalign.pipelines.spec import SampleSpec
from diffalign.recipe import ModelRecipe, load_recipe
from diffalign.run import train

ROOT = Path(str(resources.files("diffalign.assets")))
FILE = Path(str(resources.files("diffalign.pipelines"))) / "distilled_guidance.py"
SMALL = {"hidden": 8, "heads": 2, "steps": 4, "updates": 2}


def latents(*key: Any) -> Tensor:
    return normal((2, 4, 8, 8), *key)


# ---- what is regressed on -------------------------------------------------------------------------------------------


def test_the_target_is_diffusers_guidance() -> None:
    """w = 1 is the conditional branch, w = 0 the other; three ones and a zero tell every wrong reading apart."""
    c, u = torch.ones(1, 1, 2, 2), torch.zeros(1, 1, 2, 2)
    for w, target in ((0.0, 0.0), (1.0, 1.0), (3.0, 3.0)):
        error, unguided = guidance_loss(torch.full_like(c, target), c, u, w)
        assert float(error) == 0 and float(unguided) == (w - 1) ** 2
    c, u, w = latents("c"), latents("u"), torch.tensor([2.0, 5.0])
    _, unguided = guidance_loss(c, c, u, w.view(-1, 1, 1, 1))
    torch.testing.assert_close(unguided, (w - 1) ** 2 * (c - u).square().mean((1, 2, 3)))


def test_no_gradient_reaches_the_teacher() -> None:
    c, u, output = (latents(name).requires_grad_() for name in ("c", "u", "o"))
    guidance_loss(output, c, u, 3.0)[0].sum().backward()
    assert c.grad is None and u.grad is None and output.grad is not None
    for name, options in (("agd", SMALL), ("lora_guidance", {})):
        trainer = stirred(make_trainer(make_method(name, options)))
        trainer.roles.train_only(("student",))
        trainer.roles.unet.conv_out.weight.requires_grad_()  # a weight that teacher and student share
        trainer.ctx.phase = trainer.method.phases[0].name
        loss = trainer.method.loss(trainer.ctx, batch_of(trainer), trainer.method.phases[0])
        loss.values.sum().backward()
        mine = trainer.roles.unet.conv_out.weight.grad.clone()
        # the same gradient when the teacher's predictions are constants: none came through them
        trainer.roles.unet.conv_out.weight.grad = None
        plain = trainer.ctx.branches
        trainer.ctx.branches = lambda *a, plain=plain, **k: tuple(x.detach() for x in plain(*a, **k))  # type: ignore[method-assign]
        trainer.method.loss(trainer.ctx, batch_of(trainer), trainer.method.phases[0]).values.sum().backward()
        assert torch.equal(mine, trainer.roles.unet.conv_out.weight.grad)


def test_at_the_start_the_loss_is_what_guidance_adds() -> None:
    """A LoRA of zeros is the conditional branch: (w - 1)^2 mean (c - u)^2, and nothing at w = 1."""
    for w in (1.0, 4.0):
        trainer = make_trainer(make_method("lora_guidance", {"guidance": w}))
        ctx, batch, phase = trainer.ctx, rows_of(trainer), trainer.method.phases[0]
        with torch.no_grad():
            loss = trainer.method.loss(ctx, batch, phase)
            t, noise = ctx.draw(batch)
            x_t, cond = ctx.denoiser.add_noise(batch.latents["image"], noise, t), batch.cond["prompt"]
            c, u = (ctx.model("base", x_t, t, each) for each in (cond, ctx.uncond.expand(4)))
        expected = (w - 1) ** 2 * (c - u).square().mean((1, 2, 3))
        torch.testing.assert_close(loss.values, expected, rtol=1e-4, atol=1e-9)
        torch.testing.assert_close(loss.metrics["unguided_error"], expected, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_a_gaussian_student_learns_the_guided_teacher(prediction: str) -> None:
    """With N(1.5, s^2) and without N(.5, s^2): guided by 4 it is N(.5 + 4, s^2), exactly (sheet 3.7)."""
    world = World(make_method("lora_guidance", {"guidance": 4.0}), m_c=1.5, m_u=0.5, prediction=prediction)
    student = LearnedFake(1.5, 0.9)
    student.denoiser = world.ctx.denoiser
    world.roles.networks["student"] = student
    world.roles._parameters["student"] = dict(student.named_parameters())
    optimizer = torch.optim.Adam(student.parameters(), lr=0.1)
    for visit in range(120):
        world.gradient("main", visit)
        optimizer.step()
    assert float(student.mean.detach()) == pytest.approx(4.5, abs=0.05)
    assert float(student.log_std.detach().exp()) == pytest.approx(0.7, abs=0.05)


def test_trajectories_are_those_of_the_guided_gaussian() -> None:
    """Along the exact flow of N(m_u + w (m_c - m_u), s^2) the standardised x_t is constant; kept besides are the
    branches' predictions at these points."""
    world = World(make_method("lora_guidance", {}), m_c=1.5, m_u=0.5, rows=3)
    method = AGD(AGD.Config(guidance=(2.0, 6.0), steps=250))
    found = method.collect(world.ctx, world.batch(0))
    assert len(found) == 250 * 3 and len(set(found.ids)) == 750 and found.metrics == {}
    t, w = found.columns["t"], found.columns["w"]
    assert w[:3].equal(w[-3:]) and bool(((w >= 2) & (w <= 6)).all()) and len(set(w.tolist())) == 3
    assert int(t.min()) < 4 and int(t.max()) >= 996 and bool((t[:-3] - t[3:] == 4).all())
    alpha, sigma = level(t)
    x, c, u = (found.latents[name].float() for name in ("x_t", "cond", "uncond"))
    mean = (0.5 + w).view(-1, 1, 1, 1)
    scaled = (x - alpha * mean) / (alpha**2 * 0.49 + sigma**2).sqrt()
    drift = (scaled.view(250, 3, 16, 16) - scaled[:3, 0]).abs().amax((1, 2, 3))
    assert float(drift.max()) < 0.08, "a guidance of w - 1 or w + 1, or of swapped branches, drifts by 1 and more"
    for said, m in ((c, 1.5), (u, 0.5)):
        exact = (x - alpha * m) * sigma / (alpha**2 * 0.49 + sigma**2)
        torch.testing.assert_close(said, exact, rtol=1e-2, atol=1e-2)


def test_a_round_is_trained_on_once_and_its_items_are_told_their_own_guidance() -> None:
    trainer = stirred(make_trainer(make_method("agd", SMALL)))
    assert trainer.method.repeats(trainer.method.phases[0]) == 2 == trainer.method.parts(trainer.method.phases[0])
    batch = batch_of(trainer)
    seen: list[Tensor] = []
    plain = trainer.roles.forward

    def spied(unet: UNet2DConditionModel, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        seen.append(cond.added[GUIDANCE])
        return plain(unet, x, t, cond)

    trainer.roles.forward = spied
    values = trainer.method.loss(trainer.ctx, batch, trainer.method.phases[0]).values
    torch.testing.assert_close(seen[0][:, 0] / UNITS, batch.columns["w"], rtol=0, atol=1e-4)
    batch.columns["w"] = batch.columns["w"] + 1
    assert not torch.allclose(trainer.method.loss(trainer.ctx, batch, trainer.method.phases[0]).values, values)


# ---- adapters -------------------------------------------------------------------------------------------------------


def adapters(unet: UNet2DConditionModel, stir: float = 0.0, **options: Any) -> GuidanceAdapters:
    made = GuidanceAdapters(widths_of(unet), int(unet.config.cross_attention_dim), 16, 2, **options)
    with torch.no_grad():
        for k, parameter in enumerate(made.parameters()):
            parameter.add_(stir * normal((parameter.numel(),), "stir", k).view_as(parameter))
    return made


def test_new_adapters_are_the_conditional_model_and_trained_ones_leave_the_base_as_it_was() -> None:
    unet = tiny_unet(cross=16)
    x, t, text = latents("x"), torch.tensor([100, 700]), normal((2, 5, 16), "text")
    plain = forward(unet, x, t, Cond(text))
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    part = adapters(unet)
    part.attach(unet)
    part.on = True
    told = Cond(text, {GUIDANCE: in_units(torch.tensor([7.5, 3.0]))})
    assert torch.equal(forward(unet, x, t, told), plain)
    part.detach()
    trainer = warm(make_trainer(make_method("agd", SMALL)), 2)
    base = trainer.roles("base", x, t, Cond(normal((2, 5, 16), "text")))
    fresh = make_trainer(make_method("agd", SMALL))
    assert torch.equal(base, fresh.roles("base", x, t, Cond(text)))
    assert all(torch.equal(value, before[name]) for name, value in unet.state_dict().items())


@pytest.mark.parametrize("seen", [(True, True), (True, False), (False, True), (False, False)])
def test_adapters_see_what_they_are_told(seen: tuple[bool, bool]) -> None:
    """Guidance always; of the same features, the time and the prompt only where they are tokens."""
    unet = tiny_unet(cross=16)
    part = adapters(unet, 0.3, sees_time=seen[0], sees_prompt=seen[1])
    added = {GUIDANCE: in_units(torch.tensor([7.5]))}
    t, text = torch.tensor([300]), normal((1, 5, 16), "text")

    def tokens(t: Tensor, added: dict[str, Tensor], text: Tensor) -> Tensor:
        return part.condition(text, part.enter(1, t, added))[1]

    first = tokens(t, added, text)
    assert first.shape == (1, 1 + seen[0] + 5 * seen[1], 16)
    assert not torch.equal(first, tokens(t, {GUIDANCE: in_units(torch.tensor([7.4]))}, text))
    assert torch.equal(first, tokens(t + 1, added, text)) != seen[0]
    assert torch.equal(first, tokens(t, added, text + 1)) != seen[1]
    part.choose(7.5)
    assert torch.equal(first, tokens(t, {}, text))


def test_guidance_keeps_its_value_in_half_precision() -> None:
    """What bf16 holds of 7.37 is 7.375; whole numbers are not cast."""
    w = torch.tensor([7.37, 11.93])
    told = Cond(latents("x")[:, 0], {GUIDANCE: in_units(w)}).to(dtype=torch.bfloat16)
    torch.testing.assert_close(told.added[GUIDANCE][:, 0] / UNITS, w, rtol=0, atol=1e-4)


def opened(folder: str | Path) -> DistilledGuidancePipeline:
    pipe = DiffusionPipeline.from_pretrained(folder, custom_pipeline=str(FILE), trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: Any, **options: Any) -> Tensor:
    side = pipe.unet.config.sample_size
    noise = normal((2, 4, side, side), "noise")
    return pipe(
        ["a red circle", "a star"], latents=noise, num_inference_steps=3, output_type="latent", **options
    ).images


@pytest.mark.parametrize("name", ["tiny-sd", "tiny-sdxl"])
def test_the_pipeline_takes_w_and_half_the_calls(name: str, tmp_path: Path) -> None:
    pipe = opened(ROOT / name)
    rows: list[int] = []
    pipe.unet.conv_in.register_forward_hook(lambda module, args, output: rows.append(len(output)))
    plain = draw(pipe.stock, guidance_scale=1.0)
    save_extra(adapters(pipe.unet), tmp_path / "new")
    pipe.load_adapters(tmp_path / "new")
    assert torch.equal(draw(pipe), plain)
    save_extra(adapters(pipe.unet, 0.2), tmp_path / "run" / "model")
    pipe.load_adapters(tmp_path / "run")
    rows.clear()
    some = [draw(pipe, guidance_scale=w) for w in (2.0, 7.5)]
    assert rows == [2] * 6, "one forward a step"
    assert float((some[0] - some[1]).abs().max()) > 1e-4 and float((some[0] - plain).abs().max()) > 1e-3
    with torch.no_grad():
        result = pipe("a star", guidance_scale=3.0, num_inference_steps=1, output_type="latent")
    assert result.guidance == 3.0 and pipe.adapters is not None and pipe.adapters.chosen == 3.0
    assert torch.equal(draw(pipe, guidance_scale=7.5), some[1])
    pipe.adapters.on = False
    assert torch.equal(draw(pipe.stock, guidance_scale=1.0), plain)


def test_adapters_go_with_a_lora() -> None:
    unet = tiny_unet(cross=16)
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    part = adapters(unet, 0.2)
    part.attach(unet)
    x, t, cond = latents("x"), torch.tensor([100, 700]), Cond(normal((2, 5, 16), "text"))
    outputs = []
    for on, lora in ((True, True), (True, False), (False, True), (False, False)):
        part.on = on
        (unet.enable_adapters if lora else unet.disable_adapters)()
        outputs.append(forward(unet, x, t, cond).detach())
    assert all(float((a - b).abs().max()) > 1e-3 for k, a in enumerate(outputs) for b in outputs[:k])


def test_sampling_records_the_guidance_that_adapters_are_told(tmp_path: Path) -> None:
    unet = load_model(ModelRecipe(path="tiny-sd"), torch.device("cpu"), torch.float32).unet
    save_extra(adapters(unet, 0.2), tmp_path / "run" / "model")
    rows: list[int] = []
    prompts, pictures = [Prompt("0", "a cat"), Prompt("1", "a dog")], {}
    plain = UNet2DConditionModel.forward

    def counted(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        rows.append(len(x))
        return plain(self, x, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(UNet2DConditionModel, "forward", counted)
        for w in (2.0, 6.0):
            out = tmp_path / f"{w:g}"
            spec = SampleSpec(model="tiny-sd", lora=str(tmp_path / "run"), steps=2, guidance=w, device="cpu")
            sample(spec, prompts, out, progress=False)
            assert f'"guidance": {w}' in (out / "sample.json").read_text()
            pictures[w] = (out / "images" / "000000-0.png").read_bytes()
    assert rows == [2] * 4 and pictures[2.0] != pictures[6.0]
    with pytest.raises(UserError, match="no unconditional branch for a negative prompt"):
        spec = SampleSpec(model="tiny-sd", lora=str(tmp_path / "run"), steps=2, negative_prompt="bad", device="cpu")
        sample(spec, prompts, tmp_path / "negative", progress=False)


def test_bad_input_is_one_line(tmp_path: Path) -> None:
    pipe, other = tiny_pipeline(), tiny_sdxl_pipeline()
    save_extra(adapters(pipe.unet), tmp_path / "sd1")
    save_extra(adapters(pipe.unet, prediction="v_prediction"), tmp_path / "v")
    mine = DistilledGuidancePipeline.of(pipe)
    wrong = {
        "no guidance adapters yet": lambda: mine("a cat"),
        "is for another network": lambda: load_extra(tmp_path / "sd1" / "extra.safetensors", other.unet),
        "made for a model of prediction v_prediction": lambda: apply_extra(pipe, tmp_path / "v"),
        "know no users": lambda: apply_extra(pipe, tmp_path / "sd1", user="ann"),
        "negative prompt": lambda: mine.load_adapters(tmp_path / "sd1")("a cat", negative_prompt="bad"),
        "at least 0": lambda: mine("a cat", guidance_scale=-1.0),
        "no multiple of method.heads": lambda: GuidanceAdapters({}, 8, 10, 4),
        "rising numbers": lambda: load_recipe("tiny/agd", ["method.guidance=[5,2]"]),
        "more than the schedule's": lambda: make_method("agd", {"steps": 2000}).check(mine_denoiser()),
        "flow models do not": lambda: make_method("agd", {}).check(SimpleNamespace(prediction="flow")),  # type: ignore[arg-type]
    }
    for text, call in wrong.items():
        with pytest.raises(UserError, match=re.escape(text)) as caught:
            call()
        assert "\n" not in str(caught.value)
    with pytest.warns(Note, match="outside of 1 to 12"):
        apply_extra(pipe, tmp_path / "sd1").choose(15.0)  # type: ignore[attr-defined]


def mine_denoiser() -> Denoiser:
    return Denoiser.from_config(tiny_pipeline().scheduler.config)


# ---- one guidance, built in, or told to a network that has an embedding for it --------------------------------------


def test_a_lora_student_is_recorded_as_one_that_takes_no_guidance() -> None:
    pipe = tiny_pipeline()
    record = make_method("lora_guidance", {}).sampling(pipe.scheduler.config)
    assert record is not None and not record.guided and record.steps == 25 and record.timesteps is None
    rows: list[int] = []
    pipe.unet.conv_in.register_forward_hook(lambda module, args, output: rows.append(len(output)))
    student = FewStepPipeline.of(pipe, record)
    student.set_progress_bar_config(disable=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Note)
        student("a cat", num_inference_steps=4, guidance_scale=7.5, output_type="latent")
    assert rows == [1] * 4


def test_a_guidance_embedding_is_diffusers_own(tiny_model_folder: Path) -> None:
    pipe, w = tiny_pipeline(), torch.tensor([1.0, 7.5, 12.0])
    for width in (32, 33):
        theirs = pipe.get_guidance_scale_embedding(w - 1, embedding_dim=width)
        torch.testing.assert_close(guidance_embedding(w, width), theirs, rtol=1e-5, atol=2e-3)  # angles up to 11000
    plain = make_method("lora_guidance", {"guidance_range": [3.0, 12.0]})
    with pytest.raises(UserError, match="asks for a guidance embedding, and this U-Net has none") as caught:
        plain.build(SimpleNamespace(unet=tiny_unet(cross=16)))  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    model = load_model(ModelRecipe(path=str(tiny_model_folder)), torch.device("cpu"), torch.float32)
    config = {**model.unet.config, "time_cond_proj_dim": 32}
    unet = UNet2DConditionModel.from_config(config)
    with torch.no_grad():
        unet.time_embedding.cond_proj.weight.normal_(0, 1)
    width = unet.config.cross_attention_dim
    x, t, cond = latents("x"), torch.tensor([100, 700]), Cond(normal((2, 5, width), "text"))
    told = Cond(cond.embeds, {EMBEDDING: guidance_embedding(torch.tensor([3.0, 9.0]), 32)})
    with torch.no_grad():
        found, without = model.call_unet(unet, x, t, told), model.call_unet(unet, x, t, cond)
        theirs = unet(x, t, cond.embeds, timestep_cond=told.added[EMBEDDING]).sample
    assert torch.equal(found, theirs) and not torch.allclose(found, without)


def test_a_student_of_a_range_is_told_its_w() -> None:
    """Through the method's own loss: each row's embedding is of the guidance that its target has."""
    method = make_method("lora_guidance", {"guidance_range": [2.0, 9.0]})
    assert isinstance(method, LoraGuidance)
    trainer = make_trainer(make_method("lora_guidance", {}))
    method.build(SimpleNamespace(unet=SimpleNamespace(config=SimpleNamespace(time_cond_proj_dim=32))))  # type: ignore[arg-type]
    seen: list[Cond] = []
    plain = trainer.roles.forward

    def spied(unet: UNet2DConditionModel, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        seen.append(cond)
        return plain(unet, x, t, Cond(cond.embeds))

    trainer.roles.forward = spied
    with torch.no_grad():
        loss = method.loss(trainer.ctx, rows_of(trainer), method.phases[0])
        t, noise = trainer.ctx.draw(rows_of(trainer))
        x_t = trainer.ctx.denoiser.add_noise(rows_of(trainer).latents["image"], noise, t)
        c, u = trainer.ctx.branches("base", x_t, t, rows_of(trainer).cond["prompt"])
    w = 1 + (loss.metrics["unguided_error"] / (c - u).square().mean((1, 2, 3))).sqrt()
    assert bool(((w > 2) & (w < 9)).all()) and len(set(w.tolist())) == 4
    torch.testing.assert_close(seen[1].added[EMBEDDING], guidance_embedding(w, 32), rtol=0, atol=0.05)


# ---- runs -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["agd", "lora_guidance"])
def test_a_short_run_matches_the_guided_teacher_at_half_the_calls(name: str, tmp_path: Path) -> None:
    """Held-out error to the guided prediction, and of whole pictures from the same noise, against no guidance."""
    options = {
        "agd": ["train.steps=12", "train.warmup=1", "method.updates=10"],
        "lora_guidance": ["train.steps=120", "train.warmup=5"],
    }[name]
    shared = ["validate.images=1", "validate.steps=1", "validate.every=1000", "output.trackers=[]"]
    shared += [f"output.dir={tmp_path / 'run'}", "validate.pairs=8", "validate.draws=1"]
    run = train(load_recipe(f"tiny/{name}", [*options, *shared]), progress=False)
    held = [row for row in run.log if row["kind"] == "validate"]
    print(name, [(row["step"], row["guided_error"], row["unguided_error"]) for row in held])
    assert held[-1]["guided_error"] < 0.9 * held[-1]["unguided_error"]  # agd .82 in 120 updates
    base = DiffusionPipeline.from_pretrained(ROOT / "tiny-sd")
    base.set_progress_bar_config(disable=True)
    noise = normal((8, 4, 8, 8), "held out")
    prompts = ["a red circle above a blue square", "a green triangle", "a blue ring", "a red star"] * 2
    given = {"latents": noise, "num_inference_steps": 20, "output_type": "latent"}
    pipe = run.pipeline()
    pipe.set_progress_bar_config(disable=True)
    teacher, without = (base(prompts, guidance_scale=w, **given).images for w in (3.0, 1.0))
    told = {"guidance_scale": 3.0} if name == "agd" else {}
    if name == "lora_guidance":
        pipe.record = pipe.record.model_copy(
            update={"config": dict(base.scheduler.config), "scheduler": type(base.scheduler).__name__}
        )
    student = pipe(prompts, **given, **told).images
    mine, none = (float((each - teacher).square().mean()) for each in (student, without))
    print(name, "pictures", mine, none)
    assert mine < 0.7 * none  # agd .43
