"""PPD: identities of the sheet (section 12), the extra attention against diffusers' IP-Adapter, users by table."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import Attention, IPAdapterAttnProcessor2_0
from safetensors.torch import save_file
from world import USERS, Rows, batch_of, family, make_trainer, warm

from diffalign.data.batch import Cond
from diffalign.errors import UserError
from diffalign.families.users import USER, UserAttention, attend
from diffalign.methods import make_method
from diffalign.methods.preference.dpo import dpo_loss
from diffalign.methods.preference.ppd import EVERYONE, read_users
from diffalign.trainer import Trainer


def trainer_of(rows: Rows | None = None, **options: Any) -> Trainer:
    return make_trainer(make_method("ppd", {"beta": 100.0, "user_dropout": 0.0, **options}), rows=rows)


def losses(trainer: Trainer, batch: Any = None) -> torch.Tensor:
    batch = batch_of(trainer) if batch is None else batch
    with torch.no_grad():
        return trainer.method.loss(trainer.ctx, batch, trainer.method.phases[0]).values


def part_of(trainer: Trainer) -> UserAttention:
    found = trainer.roles.extras["student"]
    assert isinstance(found, UserAttention)
    return found


def call(trainer: Trainer, role: str, users: list[int]) -> torch.Tensor:
    """Predictions of the same input for several users."""
    batch = batch_of(trainer, [0])
    n = len(users)
    cond = Cond(batch.cond["prompt"].embeds.expand(n, -1, -1), {USER: torch.tensor(users)[:, None]})
    with torch.no_grad():
        return trainer.ctx.model(role, batch.latents["chosen"].expand(n, -1, -1, -1), torch.full((n,), 500), cond)


def test_at_the_start_the_student_is_the_base_and_the_loss_log_2() -> None:
    trainer = trainer_of()
    assert torch.equal(call(trainer, "student", [1, 3]), call(trainer, "base", [1, 3]))
    assert losses(trainer).tolist() == pytest.approx([math.log(2)] * 4, abs=1e-6)
    warm(trainer)
    assert not torch.allclose(losses(trainer), torch.tensor(math.log(2)), atol=1e-3)


def test_users_part_ways_and_the_base_sees_none() -> None:
    trainer = warm(trainer_of())
    student, base = call(trainer, "student", [1, 2, 0, 1]), call(trainer, "base", [1, 2, 0, 1])
    assert torch.equal(base[0], base[1]) and torch.equal(base[0], base[2])
    assert torch.equal(student[0], student[3])
    gaps = [float((student[0] - other).abs().max()) for other in (student[1], student[2], base[0])]
    assert min(gaps) > 1e-4, gaps
    alone = torch.cat([call(trainer, "student", [user]) for user in (1, 2, 0, 1)])
    torch.testing.assert_close(student, alone, rtol=1e-5, atol=1e-6)


def test_the_loss_is_dpos_on_the_users_own_network() -> None:
    trainer = warm(trainer_of())
    ctx, batch = trainer.ctx, batch_of(trainer)
    t, noise = ctx.draw(batch)
    errors = {}
    with torch.no_grad():
        for role in ("student", "base"):
            for side in ("chosen", "rejected"):
                x_t = ctx.denoiser.add_noise(batch.latents[side], noise, t)
                cond = Cond(batch.cond["prompt"].embeds, {USER: torch.tensor([[1], [2], [3], [1]])})  # rows 0 .. 3
                errors[role, side] = ctx.error(role, x_t, t, cond, noise)
    expected, _ = dpo_loss(*errors.values(), beta=100.0)
    torch.testing.assert_close(losses(trainer), expected, rtol=1e-4, atol=1e-5)


def test_dropped_users_are_nobody_in_particular() -> None:
    trainer = warm(trainer_of(user_dropout=0.5), 3)
    batch = batch_of(trainer, range(12))
    index = trainer.method.user(trainer.ctx, batch)[:, 0]
    dropped = index == 0
    assert 1 < int(dropped.sum()) < 11 and torch.equal(index[~dropped], batch.columns["user"][~dropped].long() + 1)
    before = losses(trainer, batch)
    batch.columns["user"] = (batch.columns["user"] + 1) % 3
    after = losses(trainer, batch)
    torch.testing.assert_close(after[dropped], before[dropped], rtol=0, atol=0)
    assert float((after - before)[~dropped].abs().min()) > 0
    batch.columns["user"][:] = torch.nan  # rows that name no user
    assert not trainer.method.user(trainer.ctx, batch).any()


def test_gradients_reach_the_embeddings_of_the_users_of_a_batch() -> None:
    trainer = warm(trainer_of())
    trainer.roles.train_only(("student",))
    found = trainer.method.loss(trainer.ctx, batch_of(trainer, [0, 3]), trainer.method.phases[0])  # both of ann
    found.values.sum().backward()
    part = part_of(trainer)
    moved = part.table.grad.abs().amax((1, 2)) > 0
    assert moved.tolist() == [True, False, False] and part.nobody.grad.abs().max() == 0
    names = {name.rpartition(".")[0].rpartition(".")[2] for name in trainer.roles.named_parameters("student")}
    assert names == {"", "to_k", "to_v"}


def test_the_extra_attention_is_ip_adapters() -> None:
    """diffusers' own processor with the same W_k', W_v', tokens and scale."""
    torch.manual_seed(3)
    attention = Attention(query_dim=32, cross_attention_dim=16, heads=4, dim_head=8).eval()
    theirs = IPAdapterAttnProcessor2_0(32, cross_attention_dim=12, num_tokens=(3,), scale=0.7)
    x, text, user = torch.randn(2, 9, 32), torch.randn(2, 5, 16), torch.randn(2, 3, 12)
    block = torch.nn.Module()
    block.down_blocks, block.up_blocks, block.mid_block = (
        torch.nn.ModuleList(),
        torch.nn.ModuleList(),
        torch.nn.Module(),
    )
    block.attn2 = attention
    part = UserAttention({"attn2": 32}, ["ann"], 3, 12)
    part.layers["attn2"].load_state_dict(
        {"to_k.weight": theirs.to_k_ip[0].weight, "to_v.weight": theirs.to_v_ip[0].weight}
    )
    part.scale = 0.7
    part.attach(block)
    with torch.no_grad():
        plain = attention(x, encoder_hidden_states=text)
        ours = attention(x, encoder_hidden_states=part.condition(text, user))
        again = attention(x, encoder_hidden_states=text)
        part.detach()
        attention.set_processor(theirs)
        expected = attention(x, encoder_hidden_states=(text, [user[:, None]]))
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(plain, again) and float((ours - plain).abs().max()) > 0.01
    assert not attention.to_q._forward_hooks and not attention._forward_pre_hooks


def test_mixes_of_users_end_at_the_users() -> None:
    part = UserAttention({"a": 8}, USERS, 2, 4)
    ann, bob = part.embedding("ann"), part.embedding("bob")
    assert torch.equal(part.embedding({"ann": 1.0, "bob": 0.0}), ann)
    assert torch.equal(part.embedding({"ann": 0.0, "bob": 1.0}), bob)
    torch.testing.assert_close(part.embedding({"ann": 0.3, "bob": 0.7}), 0.3 * ann + 0.7 * bob)
    with pytest.raises(UserError, match="knows no user 'an'; did you mean 'ann'"):
        part.embedding("an")
    with pytest.raises(UserError, match=r"is \(3, 4\), and this model's are \(2, 4\)"):
        part.embedding(torch.zeros(3, 4))


def test_without_a_column_all_are_one_user() -> None:
    rows = Rows()
    del rows.columns["user"]
    trainer = trainer_of(rows)
    trainer.method.users = ()
    part = trainer.method.build(family())["student"]
    assert isinstance(part, UserAttention) and part.users == (EVERYONE,)
    assert torch.equal(trainer.method.user(trainer.ctx, batch_of(trainer)), torch.ones(4, 1, dtype=torch.int64))
    assert torch.equal(part.enter(2, torch.zeros(2), {}), part.table.expand(2, -1, -1)), "sampled as that user"


def test_embeddings_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "users.safetensors"
    given = {name: torch.randn(2, 6, generator=torch.Generator().manual_seed(n)) * 50 for n, name in enumerate("zyx")}
    named = {user: tensor.clone() for user, tensor in zip(USERS, given.values(), strict=True)}
    save_file({**given, **named}, file)
    trainer = warm(trainer_of(users=str(file)))
    part = part_of(trainer)
    assert part.users == ("ann", "bob", "cem", "x", "y", "z"), "users of the file beyond the data's can be sampled too"
    assert "table" not in trainer.roles.named_parameters("student") and part.table.shape == (6, 2, 6)
    torch.testing.assert_close(part.table[0], torch.nn.functional.layer_norm(given["z"], (6,)))
    assert torch.equal(trainer.method.user(trainer.ctx, batch_of(trainer)), torch.tensor([[1], [2], [3], [1]]))
    student = call(trainer, "student", [1, 6, 2])
    assert torch.equal(student[0], student[1]) and not torch.equal(student[0], student[2]), "z has ann's embedding"
    part.choose(given["z"])
    assert torch.equal(part.enter(1, torch.zeros(1), {})[0], part.table[0]), "a new user's, in the same unit"


BROKEN: dict[str, tuple[dict[str, torch.Tensor] | None, str]] = {
    "absent": (None, "does not exist"),
    "shapes": ({"ann": torch.zeros(3), "bob": torch.zeros(4)}, "2 shapes"),
    "nan": ({"ann": torch.full((3,), torch.nan)}, "not finite"),
    "missing": ({"ann": torch.ones(3), "dora": torch.ones(3)}, "no embedding of 2 users of the data, such as 'bob'"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_tables_that_do_not_serve(kind: str, tmp_path: Path) -> None:
    table, expected = BROKEN[kind]
    file = tmp_path / "users.safetensors"
    if table is not None:
        save_file(table, file)
    method = make_method("ppd", {"users": str(file)})
    method.users = USERS
    with pytest.raises(UserError, match=expected) as caught:
        method.build(family())
    assert "\n" not in str(caught.value)
    file.write_bytes(b"text")
    with pytest.raises(UserError, match="is no safetensors file"):
        read_users(str(file))


def test_attention_keeps_the_queries_format() -> None:
    q = torch.randn(2, 5, 8).bfloat16()
    assert attend(q, torch.randn(2, 3, 8), torch.randn(2, 3, 8), 2).dtype == torch.bfloat16
