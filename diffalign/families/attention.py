"""The attention kernel of a U-Net, set through diffusers' attention processors; and its compilation."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..errors import UserError


class FlashProcessor(AttnProcessor2_0):
    """diffusers' SDPA processor held to torch's flash kernel (fp16 or bf16 on CUDA)."""

    def __call__(self, attn: Attention, hidden_states: Tensor, *args: object, **kwargs: object) -> Tensor:
        half = hidden_states.dtype in (torch.float16, torch.bfloat16)
        if not half and not torch.is_autocast_enabled("cuda"):
            raise UserError("model.attention=flash computes in fp16 or bf16 only; set train.precision=bf16")
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return super().__call__(attn, hidden_states, *args, **kwargs)


def set_attention(unet: UNet2DConditionModel, name: str, device: torch.device) -> None:
    """``auto`` and ``sdpa``: torch's own choice of kernel; ``xformers``; ``flash``: torch's flash kernel only.

    diffusers' `set_attention_backend` does not reach the processors of this U-Net, so processors are set.

    Raises UserError when the package or the GPU is missing."""
    if name in {"auto", "sdpa"}:
        unet.set_attn_processor(AttnProcessor2_0())
        return
    if name not in {"xformers", "flash"}:
        raise UserError(f"unknown model.attention '{name}'; known: auto, sdpa, xformers, flash")
    if device.type != "cuda":
        raise UserError(
            f"model.attention={name} needs a CUDA GPU, and the device is '{device}'; set model.attention=auto"
        )
    if name == "flash":
        unet.set_attn_processor(FlashProcessor())
        return
    if importlib.util.find_spec("xformers") is None:
        raise UserError(
            "model.attention=xformers needs the package: pip install 'diffalign[xformers]', or set it to auto"
        )
    try:
        unet.enable_xformers_memory_efficient_attention()
    except (ImportError, ValueError, RuntimeError, NotImplementedError) as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"model.attention=xformers does not work here: {reason}; set model.attention=auto") from error


@contextmanager
def math_attention(unet: nn.Module) -> Iterator[list[str]]:
    """Torch's attention in its plain form for a while, whatever kernel was set: the one that has a forward-mode
    derivative, and computes in every precision. Gives the names of the processors that make way, if any."""
    held = {
        module: module.processor
        for module in unet.modules()
        if isinstance(module, Attention) and type(module.processor) is not AttnProcessor2_0
    }
    for module in held:
        module.set_processor(AttnProcessor2_0())
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield sorted({type(processor).__name__ for processor in held.values()})
    finally:
        for module, processor in held.items():
            module.set_processor(processor)


def compile_unet(unet: UNet2DConditionModel) -> None:
    """torch.compile in place: class, parameter names and hooks of the U-Net stay. Compiles at the first call."""
    unet.compile()
