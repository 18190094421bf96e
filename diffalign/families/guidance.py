"""Guidance that a network is told, not given by a second branch: adapters beside its cross-attentions (AGD), and the
guidance embedding that some U-Nets have in their time embedding (LCM's)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..data.batch import Cond
from ..errors import Note, UserError
from .extras import Extra
from .users import attend, cross_attentions, key_of

GUIDANCE = "guidance"  # key of a call's guidance in its further conditioning: (B, 1), in UNITS, as a whole number
UNITS = 10_000  # whole numbers of these keep their value in half precision
EMBEDDING = "timestep_cond"  # key of a guidance embedding there: (B, width)
PROJECTION = "time_embedding.cond_proj"  # the layer of a U-Net that takes one
WAVES = 256  # sines and cosines of a number that becomes a token


def in_units(w: Tensor) -> Tensor:
    """Guidance (B,) as it stands in a call's further conditioning, int64 (B, 1)."""
    return (w.double() * UNITS).round().long()[:, None]


def waves(value: Tensor, width: int = WAVES) -> Tensor:
    """Sines and cosines (B, width) of numbers (B,), of periods from 2 pi to 20000 pi."""
    rates = torch.exp(-math.log(10000) * torch.arange(width // 2, device=value.device) / (width // 2))
    angles = value.float()[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], 1)


def guidance_embedding(w: Tensor, width: int) -> Tensor:
    """What U-Nets with ``time_cond_proj_dim`` = width are told of guidance w (B,), fp32 (B, width).

    As diffusers' pipelines and LCM (arXiv 2310.04378) have it: of w - 1, the extra weight of the conditional branch."""
    half = width // 2
    rates = torch.exp(-math.log(10000) / (half - 1) * torch.arange(half, device=w.device, dtype=torch.float32))
    angles = 1000 * (w.float() - 1)[:, None] * rates
    found = torch.cat([angles.sin(), angles.cos()], 1)
    return torch.nn.functional.pad(found, (0, width % 2))


def embedding_width(unet: nn.Module) -> int:
    """Width of the guidance embedding that a U-Net is told (``time_cond_proj_dim``); 0 where it is told none."""
    return int(getattr(unet.config, "time_cond_proj_dim", None) or 0)


def require_embedding(unet: nn.Module, setting: str) -> int:
    """`embedding_width` of a U-Net that has to have one, because ``setting`` asks for it.

    Raises UserError where it has none."""
    width = embedding_width(unet)
    if not width:
        raise UserError(
            f"{setting} asks for a guidance embedding, and this U-Net has none (time_cond_proj_dim); set "
            "model.guidance_embedding=256 for a fresh one, by which the student starts as the teacher, or leave it out"
        )
    return width


def add_embedding(unet: UNet2DConditionModel, width: int) -> None:
    """Gives a U-Net without one diffusers' own layer for a guidance embedding of ``width``, in place.

    Its weights are 0, so that the U-Net says what it said, whatever it is told."""
    before = unet.time_embedding.linear_1
    layer = nn.Linear(width, before.in_features, bias=False, device=before.weight.device, dtype=before.weight.dtype)
    nn.init.zeros_(layer.weight.requires_grad_(False))
    unet.time_embedding.cond_proj = layer
    unet.register_to_config(time_cond_proj_dim=width)


def remove_embedding(unet: UNet2DConditionModel) -> None:
    """Takes away what `add_embedding` gave, in place."""
    unet.time_embedding.cond_proj = None
    unet.register_to_config(time_cond_proj_dim=None)


def tell(cond: Cond, w: Tensor, width: int) -> Cond:
    """Conditioning that tells a U-Net guidance w (B,) besides, by its embedding of ``width``."""
    return Cond(cond.embeds, {**cond.added, EMBEDDING: guidance_embedding(w, width)})


class _Layer(nn.Module):
    """The adapter of one cross-attention: from its input to the tokens and back; 0 at the start."""

    def __init__(self, inner: int, hidden: int) -> None:
        super().__init__()
        self.to_q = nn.Linear(inner, hidden, bias=False)
        self.to_k = nn.Linear(hidden, hidden, bias=False)
        self.to_v = nn.Linear(hidden, hidden, bias=False)
        self.to_out = nn.Linear(hidden, inner)
        nn.init.zeros_(self.to_out.weight)
        nn.init.zeros_(self.to_out.bias)
        self.seen: Tensor | None = None
        self.tokens: Tensor | None = None


class GuidanceAdapters(Extra):
    """AGD's adapters (arXiv 2503.07274): each cross-attention's output plus scale times attention of its input to
    tokens of the guidance, the time and the prompt. One forward then stands for guided two.

    Args:
        widths: width of what each cross-attention is given and gives, by its name in the U-Net.
        text: width of the text; hidden: of the adapters; heads: of their attention.
        low, high: the guidance that they are trained for.
        sees_time, sees_prompt: whether the tokens say the time, and the prompt.
        prediction: what the network predicts; they are of no use on one that predicts something else.

    Raises UserError when ``hidden`` is no multiple of ``heads``.
    """

    kind = "guidance-adapters"

    def __init__(
        self,
        widths: Mapping[str, int],
        text: int,
        hidden: int = 320,
        heads: int = 8,
        low: float = 1.0,
        high: float = 12.0,
        sees_time: bool = True,
        sees_prompt: bool = True,
        prediction: str = "epsilon",
    ) -> None:
        super().__init__()
        if hidden % heads:
            raise UserError(f"method.hidden {hidden} is no multiple of method.heads {heads}; change one of them")
        self.widths, self.heads, self.low, self.high, self.prediction = dict(widths), heads, low, high, prediction
        self.hidden, self.text = hidden, text
        self.guide = _embedder(hidden)
        self.time = _embedder(hidden) if sees_time else None
        self.prompt = nn.Linear(text, hidden) if sees_prompt else None
        self.layers = nn.ModuleDict({key_of(name): _Layer(width, hidden) for name, width in self.widths.items()})
        self.chosen = min(max(7.5, low), high)

    def settings(self) -> dict[str, Any]:
        """Plain data."""
        seen = {"sees_time": self.time is not None, "sees_prompt": self.prompt is not None}
        shape = {"widths": self.widths, "text": self.text, "hidden": self.hidden, "heads": self.heads}
        return {**shape, "low": self.low, "high": self.high, **seen, "prediction": self.prediction}

    def choose(self, guidance: float) -> float:
        """The guidance of calls that say none; returns it, and warns where the adapters were not trained for it.

        Raises UserError when it is negative or no number."""
        if not (math.isfinite(guidance) and guidance >= 0):
            raise UserError(f"guidance must be at least 0, not {guidance:g}")
        if not self.low <= guidance <= self.high:
            warnings.warn(
                f"guidance {guidance:g} is outside of {self.low:g} to {self.high:g}, for which these adapters were "
                "trained",
                Note,
                stacklevel=3,
            )
        self.chosen = guidance
        return guidance

    def enter(self, rows: int, t: Tensor, added: Mapping[str, Tensor]) -> Tensor:
        """The tokens of guidance and time (rows, 1 or 2, hidden)."""
        if GUIDANCE in added:
            w = added[GUIDANCE].reshape(-1).float() / UNITS
        else:
            w = torch.full((rows,), self.chosen, device=t.device)
        kind = next(self.guide.parameters()).dtype
        tokens = [self.guide(waves(100 * w).to(kind))]  # 12 becomes 1200: as fine as times are told
        if self.time is not None:
            tokens.append(self.time(waves(t).to(kind)))
        return torch.stack(tokens, 1)

    def condition(self, text: Tensor, call: Tensor) -> tuple[Tensor, Tensor, int]:
        """Text and tokens side by side, parted again by each attention; for the hooks of this one alone."""
        if self.prompt is not None:
            call = torch.cat([call, self.prompt(text.to(self.prompt.weight.dtype)).to(call.dtype)], 1)
        return text, call, id(self)

    def attach(self, unet: nn.Module) -> None:
        """Hooks on the blocks, and on each cross-attention: its input and its output."""
        super().attach(unet)
        for name, attention in cross_attentions(unet).items():
            self._hooks += self._adapt(attention, self.layers[key_of(name)])

    def _adapt(self, attention: Attention, layer: nn.Module) -> list[RemovableHandle]:
        assert isinstance(layer, _Layer)

        def part(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            given = kwargs.get("encoder_hidden_states")
            layer.seen, layer.tokens = None, None
            if not isinstance(given, tuple) or given[2] != id(self):
                return None
            text, layer.tokens, _ = given
            layer.seen = args[0] if args else kwargs["hidden_states"]
            return args, {**kwargs, "encoder_hidden_states": text}

        def add(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Any:
            if layer.tokens is None:
                return None
            assert layer.seen is not None
            query = layer.to_q(layer.seen.to(layer.to_q.weight.dtype))
            found = attend(query, layer.to_k(layer.tokens), layer.to_v(layer.tokens), self.heads)
            layer.seen, layer.tokens = None, None
            return output + self.scale * layer.to_out(found.to(query.dtype)).to(output.dtype)

        return [
            attention.register_forward_pre_hook(part, with_kwargs=True),
            attention.register_forward_hook(add),
        ]


def widths_of(unet: nn.Module) -> dict[str, int]:
    """Width of what each cross-attention of a U-Net is given, by name."""
    return {name: int(attention.query_dim) for name, attention in cross_attentions(unet).items()}


def _embedder(hidden: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(WAVES, hidden), nn.SiLU(), nn.Linear(hidden, hidden))
