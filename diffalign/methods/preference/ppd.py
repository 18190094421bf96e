"""PPD (Dang et al. 2025, arXiv 2501.06655): Diffusion-DPO for many users, told apart by an embedding."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ...data.batch import Cond
from ...errors import UserError
from ...families.users import USER, UserAttention, cross_attentions, unit
from ..base import Paper, on_device
from ..pair import Noised
from .dpo import DPO, DPOConfig

if TYPE_CHECKING:
    from ...context import Context
    from ...data.batch import Batch
    from ...families import Model

EVERYONE = "everyone"  # the one user of data without the column


def read_users(path: str) -> tuple[tuple[str, ...], Tensor]:
    """Names (sorted) and embeddings (users, T, V) of a table file: safetensors with one (V,) or (T, V) tensor a user.

    Raises UserError when the file is absent or damaged, or its embeddings differ in shape or are not finite."""
    if not Path(path).expanduser().is_file():
        raise UserError(f"method.users '{path}' does not exist; give a .safetensors file with a tensor for each user")
    try:
        table = load_file(Path(path).expanduser())
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"method.users '{path}' is no safetensors file ({' '.join(str(error).split())[:120]})"
        ) from error
    shapes = {tuple(tensor.shape) for tensor in table.values()}
    if len(shapes) != 1 or len(next(iter(shapes))) not in (1, 2):
        raise UserError(
            f"method.users '{path}': embeddings have {len(shapes)} shapes; give each user one (V,) or (T, V) tensor"
        )
    names = tuple(sorted(table))
    rows = torch.stack([table[name].float() for name in names])
    if not bool(torch.isfinite(rows).all()):
        raise UserError(f"method.users '{path}' holds numbers that are not finite; make the embeddings again")
    return names, rows if rows.ndim == 3 else rows[:, None]


class PPDConfig(DPOConfig):
    """Settings of PPD."""

    users: str | None = Field(
        None, description="a .safetensors file of few-shot embeddings by user; else they are learned"
    )
    tokens: int = Field(4, ge=1, description="vectors of a learned embedding")
    width: int = Field(128, ge=1, description="their width")
    user_dropout: float = Field(0.1, ge=0, lt=1, description="share of pairs that are taken as nobody's")


class PPD(DPO):
    """Diffusion-DPO whose student attends to a user: Attn(Q, K, V) + Attn(Q, u W_k', u W_v') in every cross-attention.

    Only W_k', W_v' (and learned embeddings) are trained; W_v' is 0 at the start, so that the student is the base. The
    base is frozen and sees no user. Rows say their user in the column ``user``; without it all are of one user, and the
    method is DPO on a constant u.

    The paper is known here by notes only: it has Stable Cascade, takes u from LLaVA-OneVision's hidden states of four
    preference triples of the user (``users`` is a file of such vectors, made elsewhere; they must come from other pairs
    than those trained on), and zeroes u in a part of the training rows. Ours: the U-Nets of SD and SDXL; embeddings of
    given width, or learned ones a user (the paper's test with rewards as users has one-hot vectors, which are a learned
    table here); given ones in unit variance; a dropped user has a learned embedding of its own, for with u = 0 and
    W' without bias nothing would be learned from such a row; the dropout's share; beta.
    """

    Config = PPDConfig  # type: ignore[assignment]  # DPO's with more settings
    paper = Paper(
        title="Personalized Preference Fine-tuning of Diffusion Models",
        arxiv="2501.06655",
        implements="DPO with a user's embedding as extra cross-attention, learned a user or given from few shots",
        differs="SD and SDXL in place of Stable Cascade; embeddings are read or learned, not made by LLaVA-OneVision; "
        "dropped users share a learned embedding (the paper: zeros); beta and the share of dropped users are ours",
    )
    config: PPDConfig

    def build(self, family: Model) -> dict[str, nn.Module]:
        """The user attention as the student: the frozen U-Net with it is its network.

        Raises UserError when a user of the data has no embedding in ``method.users``."""
        widths = {name: int(attention.inner_dim) for name, attention in cross_attentions(family.unet).items()}
        users = self.users or (EVERYONE,)
        if self.config.users is None:
            self._numbers = torch.arange(len(users) + 1)
            return {"student": UserAttention(widths, users, self.config.tokens, self.config.width)}
        names, given = read_users(self.config.users)
        absent = [user for user in users if user not in names]
        if absent:
            raise UserError(
                f"method.users '{self.config.users}' has no embedding of {len(absent)} users of the data, such as "
                f"'{absent[0]}'; add them, or set method.users=null"
            )
        self._numbers = torch.tensor([0, *(names.index(user) + 1 for user in users)])
        tokens, width = given.shape[1:]
        return {"student": UserAttention(widths, names, tokens, width, learned=False, given=unit(given))}

    def user(self, ctx: Context, batch: Batch) -> Tensor:
        """The users' numbers (B, 1) as `UserAttention` counts them: 0 where dropped, or where a row names none."""
        coins = [generator.random() < self.config.user_dropout for generator in ctx.rng(USER, batch)]
        dropped = on_device(coins, ctx.device)
        named = batch.columns.get(USER)
        index = torch.zeros(len(batch), device=ctx.device) if named is None else named.nan_to_num(nan=-1.0)
        return self._numbers.to(ctx.device, non_blocking=True)[index.long() + 1].masked_fill(dropped, 0)[:, None]

    def noise(self, ctx: Context, batch: Batch) -> Noised:
        """As DPO's, told whose pair it is."""
        noised = super().noise(ctx, batch)
        noised.cond = Cond(noised.cond.embeds, {**noised.cond.added, USER: self.user(ctx, batch).repeat(2, 1)})
        return noised
