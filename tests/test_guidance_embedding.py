"""Guidance that a student is told by an embedding: added as nothing, trained, saved, and sampled by stock diffusers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import LatentConsistencyModelPipeline, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn

from diffalign import load_recipe
from diffalign.card import card
from diffalign.data.batch import Cond
from diffalign.errors import Note, UserError
from diffalign.eval.prompts import Prompt
from diffalign.facts import Facts, SamplingRecord, read_facts, recorded, student_record
from diffalign.families import Model, load_model
from diffalign.families.guidance import EMBEDDING, add_embedding, embedding_width, guidance_embedding, tell
from diffalign.families.lora import find_lora, read_lora
from diffalign.keyed import normal
from diffalign.methods.consistency import Point
from diffalign.pipelines.few_step import FewStepPipeline
from diffalign.pipelines.sample import sample
from diffalign.pipelines.searches.diffusion import DiffusionWorld
from diffalign.pipelines.spec import SampleSpec, allowed_guidance
from diffalign.recipe import LoraFile, ModelRecipe, Recipe
from diffalign.roles import Roles
from diffalign.run import Run, Session, train
from diffalign.setup import build_roles, load_base, lora_config, make_method_of
from diffalign.start import start_student
from diffalign.students import check_students

CPU = torch.device("cpu")
WIDTH = 32
TOLD = ["model.guidance_embedding=32", "method.tell_guidance=true", "method.guidance=[2.0, 6.0]"]


def recipe_of(folder: Path, *options: str, name: str = "tiny/lcm") -> Recipe:
    return load_recipe(name, [f"model.path={folder}", "model.lora.rank=4", *options])


def loaded(recipe: Recipe) -> Model:
    return load_model(recipe.model, CPU, torch.float32)


def built(folder: Path, *options: str) -> tuple[Model, Any, Roles]:
    recipe = recipe_of(folder, *TOLD, *options)
    model, method = loaded(recipe), make_method_of(recipe)
    return model, method, build_roles(model, method, recipe, torch.float32)


def said(model: Model, unet: nn.Module, w: float | None = None) -> Tensor:
    """What a network says of fixed latents, told w or nothing."""
    cond = model.uncond(2)
    if w is not None:
        cond = tell(cond, torch.full((2,), w), embedding_width(unet))
    with torch.no_grad():
        return model.call_unet(unet, normal((2, 4, 8, 8), "x"), torch.tensor([999, 300]), cond)  # type: ignore[arg-type]


def test_an_embedding_is_added_as_nothing(tiny_model_folder: Path) -> None:
    """Bit for bit, whatever it is told; saved and opened again by plain diffusers as its own."""
    model = loaded(recipe_of(tiny_model_folder))
    before = said(model, model.unet)
    assert embedding_width(model.unet) == 0
    unet = copy.deepcopy(model.unet)
    add_embedding(unet, WIDTH)
    assert embedding_width(unet) == WIDTH and not unet.time_embedding.cond_proj.weight.requires_grad
    assert torch.equal(said(model, unet), before) and torch.equal(said(model, unet, 7.5), before)
    with torch.no_grad():
        unet.time_embedding.cond_proj.weight.normal_()
    again = UNet2DConditionModel.from_config(unet.config)
    again.load_state_dict(unet.state_dict())
    assert torch.equal(said(model, again.eval(), 7.5), said(model, unet, 7.5))
    assert not torch.equal(said(model, unet, 7.5), said(model, unet, 3.0))


@pytest.mark.parametrize("storage", ["adapters", "copies"])
def test_the_student_starts_as_the_teacher_and_learns_what_it_is_told(storage: str, tiny_model_folder: Path) -> None:
    model, _, roles = built(tiny_model_folder, f"model.storage={storage}", "method.target_ema=0.9")
    x, t = normal((2, 4, 8, 8), "x"), torch.tensor([999, 300])
    plain = model.uncond(2)
    told = tell(plain, torch.tensor([2.0, 6.0]), WIDTH)
    roles.train_only(("student",))
    with torch.no_grad():
        teacher = roles("base", x, t, plain)
    student = roles("student", x, t, told)
    torch.testing.assert_close(student, teacher, rtol=1e-5, atol=1e-5)
    student.square().sum().backward()
    of_embedding = {n: p.grad for n, p in roles.named_parameters("student").items() if "cond_proj" in n}
    assert any(grad is not None and bool(grad.any()) for grad in of_embedding.values()), "it learns"
    assert {n.split(".cond_proj")[0] for n in of_embedding} == {"time_embedding"}
    assert any("cond_proj" in name for name in roles.named_parameters("target")), "and the average with it"


def test_it_is_told_the_guidance_of_its_target(tiny_model_folder: Path) -> None:
    """At both ends of a step the same w that guides the teacher, as pipelines count it; the teacher is told nothing."""
    _, method, roles = built(tiny_model_folder)
    cond = load_model(ModelRecipe(path=str(tiny_model_folder)), CPU, torch.float32).uncond(2)
    w = torch.tensor([2.0, 6.0])
    point = Point(normal((2, 4, 8, 8), "x"), torch.tensor([999, 19]), w.long(), w.long(), (), w, cond)
    found = method.told(None, point).added[EMBEDDING]
    pipe = StableDiffusionPipeline.from_pretrained(tiny_model_folder)
    torch.testing.assert_close(found, pipe.get_guidance_scale_embedding(w - 1, WIDTH), rtol=1e-5, atol=2e-3)
    assert EMBEDDING not in point.cond.added
    silent = make_method_of(recipe_of(tiny_model_folder))
    assert silent.told(None, point) is point.cond  # type: ignore[attr-defined]
    assert roles.names == ("student",)


FIRST: list[Cond] = []  # what the networks of the run were told, call by call


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Two quick steps of a LoRA on the shipped tiny model."""

    def watch(session: Session) -> None:
        roles = session.trainer.roles
        plain = roles.forward

        def forward(unet: nn.Module, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
            FIRST.append(cond)
            return plain(unet, x, t, cond)

        roles.forward = forward

    out = tmp_path_factory.mktemp("told")
    small = [
        "train.steps=2",
        "train.batch=2",
        "train.warmup=0",
        "train.lr=0.1",
        "data.max_pairs=4",
        "model.lora.rank=4",
    ]
    small += ["validate.images=1", "validate.per_prompt=1", "output.trackers=[]", f"output.dir={out / 'run'}"]
    return train(load_recipe("tiny/lcm-told", small), progress=False, watch=watch)


def test_stock_diffusers_samples_what_is_saved(run: Run, tmp_path: Path) -> None:
    """The merged folder as an LCM and as a plain pipeline, the LoRA by our own: guided by what they are told, one
    forward a step, and all of them the same pictures."""
    record = recorded(str(run.model))
    assert record is not None and record.told == (1.0, 5.0) and record.guidance == 5.0
    unet = StableDiffusionPipeline.from_pretrained(run.dir / "merged").unet
    assert unet.config.time_cond_proj_dim == 64 and bool(unet.time_embedding.cond_proj.weight.any())
    noise, drawn = normal((1, 4, 8, 8), "noise"), {}
    for kind in (StableDiffusionPipeline, LatentConsistencyModelPipeline):
        pipe = kind.from_pretrained(run.dir / "merged")
        pipe.set_progress_bar_config(disable=True)
        rows: list[int] = []
        pipe.unet.conv_in.register_forward_hook(lambda module, args, output: rows.append(len(output)))  # noqa: B023
        for w in (2.0, 5.0):
            options = {"latents": noise, "output_type": "latent", "generator": torch.Generator().manual_seed(0)}
            drawn[kind, w] = pipe("a cat", guidance_scale=w, timesteps=[999, 499], **options).images
        assert rows == [1] * 4
    mine = run.pipeline()
    assert isinstance(mine, FewStepPipeline)
    mine.set_progress_bar_config(disable=True)
    options = {"latents": noise, "output_type": "latent", "generator": torch.Generator().manual_seed(0)}
    drawn[FewStepPipeline, 5.0] = mine("a cat", **options).images
    with pytest.raises(UserError, match="base_first needs base_unet"):
        mine("a cat", base_first=1, **options)
    five = [images for (_, w), images in drawn.items() if w == 5.0]
    for other in five[1:]:
        torch.testing.assert_close(other, five[0], rtol=1e-3, atol=1e-3)
    assert float((five[0] - drawn[StableDiffusionPipeline, 2.0]).abs().max()) > 1e-2
    # by `sample`: the folder that the LoRA is merged into, and the LoRA on its base
    spec = {"device": "cpu", "steps": 2, "guidance": 4.0}
    for place in (run.dir, run.dir / "merged"):
        sample(
            SampleSpec(model=str(place), **spec), [Prompt("a", "a cat", None)], tmp_path / place.name, progress=False
        )
    with pytest.raises(UserError, match="no branch for a negative prompt"):
        sample(SampleSpec(model=str(run.dir), negative_prompt="x", **spec), [Prompt("a", "b", None)], tmp_path / "n")


def test_what_is_written_down(run: Run, tiny_model_folder: Path) -> None:
    facts = read_facts(run.model)
    assert facts is not None and facts.sampling is not None and "guidance 5 (told, 1 to 5)" in facts.sampling.summary()
    assert "add_embedding(pipe.unet, 64)" in card(facts, "lora") and "add_embedding" not in card(facts, "pipeline")
    assert Facts.model_validate_json(facts.text()).sampling == facts.sampling
    with pytest.warns(Note, match=r"guidance 9 is outside of 1 to 5"):
        assert allowed_guidance(facts.sampling, 9.0) == 9.0
    assert student_record({}, [999], told=(4.0, 16.0)).guidance == 8.0
    assert read_lora(find_lora(str(run.model)), loaded(load_recipe("tiny/lcm")).unet).state, "its layer can be added"
    whole = load_recipe("tiny/lcm", [f"model.path={run.dir / 'merged'}", "model.guidance_embedding=32"])
    with pytest.raises(UserError, match="is guidance-distilled"):
        load_base(whole, CPU)
    kept = loaded(whole).unet  # to be exported
    assert embedding_width(kept) == 64 and bool(kept.time_embedding.cond_proj.weight.any())
    plain = loaded(recipe_of(tiny_model_folder))
    assert not [name for name in plain.lora_targets("all") if "cond_proj" in name]


def test_sheets_and_searches_tell_it_too(run: Run, tiny_model_folder: Path) -> None:
    """The first sheet, drawn before any step, at the recorded guidance; and a search's calls, one row each."""
    steps = FIRST[:2]
    assert all(torch.equal(cond.added[EMBEDDING], guidance_embedding(torch.tensor([5.0]), 64)) for cond in steps)
    pipe = StableDiffusionPipeline.from_pretrained(tiny_model_folder)
    add_embedding(pipe.unet, WIDTH)
    with torch.no_grad():
        pipe.unet.time_embedding.cond_proj.weight.normal_()
        embeds = {"prompt_embeds": normal((1, 77, 16), "text"), "negative_prompt_embeds": normal((1, 77, 16), "none")}
        options = {"size": (64, 64), "steps": 2, "guidance": 6.0, "eta": 1.0}
        searched = DiffusionWorld(pipe, ["a"], [(0, "a")], embeds, lambda pictures, texts: [0.0], **options)
        x, t = normal((1, 4, 8, 8), "x"), torch.tensor([500])
        told = guidance_embedding(torch.tensor([6.0]), WIDTH)
        expected = pipe.unet(x, t, embeds["prompt_embeds"], timestep_cond=told).sample
        assert searched.price == 1 and torch.equal(searched.network(x, t, [0]), expected)


def test_refusals(run: Run, tiny_model_folder: Path) -> None:
    """In one line each, before anything is encoded."""

    def refused(*options: str, name: str = "tiny/lcm") -> str:
        recipe = recipe_of(tiny_model_folder, *options, name=name)
        with pytest.raises(UserError) as caught:
            check_students(make_method_of(recipe), recipe, loaded(recipe))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "this U-Net has none (time_cond_proj_dim); set model.guidance_embedding=256" in refused(TOLD[1])
    assert "tells none; set method.tell_guidance=true" in refused(TOLD[0])
    assert "tells none" in refused(TOLD[0], name="tiny/dpo")
    asked = refused("method.guidance_range=[2.0, 6.0]", name="tiny/lora_guidance")
    assert "lora_guidance' tells" not in asked and "has none" in asked
    assert "is told its guidance, and method 'lcm' tells none" in refused(f"model.start={run.dir}")
    recipe = load_recipe("tiny/lcm")
    recipe.model.loras = [LoraFile(path=str(run.dir))]
    with pytest.raises(UserError, match="is no base to train on"):
        check_students(make_method_of(recipe), recipe, loaded(load_recipe("tiny/lcm")))
    recipe = load_recipe("tiny/lcm", [f"model.start={find_lora(str(run.model))}", "model.storage=copies"])
    with pytest.raises(UserError, match=r"set model\.guidance_embedding=64"):  # whatever is recorded
        start_student(Roles(loaded(recipe).unet, lambda *args: args[1]), recipe)
    told = recipe_of(tiny_model_folder, *TOLD)
    model = loaded(told)
    check_students(make_method_of(told), told, model)
    config = lora_config(model, told)
    assert config is not None and "time_embedding.cond_proj" in config.target_modules
    assert isinstance(make_method_of(told).sampling(model.scheduler_config), SamplingRecord)
