"""Cross-attention to a user, beside the attention to the text (PPD; the way of IP-Adapter, arXiv 2308.06721)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..errors import UserError, nearest
from .extras import Extra

USER = "user"  # key of a call's users in its further conditioning: (B, 1), 0 for nobody, i + 1 for users[i]


def cross_attentions(unet: nn.Module) -> dict[str, Attention]:
    """The attentions to the text of a U-Net, by name, in order."""
    return {
        name: module
        for name, module in unet.named_modules()
        if isinstance(module, Attention) and name.endswith("attn2")
    }


class _Layer(nn.Module):
    """W_k' and W_v' of one cross-attention; W_v' is 0 at the start, so that the output is the base's."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.to_k = nn.Linear(width, inner, bias=False)
        self.to_v = nn.Linear(width, inner, bias=False)
        nn.init.zeros_(self.to_v.weight)
        self.query: Tensor | None = None
        self.users: Tensor | None = None


class UserAttention(Extra):
    """Attn(Q, K, V) + scale * Attn(Q, u W_k', u W_v') in every cross-attention; Q and the output layer are the base's.

    Args:
        widths: inner width of each cross-attention, by its name in the U-Net.
        users: names; the users of a call are given by number (`USER`), or chosen for all calls by `choose`.
        tokens, width: shape of a user's embedding u (T, V).
        learned: embeddings are trained with the rest; else they are given and stay.
        given: (users, T, V), for embeddings that are not learned.

    Nobody (number 0) has an embedding of its own, which is always learned: on rows whose user was dropped.
    """

    kind = "user-attention"

    def __init__(
        self,
        widths: Mapping[str, int],
        users: Sequence[str],
        tokens: int,
        width: int,
        learned: bool = True,
        given: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.widths, self.users, self.learned = dict(widths), tuple(users), learned
        self.nobody = nn.Parameter(torch.randn(tokens, width))
        if learned:
            self.table = nn.Parameter(torch.randn(len(users), tokens, width))
        else:
            self.register_buffer("table", torch.zeros(len(users), tokens, width) if given is None else given)
        self.layers = nn.ModuleDict({key_of(name): _Layer(width, inner) for name, inner in self.widths.items()})
        self.chosen: Tensor | None = None

    def settings(self) -> dict[str, Any]:
        """Plain data."""
        tokens, width = self.nobody.shape
        shape = {"tokens": tokens, "width": width, "learned": self.learned}
        return {"widths": self.widths, "users": list(self.users), **shape}

    # -- who ----------------------------------------------------------------------------------------------------------

    def choose(self, user: str | Mapping[str, float] | Tensor | None) -> None:
        """Whose taste calls follow that name no user: a name, names with weights (a mix), or an embedding (T, V).

        None: the only user there is, or nobody in particular where there are several.

        Raises UserError for a name that is not known and an embedding of another shape."""
        self.chosen = None if user is None else self.embedding(user)

    def embedding(self, user: str | Mapping[str, float] | Tensor) -> Tensor:
        """u (T, V) of a user, of a mix (the sum of weight times embedding), or as given, in unit variance."""
        if isinstance(user, Tensor):
            given = user if user.ndim == 2 else user[None]
            if given.shape != self.nobody.shape:
                raise UserError(
                    f"the user's embedding is {tuple(given.shape)}, and this model's are {tuple(self.nobody.shape)}"
                )
            return unit(given).to(self.nobody)
        mix = {user: 1.0} if isinstance(user, str) else user
        rows = []
        for name, weight in mix.items():
            if name not in self.users:
                raise UserError(f"this model knows no user '{name}'{nearest(name, self.users)}")
            rows.append(weight * self.table[self.users.index(name)].detach())
        return torch.stack(rows).sum(0)

    def enter(self, rows: int, t: Tensor, added: Mapping[str, Tensor]) -> Tensor:
        """The users' embeddings (rows, T, V), in fp32 where they are trained."""
        if USER in added:
            number = added[USER].reshape(-1).long()
            return torch.where((number == 0)[:, None, None], self.nobody, self.table[(number - 1).clamp_min(0)])
        if self.chosen is not None:
            return self.chosen.to(self.nobody).expand(rows, -1, -1)
        return (self.table[0] if len(self.users) == 1 else self.nobody).expand(rows, -1, -1)

    # -- how ----------------------------------------------------------------------------------------------------------

    def condition(self, text: Tensor, call: Tensor) -> tuple[Tensor, Tensor, int]:
        """Text and users side by side, parted again by each attention; for the hooks of this one alone."""
        return text, call, id(self)

    def attach(self, unet: nn.Module) -> None:
        """Hooks on the blocks, and on each cross-attention: its input, its query and its output layer."""
        super().attach(unet)
        for name, attention in cross_attentions(unet).items():
            self._hooks += self._attend(attention, self.layers[key_of(name)])

    def _attend(self, attention: Attention, layer: nn.Module) -> list[RemovableHandle]:
        assert isinstance(layer, _Layer)

        def part(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            given = kwargs.get("encoder_hidden_states")
            layer.query, layer.users = None, None
            if not isinstance(given, tuple) or given[2] != id(self):
                return None
            text, layer.users, _ = given
            return args, {**kwargs, "encoder_hidden_states": text}

        def keep(module: nn.Module, args: tuple[Any, ...], query: Tensor) -> None:
            if layer.users is not None:
                layer.query = query

        def add(module: nn.Module, args: tuple[Any, ...]) -> Any:
            if layer.users is None:
                return None
            assert layer.query is not None
            result = attend(layer.query, layer.to_k(layer.users), layer.to_v(layer.users), attention.heads)
            layer.query, layer.users = None, None
            return (args[0] + self.scale * result.to(args[0].dtype), *args[1:])

        return [
            attention.register_forward_pre_hook(part, with_kwargs=True),
            attention.to_q.register_forward_hook(keep),
            attention.to_out[0].register_forward_pre_hook(add),
        ]


def attend(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    """Attention (B, N, C) of queries (B, N, C) to keys and values (B, T, C), which take the queries' number format."""
    q, k, v = (x.to(query.dtype).unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2)


def unit(embeddings: Tensor) -> Tensor:
    """Given embeddings (..., V) with mean 0 and variance 1 each: hidden states of large models differ in size."""
    return F.layer_norm(embeddings.float(), embeddings.shape[-1:])


def key_of(name: str) -> str:
    """A module's name without dots, as a key of a ModuleDict."""
    return name.replace(".", "-")
