"""Plans: counts against published totals, the simulated step against a measured one, presets against their cards."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from command import diffalign
from peft import LoraConfig
from small import settings, write_pairs
from tiny import SD_SCHEDULE, tiny_unet
from torch import Tensor, nn
from world import Rows, batch_of, every_method, forward, make_context, make_trainer, warm

from diffalign.data.batch import Cond
from diffalign.denoiser import Denoiser
from diffalign.errors import UserError
from diffalign.families.known import ADDRESSES, KNOWN, count, known_by, meta_network
from diffalign.families.random_sd1 import sd15_unet
from diffalign.memory import Memory, estimate, optimizer_bytes
from diffalign.methods import make_method
from diffalign.methods.base import Method
from diffalign.plan import ROOM, known_model
from diffalign.presets import ADAPTERS, CARDS, COPIES, GIB, load_with_preset, preset_overrides
from diffalign.recipe import load_recipe
from diffalign.roles import Roles
from diffalign.setup import build_roles, make_method_of
from diffalign.simulate import Live, Shapes, simulate_phase
from diffalign.trainer import Trainer

# diffusers' and transformers' own classes at the published configs; the U-Nets' are in the papers as 0.86 B and 2.6 B
TOTALS = {
    ("sd1", "unet"): 859_520_964,
    ("sd1", "vae"): 83_653_863,
    ("sd1", "text_encoder"): 123_060_480,
    ("sd2", "unet"): 865_910_724,
    ("sd2", "text_encoder"): 340_387_840,
    ("sdxl", "unet"): 2_567_463_684,
    ("sdxl", "text_encoder"): 123_060_480,
    ("sdxl", "text_encoder_2"): 694_659_840,
}
HUB = {"sd1": "stable-diffusion-v1-5/stable-diffusion-v1-5", "sdxl": "stabilityai/stable-diffusion-xl-base-1.0"}
HUB["sd2"] = "stabilityai/stable-diffusion-2-1"


@pytest.mark.parametrize(("family", "part"), TOTALS)
def test_parameters_of_the_known_networks(family: str, part: str) -> None:
    network = meta_network(family, part)
    assert count(network) == TOTALS[family, part] and all(p.is_meta for p in network.parameters())


def test_known_addresses() -> None:
    assert {known_by(path).family for path in ADDRESSES} == set(KNOWN)  # type: ignore[union-attr]
    base = known_by("stabilityai/stable-diffusion-2-1-base")
    assert base is not None and (base.resolution, base.unet["sample_size"], base.prediction) == (512, 64, "epsilon")
    assert known_by("someone/unheard-of") is None
    assert known_by("someone/unheard-of", "sdxl") is KNOWN["sdxl"]


# ---- the simulated step against a real one --------------------------------------------------------------------------

UNETS: dict[str, tuple[Callable[[], nn.Module], int, int]] = {
    "tiny": (lambda: tiny_unet(cross=16), 8, 16),
    "mid": (lambda: sd15_unet(4, 16), 16, 192),  # 54 M weights
}


def roles_of(
    name: str, copies: bool, checkpointing: bool, reference: bool, device: str, trained: Sequence[str] = ("student",)
) -> Roles:
    lora = LoraConfig(r=8, lora_alpha=8, target_modules=["to_q", "to_k", "to_v", "to_out.0"])
    with torch.device(device):
        return Roles(
            UNETS[name][0](),
            forward,
            trained,
            lora=None if copies else lora,
            checkpointing=checkpointing,
            reference=reference,
        )


def measure(name: str, method_name: str, copies: bool, checkpointing: bool, rows: int) -> tuple[int, int, int]:
    """Of a real micro-batch: bytes kept for backward as autograd's hooks see them, the same by allocations, highest."""
    _, side, width = UNETS[name]
    method = make_method(method_name, {})
    roles = roles_of(name, copies, checkpointing, method.needs.reference, "cpu")
    roles.train_only(("student",))
    data = Rows(rows, kind=method.needs.batch)
    data.embeds = torch.randn(rows, 77, width)
    data.chosen, data.rejected = torch.randn(rows, 4, side, side), torch.randn(rows, 4, side, side)
    batch = data.batch(range(rows), [0] * rows)
    ctx = make_context(roles)
    ctx.uncond = Cond(torch.zeros(1, 77, width))
    ctx.draw(batch)  # tables are made
    weights = [*roles.networks["student"].parameters()]
    weights += [*roles.networks["base"].parameters()] if "base" in roles.networks else []
    for parameter in roles.parameters("student"):
        parameter.grad = torch.zeros_like(parameter)
        weights.append(parameter.grad)
    own = {w.untyped_storage().data_ptr() for w in weights}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    live = Live(weights)
    with live:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = method.loss(ctx, batch, method.phases[0])
            total = (loss.values * loss.weights).sum()
        held = live.now
        total.backward()
    return sum(saved.values()), held, live.peak


@pytest.mark.parametrize(
    ("name", "method", "copies", "checkpointing"),
    [
        ("tiny", "dpo", False, False),
        ("tiny", "dpo", False, True),
        ("tiny", "sft", True, False),
        ("tiny", "sft", True, True),
        pytest.param("mid", "dpo", False, False, marks=pytest.mark.slow),
        ("mid", "dpo", False, True),
    ],
)
def test_activations_are_those_of_a_real_step(name: str, method: str, copies: bool, checkpointing: bool) -> None:
    rows, (_, side, width) = 4, UNETS[name]
    hooks, held, peak = measure(name, method, copies, checkpointing, rows)
    made = make_method(method, {})
    roles = roles_of(name, copies, checkpointing, made.needs.reference, "meta")
    shapes = Shapes((4, side, side), 77, width)
    used = simulate_phase(made, roles, made.phases[0], shapes, rows, Denoiser.from_config(SD_SCHEDULE))
    assert used.whole and used.calls == ({"student": 8, "base": 8} if method == "dpo" else {"student": 4})
    assert used.held == pytest.approx(hooks, rel=0.15), "bytes that autograd keeps"
    assert used.held == pytest.approx(held, rel=0.05) and used.peak == pytest.approx(peak, rel=0.05)


def test_checkpointing_and_rows_are_seen() -> None:
    method = make_method("dpo", {})
    found = {}
    for checkpointing, rows in ((False, 16), (False, 32), (True, 32)):
        roles = roles_of("tiny", False, checkpointing, True, "meta")
        shapes = Shapes((4, 8, 8), 77, 16)
        used = simulate_phase(method, roles, method.phases[0], shapes, rows, Denoiser.from_config(SD_SCHEDULE))
        found[checkpointing, rows] = used
    assert found[False, 32].held == pytest.approx(2 * found[False, 16].held, rel=0.05)
    assert found[True, 32].held < 0.6 * found[False, 32].held and found[True, 32].peak < 0.8 * found[False, 32].peak
    assert 1.1 < found[True, 32].flops / found[False, 32].flops < 1.4


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_optimiser_states(name: str) -> None:
    trainer = warm(make_trainer(make_method("sft", {}), storage="copies", optimizer=name), 1)
    state = trainer.optimizers["student"].state
    real = sum(v.numel() * v.element_size() for s in state.values() for v in s.values() if torch.is_tensor(v))
    assert optimizer_bytes(name, trainer.roles.named_parameters("student")) == pytest.approx(real, rel=0.02)


# ---- the command ----------------------------------------------------------------------------------------------------


def plan_of(*args: object) -> dict[str, Any]:
    done = diffalign("train", *args, "--plan", "--json")
    assert done.status == 0, done.err
    return dict(json.loads(done.out))


def test_a_model_that_is_not_here_is_planned(tmp_path: Path) -> None:
    pairs = write_pairs(tmp_path / "pairs", 4)
    where = [f"data.path={pairs}", f"data.cache_dir={tmp_path / 'cache'}", f"output.dir={tmp_path / 'run'}"]
    plan = plan_of("sd15/dpo-lora", *where, "train.micro_batch=1", "validate.images=1", "model.dtype=bf16")
    assert plan["parameters"] == {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480}
    assert plan["roles"] == {"student": 1_594_368} and not plan["weights_known"] and plan["fits"] is None
    parts, rank = plan["memory"]["parts"], 4 * 1_594_368
    assert parts["base, frozen"] == 2 * 859_520_964 and parts["student: adapter, fp32"] == rank
    assert parts["student: optimiser (adamw)"] == 2 * rank
    assert plan["cache_bytes"] == pytest.approx(8 * 4 * 4 * 64 * 64 + 6 * 77 * 768 * 4, rel=0.02)
    assert plan["memory"]["peak"] > sum(parts.values()) and plan["seconds"] > 0
    # two U-Net calls of two pictures, and a backward pass through frozen weights: about 3 forwards of 0.8 TFLOP each
    assert plan["flops_per_step"] == pytest.approx(32 * 2 * 3 * 0.8e12, rel=0.15)
    assert not (tmp_path / "run").exists() and not (tmp_path / "cache").exists()
    shown = diffalign("train", "sd15/dpo-lora", *where, "model.path=someone/unheard-of", "--plan")
    assert shown.status == 2 and "set model.family=sd1, sd2 or sdxl" in shown.line


def test_a_plan_under_a_preset(tiny_model_folder: Path, tmp_path: Path) -> None:
    args = settings(tiny_model_folder, write_pairs(tmp_path / "pairs"), tmp_path / "run")
    done = diffalign("train", *args, "--preset", "8gb", "--plan", "--json")
    plan = json.loads(done.out)
    assert done.status == 0 and plan["card_bytes"] == 8 * GIB and plan["fits"] and plan["precision"] == "bfloat16"
    said = "preset 8gb: train.micro_batch=2 model.gradient_checkpointing=true model.dtype=auto model.quantize=none "
    assert done.err == said + "model.offload=true\n"
    plain = diffalign("train", *args, "--preset", "8gb", "--plan")
    assert plain.status == 0 and "fits (an estimate)" in plain.out
    wrong = diffalign("train", *args, "--preset", "25gb")
    assert wrong.status == 2 and "unknown preset '25gb'; did you mean '24gb'?" in wrong.line


def test_a_run_under_a_preset(tiny_model_folder: Path, tmp_path: Path) -> None:
    args = settings(tiny_model_folder, write_pairs(tmp_path / "pairs"), tmp_path / "run", train__steps=2)
    done = diffalign("train", *args, "model.gradient_checkpointing=false", "--preset", "8gb")
    assert done.status == 0, done.err
    kept = load_recipe(str(tmp_path / "run" / "recipe.yaml"))
    assert kept.model.offload and not kept.model.gradient_checkpointing and kept.train.micro_batch == 2


# ---- presets --------------------------------------------------------------------------------------------------------


def test_overrides_win_over_a_preset() -> None:
    given = ["data.path=x", f"model.path={HUB['sdxl']}", "model.quantize=8bit"]
    recipe, said = load_with_preset("sd15/dpo-lora", given, "8gb")
    assert recipe.model.quantize == "8bit" and recipe.train.optimizer == "adamw8bit" and recipe.model.offload
    assert not any(text.startswith("model.quantize") for text in said)
    assert recipe.data.resolution == 512, "resolution stays as the recipe has it"


def test_where_full_fine_tuning_does_not_fit() -> None:
    given = ["data.path=x", "model.storage=copies", f"model.path={HUB['sdxl']}"]
    with pytest.raises(
        UserError, match=r"full fine-tuning of sdxl does not fit a card of 24 GB; set model\.storage=adapt"
    ):
        load_with_preset("sd15/dpo-lora", given, "24gb")
    recipe, _ = load_with_preset("sd15/dpo-lora", [*given, "train.parallel=fsdp"], "24gb")
    assert recipe.train.micro_batch == 1 and recipe.train.optimizer == "adamw" and not recipe.model.offload


def memory_under(family: str, card: int, storage: str, method: str = "dpo") -> Memory:
    """The estimate under a preset at the family's own resolution, rank 64, 64 pairs a step."""
    given = [f"model.path={HUB[family]}", f"model.storage={storage}", "model.lora.rank=64", "data.path=x"]
    plain = load_recipe("sd15/dpo-lora", [*given, "data.resolution=null", "train.batch=64"])
    recipe = load_recipe(plain, preset_overrides(f"{card}gb", plain, family))
    known = known_by(HUB[family])
    assert known is not None
    model, used = known_model(known, HUB[family]), make_method_of(recipe)
    with torch.device("meta"):
        roles = build_roles(model, used, recipe, torch.bfloat16)
    return estimate(model, used, roles, recipe, torch.bfloat16, torch.bfloat16)


def test_the_smallest_preset_fits_its_card() -> None:
    assert memory_under("sd1", 8, "adapters").peak < ROOM * 8 * GIB


@pytest.mark.slow
@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize("family", HUB)
def test_every_preset_fits_its_card(family: str, card: int) -> None:
    kind = {"sd1": "sd"}.get(family, family)
    assert set(ADAPTERS[kind]) == set(CARDS)
    assert memory_under(family, card, "adapters").peak < ROOM * card * GIB
    if card in COPIES[kind]:
        assert memory_under(family, card, "copies").peak < ROOM * card * GIB


@pytest.mark.slow
@pytest.mark.parametrize("family", HUB)
def test_a_card_is_left_out_only_where_nothing_fits(family: str) -> None:
    """The leanest setting of full fine-tuning exceeds the next smaller card."""
    least = min(COPIES[{"sd1": "sd"}.get(family, family)])
    assert memory_under(family, least, "copies").peak > ROOM * CARDS[CARDS.index(least) - 1] * GIB


def test_half_precision_is_seen_as_autocast_has_it() -> None:
    """The processor's own autocast, whose norms follow their input, over fp32 weights that are trained."""
    method, rows, (_, side, width) = make_method("sft", {}), 8, UNETS["tiny"]
    roles = roles_of("tiny", True, True, False, "cpu")
    roles.train_only(("student",))
    data = Rows(rows, kind="image")
    data.embeds, data.chosen = torch.randn(rows, 77, width), torch.randn(rows, 4, side, side)
    batch, ctx = data.batch(range(rows), [0] * rows), make_context(roles, autocast=torch.bfloat16)
    ctx.draw(batch)
    for parameter in roles.parameters("student"):
        parameter.grad = torch.zeros_like(parameter)
    own = roles.parameters("student")
    live = Live([*own, *(p.grad for p in own if p.grad is not None)])
    with live:
        loss = method.loss(ctx, batch, method.phases[0])
        total = (loss.values * loss.weights).sum()
        held = live.now
        total.backward()
    shapes, phase = Shapes((4, side, side), 77, width), method.phases[0]
    roles = roles_of("tiny", True, True, False, "meta")
    denoiser = Denoiser.from_config(SD_SCHEDULE)
    used = simulate_phase(method, roles, phase, shapes, rows, denoiser, torch.bfloat16, norms=False)
    assert used.held == pytest.approx(held, rel=0.1) and used.peak == pytest.approx(live.peak, rel=0.1)


def test_equal_steps_of_a_loss_are_reckoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inversion-DPO's path of four steps from two: as if all were run; its own checkpoint around the network's."""
    method = make_method("inversion_dpo", {"inversion_steps": 4})
    shapes, found = Shapes((4, 8, 8), 77, 16), []
    for name in ("", "inversion_steps"):
        monkeypatch.setattr(type(method), "repeated", name)
        roles = roles_of("tiny", True, True, True, "meta")
        denoiser = Denoiser.from_config(SD_SCHEDULE)
        found.append(simulate_phase(method, roles, method.phases[0], shapes, 3, denoiser, torch.bfloat16))
    every, few = found
    # 4 steps x 2 pictures x 3 pairs x 2 branches; the base makes the path and is compared with it
    assert few.whole and few.calls == every.calls == {"base": 96, "student": 48}
    assert few.flops == pytest.approx(every.flops, rel=1e-6)
    assert few.held == every.held and few.peak == pytest.approx(every.peak, rel=0.01)


def count_calls(trainer: Trainer, visits: int) -> dict[str, float]:
    """Samples that one loss sends through the network by role: the mean over visits, with their own draws."""
    calls: Counter[str] = Counter()
    roles = trainer.roles
    networks = {id(n): n for n in roles.networks.values()}.values()
    sampled = [batch_of(trainer)] * visits if trainer.method.online else []  # what a loss takes: samples come before
    hooks = [n.register_forward_pre_hook(lambda _, a: calls.update({roles.current: len(a[0])})) for n in networks]
    for batch in sampled or (trainer.source.load([0, 1, 2, 3], [visit] * 4) for visit in range(visits)):
        with torch.no_grad():
            trainer.ctx.stats = trainer.statistics([batch])
            trainer.method.loss(trainer.ctx, batch, trainer.method.phases[0])
    for hook in hooks:
        hook.remove()
    return {role: count / visits for role, count in calls.items()}


@pytest.mark.parametrize(
    "method", [m for m in every_method() if len(m.phases) == 1 and "student" in m.roles], ids=lambda m: type(m).__name__
)
def test_planned_calls_are_those_that_are_made(method: Method[Any]) -> None:
    trainer = make_trainer(method)
    made = count_calls(trainer, 40 if type(method).__name__ == "TwinFlow" else 6)  # its samples draw what they learn
    trained = [role for role in method.roles if role in ("student", "target")]
    roles = roles_of("tiny", False, False, method.needs.reference, "meta", trained)
    for name, module in trainer.roles.modules.items():
        if name in trainer.roles.extras:  # stands in the student's calls, which are counted as they are without it
            continue
        roles.modules[name] = module.to("meta")
        roles._parameters[name] = dict(module.named_parameters())
    shapes, denoiser = Shapes((4, 8, 8), 5, 16, longest=4), Denoiser.from_config(SD_SCHEDULE)
    decoder = (lambda latents: latents[:, :3]) if method.needs.decode else None
    used = simulate_phase(method, roles, method.phases[0], shapes, 4, denoiser, decoder=decoder)
    # paths that end at drawn times are counted for times that lie evenly
    assert used.whole and used.calls == {role: pytest.approx(count, rel=0.15) for role, count in made.items()}


def test_only_a_loss_that_looks_at_numbers_is_stood_in_for(monkeypatch: pytest.MonkeyPatch) -> None:
    method = make_method("sft", {})
    plain = method.loss
    shapes, denoiser = Shapes((4, 8, 8), 5, 16), Denoiser.from_config(SD_SCHEDULE)

    def simulate(spoil: Callable[[Tensor], object]) -> Any:
        def loss(*args: Any) -> Any:
            found = plain(*args)
            spoil(found.values)
            return found

        monkeypatch.setattr(method, "loss", loss)
        roles = roles_of("tiny", False, False, False, "meta")
        return simulate_phase(method, roles, method.phases[0], shapes, 4, denoiser)

    for look in (lambda values: values.sum().item(), lambda values: values.nonzero(), lambda values: values.tolist()):
        used = simulate(look)
        assert not used.whole and used.calls == {"student": 4}
    assert simulate(lambda values: None).whole
    with pytest.raises(RuntimeError, match="broadcast"):
        simulate(lambda values: values + torch.zeros(7, device="meta"))
