"""Existing LoRA files: found, checked against the network, read, fused into a pipeline."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..errors import UserError
from ..recipe import LoraFile
from .extras import extra_header
from .folder import HUB_ID, check_safetensors, hash_file
from .guidance import PROJECTION, add_embedding, embedding_width
from .targets import adaptable

NAME = "pytorch_lora_weights.safetensors"


def find_lora(path: str, weight_name: str | None = None) -> Path:
    """The safetensors file of a LoRA: a file, a folder of one, a run's folder (its ``model/``), or a hub id.

    Raises UserError when there is none, when a folder holds several, or when the file is pickled or damaged."""
    place = Path(path).expanduser()
    if place.is_dir():
        file = _in_folder(place, path, weight_name)
    elif place.is_file():
        file = place
    elif HUB_ID.match(path) and not place.parent.is_dir():
        file = _from_hub(path, weight_name or NAME)
    else:
        raise UserError(f"LoRA '{path}' does not exist; give its .safetensors file, its folder or a run's folder")
    if file.suffix != ".safetensors":
        raise UserError(
            f"LoRA '{path}' is a {file.suffix or 'nameless'} file; only .safetensors is read, convert it first"
        )
    check_safetensors(file)
    if extra_header(file) is not None:
        raise UserError(
            f"'{path}' holds parts beside the U-Net (soft tokens or user attention), which are no LoRA and cannot be "
            "fused, merged or converted; sample with it by --lora, or see pipelines.extras.apply_extra"
        )
    return file


def _in_folder(folder: Path, path: str, weight_name: str | None) -> Path:
    for place in (folder, folder / "model"):
        if (place / "step_aware.safetensors").is_file():
            raise UserError(f"'{path}' is a preference model, no LoRA; score with it: --scorers spm={path}")
        if weight_name:
            if (place / weight_name).is_file():
                return place / weight_name
            continue
        if (place / NAME).is_file():
            return place / NAME
        files = sorted(place.glob("*.safetensors"))
        if len(files) == 1:
            return files[0]
        if files:
            raise UserError(
                f"LoRA folder '{path}' holds {len(files)} files; set weight_name to one, such as {files[0].name}"
            )
    what = f"no {weight_name}" if weight_name else "no .safetensors file"
    raise UserError(f"LoRA folder '{path}' holds {what}, nor does a model/ in it")


def _from_hub(path: str, name: str) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(path, name))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"LoRA '{path}' is no folder here and {name} cannot be had from the hub: {reason}") from error


def load_lora(pipeline: DiffusionPipeline, file: Path, adapter: str) -> list[str]:
    """Loads a LoRA as ``adapter`` and returns the components it reached (unet, text_encoder). A U-Net gets a guidance
    embedding for a LoRA that changes it, and is told its guidance from then on.

    Raises UserError when it was made for another network."""
    try:
        state, *_ = pipeline.lora_state_dict(str(file), unet_config=pipeline.unet.config, use_safetensors=True)
        mine = convert_unet_state_dict_to_peft(_of_unet(state))
        width = told_width(mine)
        layers = {*adaptable(pipeline.unet), *([PROJECTION] if width else [])}
        for key in mine:  # one layout has several names for a layer
            layer = key.split(".lora")[0]
            if layer not in layers:
                raise UserError(f"LoRA '{file}' is for another network: it has a layer {layer} that the U-Net lacks")
        if width and not embedding_width(pipeline.unet):
            add_embedding(pipeline.unet, width)
        pipeline.load_lora_weights(str(file), adapter_name=adapter, use_safetensors=True)
    except (ValueError, RuntimeError, KeyError, TypeError, IndexError) as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"LoRA '{file}' does not fit this model: {reason}") from error
    reached = [
        name
        for name in ("unet", "text_encoder", "text_encoder_2")
        if adapter in getattr(getattr(pipeline, name, None), "peft_config", {})
    ]
    if not reached:
        raise UserError(f"LoRA '{file}' has no layer for this model; it may be made for another family")
    return reached


def told_width(state: Mapping[str, Tensor]) -> int:
    """Width of the guidance embedding that a LoRA's state (peft's names) changes; 0 where it changes none."""
    down = state.get(f"{PROJECTION}.lora_A.weight")
    return 0 if down is None else down.shape[1]


def fuse_loras(pipeline: DiffusionPipeline, files: Sequence[LoraFile]) -> list[str]:
    """Adds LoRAs to the weights of a pipeline's networks, in order; returns ``sha256*scale`` of each."""
    fused = []
    for number, lora in enumerate(files):
        file = find_lora(lora.path, lora.weight_name)
        adapter = f"fuse{number}"
        reached = load_lora(pipeline, file, adapter)
        pipeline.fuse_lora(components=reached, lora_scale=lora.scale, adapter_names=[adapter])
        pipeline.unload_lora_weights()
        fused.append(f"{hash_file(file)}*{lora.scale:g}")
    return fused


@dataclass(frozen=True)
class LoraWeights:
    """A U-Net's LoRA: ``state`` under peft's names (``<layer>.lora_A.weight``), ``config`` its rank, alpha and layers.

    ``others``: networks beside the U-Net that the file changes too; ``header``: the file's own text entries."""

    state: dict[str, Tensor]
    config: LoraConfig
    others: tuple[str, ...] = ()
    header: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def layers(self) -> list[str]:
        """Names of the layers, in the order of the file."""
        return [name.removesuffix(".lora_A.weight") for name in self.state if name.endswith(".lora_A.weight")]

    def down(self, layer: str) -> Tensor:
        """A: (rank, in), or (rank, in, k, k) of a convolution."""
        return self.state[f"{layer}.lora_A.weight"]

    def up(self, layer: str) -> Tensor:
        """B: (out, rank), or (out, rank, 1, 1)."""
        return self.state[f"{layer}.lora_B.weight"]

    @property
    def dora(self) -> bool:
        """Whether it rescales the weights' norms too."""
        return self.config.use_dora

    @cached_property
    def ranks(self) -> dict[str, int]:
        """Rank of each layer."""
        return {layer: self.down(layer).shape[0] for layer in self.layers}

    @cached_property
    def alphas(self) -> dict[str, float]:
        """Alpha of each layer, such that W' = W + alpha / rank * B A; the square root of rsLoRA is folded in."""
        pattern = self.config.alpha_pattern or {}
        found = {}
        for layer in self.layers:
            alpha = float(pattern.get(get_pattern_key(list(pattern), layer), self.config.lora_alpha))
            found[layer] = alpha * (self.ranks[layer] ** 0.5 if self.config.use_rslora else 1.0)
        return found


def read_lora(file: Path, unet: nn.Module) -> LoraWeights:
    """A LoRA file in any layout that diffusers reads (its own, peft's, kohya's).

    Args:
        unet: the network it is for; on the meta device it is enough.

    Raises UserError when the file is damaged, holds no LoRA of a U-Net, or was made for another network."""
    try:
        with safe_open(file, framework="pt") as opened:
            header = opened.metadata() or {}
            names = list(opened.keys())
        state, alphas, metadata = StableDiffusionLoraLoaderMixin.lora_state_dict(
            str(file), unet_config=unet.config, use_safetensors=True, return_lora_metadata=True
        )
        mine = convert_unet_state_dict_to_peft(_of_unet(state))
        alphas = convert_unet_state_dict_to_peft(_of_unet(alphas or {}))
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"LoRA '{file}' cannot be read: {reason}") from error
    if any("dora_scale" in name for name in names):
        raise UserError(f"LoRA '{file}' is a DoRA in kohya's layout, which diffusers cannot read; give another")
    shapes = {name.replace(".base_layer", ""): tensor.shape for name, tensor in unet.state_dict().items()}
    if (width := told_width(mine)) and not embedding_width(unet):  # it can be added
        shapes[f"{PROJECTION}.weight"] = torch.Size((shapes["time_embedding.linear_1.weight"][1], width))
    for name, tensor in mine.items():
        layer, _, part = name.partition(".lora_")
        weight = shapes.get(f"{layer}.weight")
        axis = {"A.weight": 1, "B.weight": 0}.get(part)
        if weight is None or (axis is not None and tensor.shape[axis] != weight[axis]):
            raise UserError(f"LoRA '{file}' is for another network: its layer {layer} does not fit this U-Net")
        if axis is None and part != "magnitude_vector.weight" and part != "magnitude_vector":
            raise UserError(f"LoRA '{file}' has a part that is not read: {name}")
    if not mine:
        raise UserError(f"'{file}' holds no LoRA of a U-Net; give the file that a run wrote into its model/")
    others = tuple(sorted({name.partition(".")[0] for name in state if not name.startswith("unet.")}))
    settings = {key.removeprefix("unet."): value for key, value in (metadata or {}).items() if key.startswith("unet.")}
    try:
        config = LoraConfig(**settings) if settings else _config(mine, alphas)
    except TypeError as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"LoRA '{file}' says of itself what this peft does not know: {reason}") from error
    return LoraWeights(mine, config, others, header)


def _of_unet(state: Mapping[str, Any]) -> dict[str, Any]:
    return {name.removeprefix("unet."): value for name, value in state.items() if name.startswith("unet.")}


def _config(state: Mapping[str, Tensor], alphas: Mapping[str, float]) -> LoraConfig:
    """Rank and alpha from a file without a header: alpha is the rank where none is given."""
    ranks = {n.partition(".lora_")[0]: t.shape[0] for n, t in state.items() if n.endswith(".lora_A.weight")}
    given = {name.removesuffix(".alpha").partition(".lora_")[0]: float(value) for name, value in alphas.items()}
    scales = {layer: given.get(layer, float(rank)) for layer, rank in ranks.items()}
    rank, alpha = (Counter(values).most_common(1)[0][0] for values in (ranks.values(), scales.values()))
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=list(ranks),
        rank_pattern={f"^{layer}": r for layer, r in ranks.items() if r != rank},
        alpha_pattern={f"^{layer}": a for layer, a in scales.items() if a != alpha},
        use_dora=any("lora_magnitude_vector" in name for name in state),
    )
