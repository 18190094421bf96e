"""A frozen U-Net in 8 or 4 bits, with adapters in fp32 on top (QLoRA, arXiv 2305.14314), by bitsandbytes.

Linear layers of the blocks are quantised, as they are nearly all of an SDXL U-Net; convolutions, norms and the layers
of the time and size embeddings, through which every sample's t passes, keep the base's number format.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Literal

import torch
from torch import nn

from ..errors import UserError

Mode = Literal["8bit", "4bit"]
BLOCK = 64  # weights that share a scale in 4 bits
# bytes of one weight: int8; nf4 with a scale of 8 bits for each block and an fp32 scale for each 256 of those
BYTES = {"8bit": 1.0, "4bit": 0.5 + 1 / BLOCK + 4 / (BLOCK * 256)}
PLAIN = ("time_embedding", "add_embedding", "class_embedding")


def quantisable(unet: nn.Module) -> list[str]:
    """Names of the linear layers that are quantised."""
    return [
        name
        for name, module in unet.named_modules()
        if isinstance(module, nn.Linear) and ".lora_" not in name and name.partition(".")[0] not in PLAIN
    ]


def weight_bytes(unet: nn.Module, dtype: torch.dtype, mode: str = "none") -> int:
    """Bytes of a U-Net's own weights in ``dtype``, adapters left out."""
    total = sum(p.numel() for name, p in unet.named_parameters() if ".lora_" not in name)
    if mode == "none":
        return total * dtype.itemsize
    shapes = [unet.get_parameter(f"{name}.weight").shape for name in quantisable(unet)]
    few = sum(shape.numel() for shape in shapes)
    scales = sum(4 * shape[0] for shape in shapes) if mode == "8bit" else 0
    return int((total - few) * dtype.itemsize + few * BYTES[mode] + scales)


def check_quantize(mode: str, storage: str) -> None:
    """Raises UserError where a quantised base cannot work: full copies are trained, or the package is missing."""
    if mode == "none":
        return
    if storage == "copies":
        raise UserError(
            f"model.quantize={mode} is for adapters: with model.storage=copies the U-Net itself is trained, in fp32; "
            "set model.storage=adapters or model.quantize=none"
        )
    if find_spec("bitsandbytes") is None:
        raise UserError(
            f"model.quantize={mode} needs bitsandbytes; pip install 'diffalign[8bit]' or set model.quantize=none"
        )


def quantise_unet(unet: nn.Module, mode: Mode, dtype: torch.dtype) -> None:
    """Replace the linear layers in place; they are quantised when the U-Net is moved to its device.

    Args:
        dtype: what the layers compute in; the rest of the U-Net stays as it is.

    Raises UserError on a device that bitsandbytes has no kernels for."""
    import bitsandbytes as bnb

    for name in quantisable(unet):
        old = unet.get_submodule(name)
        assert isinstance(old, nn.Linear)
        shape = (old.in_features, old.out_features, old.bias is not None)
        weight = old.weight.detach().contiguous()
        new: nn.Linear
        if mode == "4bit":
            new = bnb.nn.Linear4bit(*shape, compute_dtype=dtype, quant_type="nf4", device="meta")
            new.weight = bnb.nn.Params4bit(
                weight, requires_grad=False, compress_statistics=True, blocksize=BLOCK, quant_type="nf4", module=new
            )
        else:
            new = bnb.nn.Linear8bitLt(*shape, has_fp16_weights=False, threshold=6.0, device="meta")
            new.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
        new.bias = old.bias
        parent, _, leaf = name.rpartition(".")
        setattr(unet.get_submodule(parent), leaf, new.train(old.training))
    unet.is_quantized = True  # type: ignore[assignment]
    setattr(unet, f"is_loaded_in_{mode}", True)  # peft picks its adapter layers by this
