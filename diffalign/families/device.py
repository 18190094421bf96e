"""Where and in which number format a model runs."""

from __future__ import annotations

import torch

from ..errors import UserError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def pick_device(name: str = "auto") -> torch.device:
    """``auto`` takes CUDA, then MPS, then the CPU. UserError when a device is asked for that is not there."""
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    kind, _, number = name.partition(":")
    if kind == "auto":
        return torch.device("cuda" if cuda else "mps" if mps else "cpu")
    if kind == "cuda":
        if not cuda:
            reason = "torch finds no GPU" if torch.backends.cuda.is_built() else "this torch is a CPU build"
            raise UserError(f"device 'cuda' was asked for but {reason}; set train.device=cpu or install a CUDA torch")
        if number and (not number.isdigit() or int(number) >= torch.cuda.device_count()):
            raise UserError(f"device '{name}' does not exist; there are {torch.cuda.device_count()} CUDA devices")
        return torch.device(name)
    if kind == "mps" and not mps:
        raise UserError("device 'mps' was asked for but this is no Apple GPU; set train.device=cpu or auto")
    if kind not in {"cpu", "mps"}:
        raise UserError(f"unknown device '{name}'; known: auto, cpu, cuda, mps")
    return torch.device(kind)


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """``auto`` is fp32 on CPU and MPS; on CUDA bf16 where the card computes in it, else fp16."""
    if name in DTYPES:
        return DTYPES[name]
    if name != "auto":
        raise UserError(f"unknown dtype '{name}'; known: auto, {', '.join(DTYPES)}")
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
