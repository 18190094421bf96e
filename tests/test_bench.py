"""The bench measures what it says: the naive step is the same mathematics, the counts are of real calls."""

from __future__ import annotations

import io
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from diffalign.bench import measure_step
from diffalign.bench.naive import NaiveTrainer, make_naive
from diffalign.bench.probes import Clock, marked, record_calls, replay, step_bytes
from diffalign.bench.step import agreement
from diffalign.cli import app
from diffalign.errors import UserError
from diffalign.families.random_sd1 import sd15_text_encoder, sd15_unet, sd15_vae, write_random_pairs
from diffalign.recipe import Recipe
from diffalign.setup import Parts, build
from diffalign.trainer import Trainer


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_pairs(tmp_path_factory.mktemp("bench") / "pairs", 12, 64)


def make_recipe(folder: Path, rows: Path, name: str = "dpo", /, **sections: dict[str, Any]) -> Recipe:
    changes: dict[str, dict[str, Any]] = {
        "model": {"path": str(folder), "lora": {"rank": 4}},
        "method": {"name": name} | ({"beta": 20.0} if name == "dpo" else {}),
        "data": {"path": str(rows)},
        "train": {"batch": 4, "lr": 1e-2, "device": "cpu"},
    }
    for key, section in sections.items():
        changes[key] |= section
    return Recipe.model_validate({"name": "bench", **changes})


def make(recipe: Recipe, folder: Path) -> tuple[Parts, NaiveTrainer]:
    recipe.data.cache_dir = str(folder / "cache")
    parts = build(recipe, lambda text: None)
    return parts, make_naive(parts)


def values_and_gradients(trainer: Trainer) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Of the next step's batch, which is not trained on."""
    batch = trainer.batches(trainer.step)[0]
    trainer.roles.train_only(["student"])
    loss = trainer.method.loss(trainer.ctx, batch, trainer.slots[0].phase)
    (loss.values * loss.weights).sum().backward()
    parameters = trainer.roles.parameters("student")
    gradients = [p.grad for p in parameters if p.grad is not None]
    for parameter in parameters:
        parameter.grad = None
    return loss.values.detach(), gradients


CASES: dict[str, dict[str, dict[str, Any]]] = {
    "adapters": {},
    "copies": {"model": {"storage": "copies"}},
    "checkpointing": {"model": {"gradient_checkpointing": True}},
    "drawn": {"data": {"posterior": "sample", "flip": True, "caption_dropout": 0.5, "crop": "random"}},
}


@pytest.mark.parametrize("case", CASES)
def test_the_naive_step_is_the_same_mathematics(
    case: str, tiny_model_folder: Path, pairs: Path, tmp_path: Path
) -> None:
    ours, naive = make(make_recipe(tiny_model_folder, pairs, **CASES[case]), tmp_path)
    trainer = ours.trainer
    for _ in range(2):  # away from the start, where student and base are one
        trainer.train_step()
        naive.decode()
        naive.train_step()
    naive.decode()
    values, gradients = values_and_gradients(trainer)
    naive_values, naive_gradients = values_and_gradients(naive)
    assert float(values.std()) > 1e-5
    torch.testing.assert_close(naive_values, values, rtol=1e-4, atol=1e-5)
    assert len(gradients) == len(naive_gradients) == len(trainer.roles.parameters("student"))
    assert max(float(g.abs().max()) for g in gradients) > 1e-5
    for one, other in zip(gradients, naive_gradients, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-3, atol=1e-4 * float(one.abs().max()) + 1e-7)
    agrees = agreement(trainer, naive)
    assert set(agrees) == {"loss", "chosen_error", "rejected_error"} and max(agrees.values()) < 1e-4
    naive.ctx.seed += 1  # the comparison can fail
    naive.source.seed += 1
    assert max(agreement(trainer, naive).values()) > 1e-2
    trainer.close()
    naive.close()


def test_the_naive_step_encodes_calls_twice_and_holds_a_second_network(
    tiny_model_folder: Path, pairs: Path, tmp_path: Path
) -> None:
    ours, naive = make(make_recipe(tiny_model_folder, pairs), tmp_path)
    seen: list[str] = []
    ours.model.vae.encoder.register_forward_hook(lambda *a: seen.append("vae"))
    ours.model.text_encoder.register_forward_hook(lambda *a: seen.append("text"))
    calls = record_calls(ours.trainer)
    assert not seen
    assert [(c.role, c.rows, c.graph) for c in calls] == [("student", 8, True), ("base", 8, False)]
    naive.decode()
    made = record_calls(naive)
    assert {"vae", "text"} <= set(seen)
    assert [(c.role, c.rows) for c in made] == [("student", 4)] * 2 + [("base", 4)] * 2
    base = naive.roles.networks["base"]
    assert base is not ours.model.unet and not any("lora_" in name for name, _ in base.named_parameters())
    assert naive.roles.networks["student"] is ours.model.unet

    again: list[tuple[int, bool]] = []
    for network in (base, ours.model.unet):
        network.register_forward_hook(lambda m, a, o: again.append((len(a[0]), torch.is_grad_enabled())))
    replay(naive, calls)
    assert again == [(8, True), (8, False)]
    assert all(p.grad is not None for p in ours.trainer.roles.parameters("student"))
    ours.trainer.close()
    naive.close()


@pytest.mark.parametrize("method", ["dpo", "mapo", "sft"])
def test_report(
    method: str, tiny_model_folder: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    micro = {"train": {"micro_batch": 2}} if method == "mapo" else {}
    found = measure_step(make_recipe(tiny_model_folder, pairs, method, **micro), steps=3)
    assert not list(tmp_path.iterdir())
    calls = {
        "dpo": ({"base": [8], "student": [8]}, {"base": [4, 4], "student": [4, 4]}),
        "mapo": ({"student": [4, 4]}, {"student": [2] * 4}),
        "sft": ({"student": [4]}, {"student": [4]}),
    }
    assert (found.ours.calls, found.naive.calls) == calls[method]
    for side in (found.ours, found.naive):
        assert set(side.parts) == {"data", "forward", "backward", "optimiser"}
        assert min(side.parts.values()) >= 0 and side.parts["forward"] > 0 and side.parts["backward"] > 0
        assert side.memory["peak"] >= side.memory["held"] > 0
        assert side.rows_per_second == pytest.approx(4 / side.seconds)
    assert found.naive.parts["data"] > found.ours.parts["data"]
    assert found.naive.memory["held"] > found.ours.memory["held"]
    assert found.overhead.low <= found.overhead.median <= found.overhead.high
    assert max(found.agreement.values()) < 1e-4
    assert found.parameters["unet"] > found.parameters["trained"] > 0
    assert json.loads(json.dumps(found.json()))["settings"]["latents"] == "4x8x8"
    text = io.StringIO()
    found.render(Console(file=text, width=120))
    assert "overhead over the bare calls" in text.getvalue() and "backward" in text.getvalue()


def test_command_with_random_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    options = ["train.batch=2", "train.device=cpu", "--unet", "random-3m", "--steps", "2", "--json"]
    result = CliRunner().invoke(app, ["bench", "step", "tiny/dpo", *options], catch_exceptions=False)
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    assert found["parameters"]["unet"] == 3_368_824 and found["settings"]["latents"] == "4x8x8"
    assert found["ours"]["calls"] == {"base": [4], "student": [4]}
    assert not list(tmp_path.iterdir())


def test_unknown_weights_are_refused(tiny_model_folder: Path, pairs: Path) -> None:
    with pytest.raises(UserError, match="random-50m"):
        measure_step(make_recipe(tiny_model_folder, pairs), unet="random-50")


def test_random_models_have_the_sizes_they_are_named_by() -> None:
    with torch.device("meta"):
        sizes = {
            divisor: [
                sum(p.numel() for p in network.parameters())
                for network in (sd15_unet(divisor), sd15_vae(divisor), sd15_text_encoder(divisor))
            ]
            for divisor in (1, 4)
        }
        unet = sd15_unet()
        output = unet(torch.zeros(2, 4, 64, 64), torch.zeros(2).long(), torch.zeros(2, 77, 768)).sample
    assert sizes[1] == [859_520_964, 83_653_863, 123_060_480]  # SD1.5's own
    assert 50e6 < sizes[4][0] < 55e6
    assert output.shape == (2, 4, 64, 64)


def test_parts_add_up_to_the_step(tiny_model_folder: Path, pairs: Path, tmp_path: Path) -> None:
    ours, naive = make(make_recipe(tiny_model_folder, pairs, train={"micro_batch": 1}), tmp_path)
    trainer, clock = ours.trainer, Clock(torch.device("cpu"))
    trainer.train_step()
    loss = trainer.method.loss

    def slow(*args: Any) -> Any:
        time.sleep(0.05)
        return loss(*args)

    trainer.method.loss = slow  # type: ignore[method-assign]
    started = time.perf_counter()
    with marked(trainer, clock):
        trainer.train_step()
    spent = time.perf_counter() - started
    assert sum(clock.parts.values()) == pytest.approx(spent, rel=0.05, abs=0.005)
    assert 0.2 < clock.parts["forward"] < spent
    assert trainer.method.loss is slow and "update" not in vars(trainer)
    trainer.close()
    naive.close()


def test_memory_of_a_step_is_what_it_needs() -> None:
    def step() -> None:
        torch.ones(64 << 18).add_(1)  # 64 MiB

    step()
    peak = step_bytes(torch.device("cpu"), step)["peak"]
    assert 60 << 20 < peak < 80 << 20
