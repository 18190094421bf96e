"""Small trained parts beside a frozen U-Net that enter its call: soft text tokens, a user's cross-attention, guidance.

They enter by hooks, so no forward is copied and the U-Net's own weights and names stay as they are. What a call brings
along is put in the place of the text that a block is given, outside of what gradient checkpointing recomputes: a
recomputed block gets the arguments of its own call, whatever role is active by then (the third trap of `roles`).
"""

from __future__ import annotations

import json
import os
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..errors import UserError

NAME = "extra.safetensors"
HEADER = "diffalign_extra"  # the file's text entry that says what it holds
PARTS = ("down", "mid", "up")


class Extra(nn.Module):
    """Base of the parts that make a role of a frozen U-Net. Off, as it is at first, the U-Net computes as without it.

    ``on`` decides at the start of a call; a role switches it. ``scale`` is its strength where it has one."""

    kind: ClassVar[str]

    def __init__(self) -> None:
        super().__init__()
        self.on = False
        self.scale = 1.0
        self._call: Any = None
        self._hooks: list[RemovableHandle] = []

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Plain data from which ``type(self)(**settings)`` makes one of the same shape."""

    @abstractmethod
    def enter(self, rows: int, t: Tensor, added: Mapping[str, Tensor]) -> Any:
        """What a call of ``rows`` samples at times ``t`` (rows,) brings along; ``added``: its further conditioning."""

    @abstractmethod
    def condition(self, text: Tensor, call: Any) -> Any:
        """What a block is given in the place of the text (B, L, D)."""

    def parts(self) -> tuple[str, ...]:
        """The parts of the U-Net that are given it: down, mid, up."""
        return PARTS

    def attach(self, unet: nn.Module) -> None:
        """Puts its hooks on a U-Net."""
        self._hooks.append(unet.register_forward_pre_hook(self._begin, with_kwargs=True))
        self._hooks.append(unet.register_forward_hook(self._end, always_call=True))
        for block in blocks(unet, self.parts()):
            self._hooks.append(block.register_forward_pre_hook(self._give, with_kwargs=True))

    def detach(self) -> None:
        """Takes its hooks off again."""
        while self._hooks:
            self._hooks.pop().remove()

    def _begin(self, unet: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self.on:
            return
        x = args[0] if args else kwargs["sample"]
        t = args[1] if len(args) > 1 else kwargs["timestep"]
        first = next(self.parameters())
        if first.device != x.device:  # a pipeline was moved
            self.to(x.device)
        times = torch.as_tensor(t, device=x.device).reshape(-1).expand(len(x))
        self._call = self.enter(len(x), times, kwargs.get("added_cond_kwargs") or {})

    def _end(self, *_: Any) -> None:
        self._call = None

    def _give(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._call is None:
            return None
        return args, {**kwargs, "encoder_hidden_states": self.condition(kwargs["encoder_hidden_states"], self._call)}


def blocks(unet: nn.Module, parts: tuple[str, ...] = PARTS) -> list[nn.Module]:
    """The blocks of a U-Net that attend to the text, in the parts asked for."""
    found = {"down": list(unet.down_blocks), "mid": [unet.mid_block], "up": list(unet.up_blocks)}  # type: ignore[arg-type]
    return [block for part in parts for block in found[part] if getattr(block, "has_cross_attention", False)]


class SoftTokens(Extra):
    """Learned text tokens after the text's first one, in chosen parts of a U-Net (SoftREPA).

    Args:
        count: tokens; width: of a text embedding (D).
        where: the parts that see them.
        times: rows of a table (times, D) that is added to all tokens, by t * times // span; 0 for none.
        span: training timesteps of the schedule.
        first: (D,) value of every token at the start; None draws N(0, 0.02).
    """

    kind = "soft-tokens"

    def __init__(
        self,
        count: int,
        width: int,
        where: tuple[str, ...] | list[str] = ("down",),
        times: int = 0,
        span: int = 1000,
        first: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.where, self.times, self.span = tuple(where), times, span
        start = torch.randn(count, width) * 0.02 if first is None else first.detach().float().expand(count, -1).clone()
        self.tokens = nn.Parameter(start)
        self.offsets = nn.Parameter(torch.randn(times, width) * 0.02) if times else None

    def settings(self) -> dict[str, Any]:
        """Plain data."""
        count, width = self.tokens.shape
        return {"count": count, "width": width, "where": list(self.where), "times": self.times, "span": self.span}

    def parts(self) -> tuple[str, ...]:
        """The chosen ones."""
        return self.where

    def enter(self, rows: int, t: Tensor, added: Mapping[str, Tensor]) -> Tensor:
        """The tokens (rows, count, D)."""
        tokens = self.tokens.expand(rows, -1, -1)
        if self.offsets is None:
            return tokens
        place = (t.long() * self.times // self.span).clamp(0, self.times - 1)
        return tokens + self.offsets[place][:, None]

    def condition(self, text: Tensor, call: Tensor) -> Tensor:
        """Text (B, L + count, D)."""
        return torch.cat([text[:, :1], call.to(text.dtype), text[:, 1:]], 1)


# ---- files ----------------------------------------------------------------------------------------------------------


def kinds() -> dict[str, type[Extra]]:
    """Every kind by its name in files."""
    from .guidance import GuidanceAdapters
    from .users import UserAttention

    return {each.kind: each for each in (SoftTokens, UserAttention, GuidanceAdapters)}


def save_extra(extra: Extra, folder: Path, dtype: torch.dtype | None = None) -> Path:
    """Writes ``extra.safetensors`` into ``folder``; its header says what it is. The file appears at once or not at all.

    ``dtype``: of the stored tensors, default fp32 as they are trained."""
    state = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in extra.state_dict().items()}
    file, partial = folder / NAME, folder / f".{NAME}.partial"
    header = json.dumps({"kind": extra.kind, "settings": extra.settings()})
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, partial, {HEADER: header})  # one entry: several come in any order, and equal parts are equal files
    os.replace(partial, file)
    return file


def extra_header(file: Path) -> dict[str, Any] | None:
    """Kind and settings of the parts in a safetensors file; None where it holds something else, such as a LoRA.

    Raises UserError when the file is damaged."""
    try:
        with safe_open(file, framework="pt") as opened:
            text = (opened.metadata() or {}).get(HEADER)
        return None if text is None else dict(json.loads(text))
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise UserError(f"weights file '{file}' is damaged ({' '.join(str(error).split())}); restore it") from error


def find_extra(path: str | Path) -> Path | None:
    """The file of such parts: a file, a folder of one, or a run's folder (its ``model/``); None where there is none."""
    place = Path(path).expanduser()
    for file in (place, place / NAME, place / "model" / NAME):
        if file.is_file() and file.suffix == ".safetensors" and extra_header(file) is not None:
            return file
    return None


def load_extra(file: Path, unet: nn.Module | None = None) -> Extra:
    """The parts in a file that `save_extra` wrote, on the CPU in their stored format.

    Raises UserError when the file is damaged, holds something else, or was made for another U-Net."""
    header = extra_header(file)
    known = kinds()
    if header is None or header.get("kind") not in known:
        raise UserError(
            f"'{file}' holds no soft tokens, user attention or guidance adapters; give the file of a run's model/"
        )
    try:
        extra = known[header["kind"]](**header["settings"])
        with safe_open(file, framework="pt") as opened:
            state = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a dict
        extra.load_state_dict(state, assign=True)
    except (TypeError, KeyError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"'{file}' cannot be read: {reason}; restore it, or export the run again") from error
    if unet is not None:
        _check_fits(extra, unet, file)
    return extra.requires_grad_(False).eval()


def _check_fits(extra: Extra, unet: nn.Module, file: Path) -> None:
    from .guidance import GuidanceAdapters, widths_of
    from .users import UserAttention, cross_attentions

    text = {"text": int(unet.config.cross_attention_dim)}  # type: ignore[union-attr, arg-type]
    if isinstance(extra, SoftTokens):
        mine, its = {"text": extra.tokens.shape[1]}, text
    elif isinstance(extra, GuidanceAdapters):
        mine, its = {**extra.widths, "text": extra.text}, widths_of(unet) | text
    else:
        assert isinstance(extra, UserAttention)
        mine, its = extra.widths, {name: attention.inner_dim for name, attention in cross_attentions(unet).items()}
    if mine != its:
        name = next(key for key in (*its, *mine) if mine.get(key) != its.get(key))
        raise UserError(
            f"'{file}' is for another network: {name} is {mine.get(name)} wide there and {its.get(name)} here"
        )
