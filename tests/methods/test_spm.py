"""SPO's step-aware preference model: the sheet's identities (online, 1A, A.1, catalogue 16-18), and as a scorer."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from world import batch_of, make_trainer, small_clip, warm

from diffalign.data.batch import Batch
from diffalign.errors import UserError
from diffalign.eval.scorers import load_scorer
from diffalign.eval.spm import StepAware, load_step_aware, shape_of, time_embedding
from diffalign.families.lora import find_lora
from diffalign.methods.online.spm import SPM, SPMConfig, preference_of, spm_loss
from diffalign.recipe import load_recipe
from diffalign.run import Run
from diffalign.trainer import Trainer

START = "asset:tiny-pickscore"
SMALL = small_clip()
TIMES = torch.tensor([0, 251, 501, 701, 951, 999])
PROMPTS = ["a red circle above a blue square", "a green star", "a red circle above a blue square"] * 2


def pictures(n: int = 6) -> torch.Tensor:
    return torch.rand(n, 3, 48, 64, generator=torch.Generator().manual_seed(0))


def shaken(model: StepAware, seed: int = 0) -> StepAware:
    """All weights a little off their start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return model


def test_it_starts_as_pickscore_at_every_time() -> None:
    plain = load_scorer("tiny-pickscore", device="cpu")
    timed = load_scorer("spm", START, device="cpu")
    images = pictures()
    for t in (None, TIMES, TIMES.flip(0)):
        assert torch.equal(timed.reward(images, PROMPTS, t), plain.reward(images, PROMPTS))  # type: ignore[call-arg]
    assert torch.equal(timed(images, PROMPTS), plain(images, PROMPTS)), "and of finished pictures as a scorer"
    model, _ = load_step_aware(START)
    torch.testing.assert_close(model.scores(images, PROMPTS, TIMES), plain.reward(images, PROMPTS))
    bias = model.blocks[0].bias.detach().unflatten(0, (6, -1)).mean(1)  # type: ignore[operator]
    assert bias.tolist() == [0, 0, 1, 0, 0, 1]


def test_each_part_of_the_time_counts_once_it_is_there() -> None:
    """Shifts, scales and gates of attention and MLP, and the last norm's: any one of them tells times apart."""
    model, _ = load_step_aware(START)
    images, times = pictures(1).expand(2, -1, -1, -1), torch.tensor([0, 951])
    with torch.no_grad():
        for layer, parts in ((model.blocks[2], 6), (model.final, 2)):
            for part in range(parts):
                weight = layer.weight.unflatten(0, (parts, -1))[part]  # type: ignore[operator]
                before = model.scores(images, PROMPTS[:1] * 2, times)
                assert float(before[0]) == pytest.approx(float(before[1]), abs=1e-4)
                weight.normal_(std=0.3)
                after = model.scores(images, PROMPTS[:1] * 2, times)
                assert abs(float(after[0] - after[1])) > 1e-3, part
                weight.zero_()


def test_the_time_embedding_is_cosines_then_sines() -> None:
    found = time_embedding(torch.tensor([0, 7]))
    assert found.shape == (2, 256) and torch.equal(found[0], torch.cat([torch.ones(128), torch.zeros(128)]))
    rates = [10_000 ** (-k / 128) for k in range(128)]
    torch.testing.assert_close(found[1, :128], torch.tensor([math.cos(7 * r) for r in rates]))
    torch.testing.assert_close(found[1, 128:], torch.tensor([math.sin(7 * r) for r in rates]))


def test_losses_of_ties_and_labels() -> None:
    one, other = torch.tensor([20.0, 20.0, 21.0, 21.0]), torch.tensor([20.0, 20.0, 20.0, 20.0])
    values = spm_loss(one, other, torch.tensor([0.5, 1.0, 1.0, 0.0]))
    expected = [0.0, math.log(2), math.log1p(math.exp(-1)), math.log1p(math.exp(1))]
    torch.testing.assert_close(values, torch.tensor(expected))
    tie = spm_loss(torch.tensor([3.0]), torch.tensor([1.0]), torch.tensor([0.5]))
    assert float(tie) == pytest.approx(math.log(math.cosh(1.0)), abs=1e-6), "a tie of unequal scores costs log cosh"
    gaps = torch.tensor([0.2, 0.2013, -0.2013, -0.2, 0.0])
    assert preference_of(gaps, 0.1).tolist() == [0.5, 1.0, 0.0, 0.5, 0.5], "a share of 0.1 is a gap of 0.2007"


def made(**settings: Any) -> Trainer:
    trainer = make_trainer(SPM(SPMConfig(start=SMALL, **settings)))
    shaken(trainer.roles.modules["spm"])  # type: ignore[arg-type]
    return trainer


def loss_of(trainer: Trainer, batch: Batch) -> Any:
    return trainer.method.loss(trainer.ctx, batch, trainer.method.phases[0])


def test_both_pictures_share_time_and_noise() -> None:
    """So equal pictures have equal scores, and exchanged ones exchanged scores."""
    trainer = made()
    batch = batch_of(trainer)
    batch.latents["rejected"] = batch.latents["chosen"]
    with torch.no_grad():
        found = loss_of(trainer, batch)
        torch.testing.assert_close(found.values, torch.full((4,), math.log(2)), atol=1e-4, rtol=0)
        batch.columns["tie"] = torch.ones(4)
        torch.testing.assert_close(loss_of(trainer, batch).values, torch.zeros(4), atol=1e-4, rtol=0)
        batch = batch_of(trainer)
        there = loss_of(trainer, batch)
        batch.latents = {"chosen": batch.latents["rejected"], "rejected": batch.latents["chosen"]}
        back = loss_of(trainer, batch)
    # L(-m) - L(m) = m
    torch.testing.assert_close((back.values - there.values).abs(), there.metrics["gap"], rtol=1e-3, atol=1e-4)
    right, told = there.partial["accuracy"]
    assert torch.equal(right + back.partial["accuracy"][0], torch.ones(4)) and torch.equal(told, torch.ones(4))
    assert torch.equal(sum(share for name, (_, share) in there.partial.items() if "_t" in name), torch.ones(4))


def test_scores_label_pairs_and_prompts_are_balanced() -> None:
    trainer = made(labels="scores", threshold=0.5)
    assert trainer.method.needs.columns == ("chosen_score", "rejected_score") and trainer.method.needs.counts
    batch = batch_of(trainer)
    scores = torch.tensor([[1.0, 2.0, 0.0, 0.0], [0.0, 0.0, 0.0, 2.0]])
    batch.columns |= {"chosen_score": scores[0], "rejected_score": scores[1]}
    assert trainer.method.preference(batch).tolist() == [0.5, 1.0, 0.5, 0.0]  # type: ignore[attr-defined]
    trainer.method.counts = {batch.prompts[0]: 4, batch.prompts[1]: 2}
    with torch.no_grad():
        torch.testing.assert_close(loss_of(trainer, batch).weights, torch.tensor([0.25, 0.5, 1.0, 1.0]))


def test_a_few_steps_learn_an_order() -> None:
    """That the labels' other way about is learned shows the sign, and that the weights reach the score."""
    trainer = make_trainer(SPM(SPMConfig(start=SMALL, labels="scores")), lr=2e-3)
    rows = [0, 1, 2, 3]
    batch = batch_of(trainer, rows)
    with torch.no_grad():
        first = loss_of(trainer, batch)
    worst = int(first.values.argmax())
    assert float(first.values[worst]) > math.log(2), "some pair is wrong at first"
    warm(trainer, 3)
    with torch.no_grad():
        assert float(loss_of(trainer, batch).values.mean()) < float(first.values.mean())


def test_it_is_saved_and_loaded_like_a_scorer(tmp_path: Path) -> None:
    model = shaken(load_step_aware(START)[0])
    run = tmp_path / "run"
    model.save(run / "model")
    images = pictures()
    scorer = load_scorer("spm", str(run), device="cpu")  # a run's folder
    torch.testing.assert_close(scorer.reward(images, PROMPTS, TIMES), model.scores(images, PROMPTS, TIMES).detach())  # type: ignore[call-arg]
    again, _ = load_step_aware(run / "model")
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    assert scorer.fingerprint_id != load_scorer("spm", START, device="cpu").fingerprint_id
    for name, what in (("pickscore", "give spm="), ("clip", "give spm=")):
        with pytest.raises(UserError, match=what):
            load_scorer(name, str(run / "model"), device="cpu")
    with pytest.raises(UserError, match="--scorers spm="):
        find_lora(str(run))
    with pytest.raises(UserError, match="train one"):
        load_step_aware("runs/not-trained-yet")
    with pytest.raises(UserError, match="makes no pictures"):
        Run(run, load_recipe("tiny/spm"), 0).pipeline()
    with pytest.raises(UserError, match="one time an image"):
        scorer.reward(images, PROMPTS, TIMES[:1])  # type: ignore[call-arg]
    (run / "model" / "step_aware.safetensors").write_bytes(b"torn")
    with pytest.raises(UserError, match="holds no plain tensors"):
        load_scorer("spm", str(run), device="cpu")


def test_a_plan_counts_pickscore_without_its_weights() -> None:
    model = shape_of("yuvalkirstain/PickScore_v1")
    assert sum(p.numel() for p in model.clip.parameters()) == 986_109_441
    width, depth = 1280, 32
    time = 256 * width + width + width * width + width + (depth * 6 + 2) * (width * width + width)
    assert sum(p.numel() for p in model.parameters()) == 986_109_441 + time
    assert next(model.parameters()).device.type == "meta"
