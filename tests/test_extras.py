"""Parts beside a frozen U-Net (soft tokens, user attention): as roles, on every family, saved, sampled and exported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from small import same_tree, settings, write_pairs
from tiny import tiny_pipeline, tiny_sd2_pipeline, tiny_sdxl_pipeline
from torch import Tensor
from world import Rows, forward, make_roles

from diffalign.data.batch import Cond
from diffalign.errors import UserError
from diffalign.eval.evaluate import parse_model
from diffalign.eval.prompts import Prompt
from diffalign.facts import read_facts
from diffalign.families.extras import Extra, SoftTokens, load_extra, save_extra
from diffalign.families.guidance import GuidanceAdapters, widths_of
from diffalign.families.lora import find_lora
from diffalign.families.users import USER, UserAttention, cross_attentions
from diffalign.pipelines.extras import apply_extra, parse_user, split_user
from diffalign.pipelines.sample import SampleSpec, sample
from diffalign.plan import make_plan
from diffalign.publish import export_model
from diffalign.recipe import load_recipe
from diffalign.roles import Roles
from diffalign.run import Run, train
from diffalign.setup import build_roles, load_base, make_method_of

KINDS = ("soft-tokens", "user-attention", "guidance-adapters")


def made(kind: str, unet: UNet2DConditionModel, seed: int = 0) -> Extra:
    """Parts for a U-Net, away from their neutral start."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if kind == "soft-tokens":
            extra: Extra = SoftTokens(2, int(unet.config.cross_attention_dim), ("down", "mid", "up"), times=10)
        elif kind == "guidance-adapters":
            extra = GuidanceAdapters(widths_of(unet), int(unet.config.cross_attention_dim), 8, 2)
        else:
            widths = {name: a.inner_dim for name, a in cross_attentions(unet).items()}
            extra = UserAttention(widths, ("ann", "bob"), 3, 6)
        with torch.no_grad():
            for parameter in extra.parameters():
                parameter.copy_(torch.randn_like(parameter))
    return extra


def inputs(n: int = 2) -> tuple[Tensor, Tensor, Cond]:
    batch = Rows().batch(range(n), [0] * n)
    users = torch.arange(n)[:, None] % 3
    return batch.latents["chosen"], torch.tensor([100, 700][:n]), Cond(batch.cond["prompt"].embeds, {USER: users})


def roles_of(checkpointing: bool = False) -> Roles:
    """An adapter and all kinds of parts on one U-Net."""
    plain = make_roles(()).unet
    modules = {kind: made(kind, plain) for kind in KINDS}
    roles = make_roles(("fake",), modules=modules, checkpointing=checkpointing)
    with torch.no_grad():
        for k, parameter in enumerate(roles.parameters("fake")):
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(k)))
    return roles


def test_every_role_is_its_own_network_and_the_base_stays_pure() -> None:
    roles = roles_of()
    x, t, cond = inputs()
    with torch.no_grad():
        base = forward(make_roles(()).unet, x, t, cond)
        there = {name: roles(name, x, t, cond) for name in (*KINDS, "fake", "base")}
        back = {name: roles(name, x, t, cond) for name in reversed(there)}
    assert torch.equal(there["base"], base)
    assert all(torch.equal(there[name], back[name]) for name in there)
    outputs = list(there.values())
    assert all(float((a - b).abs().max()) > 1e-3 for k, a in enumerate(outputs) for b in outputs[:k])
    alone = [torch.cat([roles(kind, x[k : k + 1], t[k : k + 1], cond.take([k])) for k in (0, 1)]) for kind in KINDS]
    for kind, single in zip(KINDS, alone, strict=True):
        torch.testing.assert_close(there[kind], single, rtol=1e-4, atol=1e-5)
    assert not {n for n, _ in roles.unet.named_parameters() if "tokens" in n or ("to_k.weight" in n and "-" in n)}
    assert all(roles.extras[kind]._call is None for kind in KINDS), "nothing of a call is kept"


def test_checkpointing_recomputes_with_the_parts_of_the_call() -> None:
    """Two calls with different users and another role active at the backward pass: the gradients of plain training."""
    x, t, cond = inputs()

    def gradients(checkpointing: bool) -> list[Tensor]:
        roles = roles_of(checkpointing)
        roles.train_only(KINDS)
        other = Cond(cond.embeds, {USER: 2 - cond.added[USER]})
        total = torch.zeros(())
        for kind in KINDS:
            first = roles(kind, x, t, cond)
            total = total + (first * roles(kind, first, t, other)).square().mean()
        with torch.no_grad():
            roles("fake", x, t, cond)
        total.backward()
        return [p.grad for kind in KINDS for p in roles.parameters(kind)]

    plain, recomputed = gradients(False), gradients(True)
    assert all(float(a.abs().max()) > 0 for a in plain)
    for a, b in zip(plain, recomputed, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.slow
def test_a_compiled_network_follows_its_role() -> None:
    plain, compiled = roles_of(), roles_of()
    compiled.unet.compile(backend="eager")
    x, t, cond = inputs()
    with torch.no_grad():
        for role in ("soft-tokens", "base", "user-attention", "guidance-adapters", "soft-tokens"):
            torch.testing.assert_close(plain(role, x, t, cond), compiled(role, x, t, cond), rtol=1e-5, atol=1e-6)


# ---- files and pipelines --------------------------------------------------------------------------------------------

PIPELINES = {"sd1": tiny_pipeline, "sd2": tiny_sd2_pipeline, "sdxl": tiny_sdxl_pipeline}


def draw(pipe: DiffusionPipeline, guidance: float = 3.0) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    options = {"num_inference_steps": 2, "guidance_scale": guidance, "generator": generator, "output_type": "latent"}
    return pipe(["a cat", "a dog"], **options).images.float().numpy()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", PIPELINES)
def test_a_pipeline_with_parts_from_a_file(family: str, kind: str, tmp_path: Path) -> None:
    pipe = PIPELINES[family]()
    base = draw(pipe)
    live = made(kind, pipe.unet)
    if isinstance(live, GuidanceAdapters):
        live.prediction = pipe.scheduler.config.prediction_type
    live.attach(pipe.unet)
    live.on = True
    expected = draw(pipe)
    live.detach()
    assert np.array_equal(draw(pipe), base) and np.abs(expected - base).max() > 0.01
    save_extra(live, tmp_path / "run" / "model")
    extra = apply_extra(pipe, tmp_path / "run")
    np.testing.assert_allclose(draw(pipe), expected, rtol=1e-4, atol=1e-5)
    extra.on = False
    assert np.array_equal(draw(pipe), base)
    extra.detach()
    half = PIPELINES[family]().to(dtype=torch.bfloat16)
    apply_extra(half, tmp_path / "run" / "model" / "extra.safetensors")
    assert np.isfinite(draw(half)).all() and np.abs(draw(half) - expected).max() < 0.3 * np.abs(expected).max()
    unet = PIPELINES["sdxl" if family != "sdxl" else "sd1"]().unet
    with pytest.raises(UserError, match="is for another network"):
        load_extra(tmp_path / "run" / "model" / "extra.safetensors", unet)


def test_users_and_strength(tmp_path: Path) -> None:
    pipe = tiny_pipeline()
    base = draw(pipe)
    save_extra(made("user-attention", pipe.unet), tmp_path)
    images = {}
    for user in (None, "ann", "bob", "ann:1,bob:0", "ann:0.5,bob:0.5"):
        extra = apply_extra(pipe, tmp_path, user=user)
        images[user] = draw(pipe)
        extra.detach()
    assert np.array_equal(images["ann"], images["ann:1,bob:0"])
    different = [images[user] for user in (None, "ann", "bob", "ann:0.5,bob:0.5")] + [base]
    assert all(np.abs(a - b).max() > 1e-3 for k, a in enumerate(different) for b in different[:k])
    extra = apply_extra(pipe, f"{tmp_path}#bob")
    assert np.array_equal(draw(pipe), images["bob"])
    extra.scale = 0.0
    torch.testing.assert_close(torch.from_numpy(draw(pipe)), torch.from_numpy(base))
    extra.detach()
    for path, user, scale, expected in (
        (tmp_path, "bop", 1.0, "knows no user 'bop'; did you mean 'bob'"),
        (tmp_path, "ann:x", 1.0, "is not NAME:WEIGHT"),
        (tmp_path / "nowhere", None, 1.0, "holds no soft tokens, user attention or adapters"),
    ):
        with pytest.raises(UserError, match=expected):
            apply_extra(pipe, path, user, scale)
    save_extra(made("soft-tokens", pipe.unet), tmp_path / "soft")
    for options, expected in (({"user": "ann"}, "know no users"), ({"scale": 0.5}, "on .* or off")):
        with pytest.raises(UserError, match=expected):
            apply_extra(pipe, tmp_path / "soft", **options)


def test_names_of_users_in_commands(tmp_path: Path) -> None:
    assert split_user("runs/ppd#ann") == ("runs/ppd", "ann") and split_user("runs/ppd") == ("runs/ppd", None)
    (tmp_path / "a#b").mkdir()
    assert split_user(f"{tmp_path}/a#b") == (f"{tmp_path}/a#b", None)
    assert parse_user("a:b", ("a:b",)) == "a:b" and parse_user("a:.5,b:2", ()) == {"a": 0.5, "b": 2.0}
    spec = parse_model("base=tiny-sd+runs/ppd#ann@0.8")
    assert (spec.model, spec.lora, spec.lora_scale) == ("tiny-sd", "runs/ppd#ann", 0.8)


def test_damaged_and_foreign_files(tmp_path: Path) -> None:
    file = save_extra(made("soft-tokens", tiny_pipeline().unet), tmp_path)
    with pytest.raises(UserError, match="are no LoRA and cannot be fused"):
        find_lora(str(tmp_path))
    whole = file.read_bytes()
    file.write_bytes(whole[:-8])
    with pytest.raises(UserError, match="is damaged"):
        load_extra(file)
    file.write_bytes(whole.replace(b"soft-tokens", b"soft-tokenz"))
    with pytest.raises(UserError, match="holds no soft tokens, user attention or guidance"):
        load_extra(file)
    file.write_bytes(whole.replace(rb"\"count\": 2", rb"\"count\": 3"))
    with pytest.raises(UserError, match="cannot be read"):
        load_extra(file)


# ---- runs -----------------------------------------------------------------------------------------------------------


def make(name: str, model: Path, data: Path, out: Path, **changes: Any) -> Run:
    quick = {"method__beta": None, "train__steps": 4, "train__save_every": 2, "train__lr": 0.05, **changes}
    _, *overrides = settings(model, data, out, **quick)
    return train(load_recipe(name, [o for o in overrides if not o.startswith("model.lora")]), progress=False)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("extras")


@pytest.fixture(scope="module")
def pairs(place: Path) -> Path:
    folder = write_pairs(place / "pairs")
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    lines = [json.dumps({**row, "user": ("ann", "bob")[n % 2]}) for n, row in enumerate(rows)]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def soft(tiny_model_folder: Path, pairs: Path, place: Path) -> Run:
    return make("tiny/softrepa", tiny_model_folder, pairs, place / "soft", train__batch=4)


@pytest.fixture(scope="module")
def ppd(tiny_sdxl_folder: Path, pairs: Path, place: Path) -> Run:
    return make("tiny/ppd", tiny_sdxl_folder, pairs, place / "ppd", train__ema=0.5)


def test_a_run_goes_on_exactly(soft: Run, tiny_model_folder: Path, pairs: Path, place: Path) -> None:
    half = make("tiny/softrepa", tiny_model_folder, pairs, place / "again", train__batch=4, train__steps=2)
    assert half.step == 2
    whole = make("tiny/softrepa", tiny_model_folder, pairs, place / "again", train__batch=4)
    states = [torch.load(run.checkpoints[-1] / "state.pt", weights_only=True) for run in (soft, whole)]
    assert same_tree(*(state["roles"] for state in states)) and same_tree(*(state["optimizers"] for state in states))
    files = [(run.model / "extra.safetensors").read_bytes() for run in (soft, whole)]
    assert files[0] == files[1]


def sampled(out: Path, model: str, lora: str | None = None, **options: Any) -> bytes:
    """The picture of one prompt."""
    spec = SampleSpec(model, lora, steps=2, seed=3, **options)
    sample(spec, [Prompt("0", "a cat")], out, progress=False)
    return (out / "images" / "000000-0.png").read_bytes()


@pytest.mark.parametrize("kind", ["soft", "ppd"])
def test_a_run_is_sampled_like_a_lora(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    run: Run = request.getfixturevalue(kind)
    base, folder = str(run.recipe.model.path), str(run.dir)
    plain, whole = sampled(tmp_path / "base", base), sampled(tmp_path / "whole", base, folder)
    assert whole != plain and sampled(tmp_path / "run", folder) == whole
    assert sampled(tmp_path / "off", base, folder, lora_scale=0.0) == plain
    if kind == "soft":
        with pytest.raises(UserError, match="know no users"):
            sampled(tmp_path / "ann", base, f"{folder}#ann")
        return
    bob = sampled(tmp_path / "bob", base, f"{folder}#bob")
    assert bob not in (plain, whole) and sampled(tmp_path / "run bob", f"{folder}#bob") == bob
    with pytest.raises(UserError, match="images of other settings"):
        sampled(tmp_path / "bob", base, f"{folder}#ann")
    with pytest.raises(UserError, match="knows no user 'eve'"):
        sampled(tmp_path / "eve", base, f"{folder}#eve")


def test_run_pipeline_has_the_averaged_parts(ppd: Run) -> None:
    state = torch.load(ppd.checkpoints[-1] / "state.pt", weights_only=True)
    extra = load_extra(ppd.model / "extra.safetensors")
    mean = dict(zip(state["roles"]["student"], state["ema"]["student"]["shadow"], strict=True))
    assert all(torch.equal(parameter, mean[name]) for name, parameter in extra.named_parameters())
    pipe = ppd.pipeline()
    plain = type(pipe).from_pretrained(str(ppd.recipe.model.path))
    assert np.abs(draw(pipe) - draw(plain)).max() > 1e-3


def test_exports(soft: Run, ppd: Run, tmp_path: Path) -> None:
    for run in (soft, ppd):
        for form in ("kohya", "merged"):
            with pytest.raises(UserError, match=f"and {form} cannot hold them; use --format diffusers") as caught:
                export_model(str(run.dir), form, tmp_path / form)
            assert "\n" not in str(caught.value) and not (tmp_path / form).exists()
        out = tmp_path / run.dir.name
        export_model(str(run.dir), "diffusers", out, dtype="fp16")
        assert {p.name for p in out.iterdir()} == {"README.md", "diffalign.json", "extra.safetensors"}
        facts = read_facts(out)
        assert facts is not None and facts.kind == "extra" and facts.export == "diffusers"
        card = (out / "README.md").read_text()
        assert (
            f'apply_extra(pipe, "{"PATH/OF/THIS/FOLDER"}")' in card and "load_lora" not in card and "LoRA" not in card
        )
        mine, its = load_extra(out / "extra.safetensors"), load_extra(run.model / "extra.safetensors")
        for a, b in zip(mine.parameters(), its.parameters(), strict=True):
            torch.testing.assert_close(a, b.half())


def test_settings_that_do_not_go_with_a_frozen_network(soft: Run) -> None:
    for change, expected in (("model.storage=copies", "set model.storage=adapters"), ("output.merged=true", "output")):
        recipe = load_recipe(soft.recipe, [change])
        model, dtype = load_base(recipe, torch.device("cpu"))
        with pytest.raises(UserError, match=f"does not go with method 'softrepa'.*{expected}"):
            build_roles(model, make_method_of(recipe), recipe, dtype)


def test_plans(soft: Run, ppd: Run, pairs: Path) -> None:
    plans = [make_plan(load_recipe(run.recipe, ["train.batch=8"])) for run in (soft, ppd)]
    assert all(plan.memory["whole"] for plan in plans)
    assert [plan.calls_per_step for plan in plans] == [8 * 4, 8 * 2 * 2]  # 4 texts an image; 2 pictures by 2 networks
    for plan, run in zip(plans, (soft, ppd), strict=True):
        trained = load_extra(run.model / "extra.safetensors").parameters()
        assert plan.roles == {"student": sum(p.numel() for p in trained)}
