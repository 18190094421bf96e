"""SoftREPA: values worked by hand (offline sheet, sections 13 and 18: V20), groups, and what is trained."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from world import Rows, batch_of, family, gap, make_trainer, warm, weights

from diffalign.data.batch import Cond
from diffalign.data.source import Source
from diffalign.errors import UserError
from diffalign.families.extras import SoftTokens
from diffalign.families.known import KNOWN, meta_network
from diffalign.methods import make_method
from diffalign.methods.preference.softrepa import combinations, softrepa_loss
from diffalign.recipe import load_recipe
from diffalign.setup import check_groups
from diffalign.trainer import Trainer

WORLD = {"group": 2, "times": 100, "temperature": 1.0}
STEADY = {"max_grad_norm": None, "eps": 1e-2}


def trainer_of(rows: Rows | None = None, train: dict[str, Any] | None = None, **options: Any) -> Trainer:
    return make_trainer(make_method("softrepa", {**WORLD, **options}), rows=rows, **(train or {}))


@pytest.mark.parametrize(("n", "best"), [(4, 0.0534904), (8, 0.1206318), (16, 0.2427380)])
def test_golden_values_and_bounds(n: int, best: float) -> None:
    equal = torch.full((n, n), 0.2, dtype=torch.float64)
    assert softrepa_loss(equal)[0].tolist() == pytest.approx([math.log(n)] * n, abs=1e-12)
    apart = torch.full((n, n), 1e3, dtype=torch.float64)
    apart[:, 0] = 0
    assert softrepa_loss(apart)[0].tolist() == pytest.approx([best] * n, abs=1e-7)
    torch.manual_seed(0)
    errors = torch.rand(64, n, dtype=torch.float64)
    loss, _ = softrepa_loss(errors)
    assert float(loss.min()) > best, "no loss falls below the bound"
    assert not torch.allclose(softrepa_loss(errors + 0.1)[0], loss), "a constant added to a row changes its loss"
    logits = 4 * torch.exp(-errors / 0.07)
    torch.testing.assert_close(loss, F.cross_entropy(logits, torch.zeros(64, dtype=torch.long), reduction="none"))
    torch.testing.assert_close(softrepa_loss(errors, dweight=10)[0], loss + 10 * errors[:, 0])


def test_texts_that_do_not_count_change_nothing() -> None:
    errors = torch.rand(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    known = torch.tensor([[True, True, False, True]] * 3)
    torch.testing.assert_close(softrepa_loss(errors, known=known)[0], softrepa_loss(errors[:, [0, 1, 3]])[0])
    alone, _ = softrepa_loss(errors, known=torch.zeros(3, 4, dtype=torch.bool))
    assert alone.abs().max() == 0, "an image with its own text alone has nothing to learn from"


def test_every_image_meets_every_text_of_its_group() -> None:
    (image, text, column), leaders = combinations(["d", "b", "c", "a", "e"], [0] * 5, 3)
    pairs = list(zip(image, text, strict=True))
    assert set(pairs) == {(i, j) for group in ((0, 1, 2), (3, 4)) for i in group for j in group} and len(pairs) == 13
    assert all((i == j) == (c == 0) for (i, j), c in zip(pairs, column, strict=True))
    assert leaders == [1, 1, 1, 3, 3]


def test_the_loss_is_the_sheets() -> None:
    """Each error by a call of its own, at one t and one noise for the group."""
    trainer = warm(trainer_of(group=4, dweight=3.0))
    ctx, batch = trainer.ctx, batch_of(trainer)
    with torch.no_grad():
        found = trainer.method.loss(ctx, batch, trainer.method.phases[0])
        (t, *_), (noise, *_) = ctx.draw(batch)  # row-0 has the smallest id
        assert len({int(x) for x in ctx.draw(batch)[0]}) > 1
        x_t = ctx.denoiser.add_noise(batch.latents["image"], noise.expand(4, -1, -1, -1), t.expand(4))
        errors = torch.zeros(4, 4)
        for i in range(4):
            for j in range(4):
                text = batch.cond["prompt"].take([j])
                errors[i, j] = ctx.error("student", x_t[i : i + 1], t[None], text, noise[None])[0]
    expected = F.cross_entropy(4 * torch.exp(-errors), torch.arange(4), reduction="none")
    torch.testing.assert_close(found.metrics["contrast"], expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.values, expected + 3 * errors.diag(), rtol=1e-5, atol=1e-5)


def test_order_within_a_group_does_not_matter_and_its_members_do() -> None:
    trainer = warm(trainer_of(group=4))
    loss, phase = trainer.method.loss, trainer.method.phases[0]
    with torch.no_grad():
        there = loss(trainer.ctx, batch_of(trainer, [0, 1, 2, 3]), phase).values
        back = loss(trainer.ctx, batch_of(trainer, [2, 0, 3, 1]), phase).values
        other = loss(trainer.ctx, batch_of(trainer, [0, 1, 2, 4]), phase).values
    torch.testing.assert_close(back, there[[2, 0, 3, 1]], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(other[:3], there[:3], atol=1e-4)


def test_a_row_with_the_same_text_is_no_negative() -> None:
    rows = Rows(kind="image")
    rows.embeds[1] = rows.embeds[0]
    trainer = trainer_of(rows)
    found = trainer.method.loss(trainer.ctx, batch_of(trainer), trainer.method.phases[0])
    assert found.metrics["contrast"][:2].abs().max() < 1e-6 < found.metrics["contrast"][2:].min()


def test_processes_and_buckets_leave_groups_whole() -> None:
    """Groups of a step are the same for one, two and three processes, each of one bucket; nothing is lost."""
    rows = Rows(30, kind="image")
    rows.places = (np.arange(30) % 7 > 3).astype(np.uint16)
    uncond = Cond(torch.zeros(1, 5, 16))
    source = Source(rows, range(30), 0, uncond, group=4)  # type: ignore[arg-type]

    def groups(rank: int, world: int, micro: int, draw: int) -> list[tuple[int, ...]]:
        cuts = source.cut(*source.share(draw, 12, rank, world), micro)
        assert all(len(set(rows.places[part])) == 1 and len(part) <= micro for part, _ in cuts)
        return [tuple(part[k : k + 4]) for part, _ in cuts for k in range(0, len(part), 4)]

    for draw in range(5):
        whole = groups(0, 1, 12, draw)
        assert sorted(row for group in whole for row in group) == sorted(source.rows(draw * 12, 12)[0])
        assert max(map(len, whole)) == 4
        for world, micro in ((2, 4), (3, 8), (1, 4)):
            assert sorted(g for rank in range(world) for g in groups(rank, world, micro, draw)) == sorted(whole)

    def held(world: int) -> list[tuple[int, ...]]:
        parts = [source.portion(rank, world) for rank in range(world)]
        cuts = [rows for part in parts for rows, _ in source.cut(part, [0] * len(part), 8)]
        return sorted(tuple(rows[k : k + 4]) for rows in cuts for k in range(0, len(rows), 4))

    assert held(1) == held(3) and sorted(row for group in held(3) for row in group) == list(range(30))


def test_micro_batches_of_whole_groups_take_the_same_step() -> None:
    whole = warm(trainer_of(train={"batch": 8, **STEADY}))
    parts = warm(trainer_of(train={"batch": 8, "micro_batch": 2, **STEADY}))
    assert gap(weights(whole), weights(parts)) < 1e-5


@pytest.mark.parametrize("key", ["train.batch", "train.micro_batch"])
def test_sizes_that_would_part_a_group_are_refused(key: str) -> None:
    recipe = load_recipe("tiny/softrepa", ["train.batch=16", f"{key}=6"])
    method = make_method("softrepa", {"group": 4})
    with pytest.raises(UserError, match=f"{key} 6 is no multiple of the 4 rows .*; set it to 8"):
        check_groups(recipe, method, 1)
    with pytest.raises(UserError, match="for each of 5 processes; set it to 20"):
        check_groups(load_recipe("tiny/softrepa"), method, 5)


def test_tokens_start_at_the_empty_prompt_or_at_normals_of_the_seed() -> None:
    made = make_method("softrepa", {"tokens": 3}).build(family())["student"]
    assert isinstance(made, SoftTokens)
    assert torch.equal(made.tokens, family().encode_prompts([""]).embeds[0, :1].expand(3, -1))
    tokens = [trainer_of(train={"seed": seed}, init="normal").roles.modules["student"].tokens for seed in (0, 0, 1)]
    assert torch.equal(tokens[0], tokens[1]) and not torch.equal(tokens[0], tokens[2])
    wide = SoftTokens(4000, 16).tokens.detach()
    assert float(wide.std()) == pytest.approx(0.02, rel=0.05)


def test_parts_that_see_no_text_are_refused() -> None:
    family_ = family()
    family_.unet.down_blocks[0].has_cross_attention = False
    with pytest.raises(UserError, match="where=down: no block there attends"):
        make_method("softrepa", {}).build(family_)


def test_offsets_follow_the_time() -> None:
    extra = SoftTokens(2, 16, times=100)
    t = torch.tensor([0, 9, 10, 999])
    call = extra.enter(4, t, {})
    assert torch.equal(call, extra.tokens + extra.offsets[[0, 0, 1, 99]][:, None])
    text = torch.arange(4 * 3 * 16.0).view(4, 3, 16)
    seen = extra.condition(text, call)
    assert torch.equal(seen[:, 1:3], call) and torch.equal(seen[:, [0, 3, 4]], text), "after the text's first token"


@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl"])
def test_only_tokens_are_trained_and_they_are_few(name: str) -> None:
    unet = meta_network(KNOWN[name])
    with torch.device("meta"):
        extra = SoftTokens(8, unet.config.cross_attention_dim, ("down", "mid"), times=100)
    assert sum(p.numel() for p in extra.parameters()) < 1_000_000
    trainer = trainer_of()
    before = {n: p.clone() for n, p in trainer.roles.unet.named_parameters()}
    warm(trainer)
    assert set(trainer.roles.named_parameters("student")) == {"tokens", "offsets"}
    assert all(torch.equal(p, before[n]) and p.grad is None for n, p in trainer.roles.unet.named_parameters())
