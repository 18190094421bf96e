"""The step-aware preference model of SPO (Liang et al. 2024, arXiv 2406.04314): a CLIP whose images have a time.

Every block of the image tower is modulated by the time (adaLN, as in DiT, arXiv 2212.09748). It starts as the very CLIP
that it is made from, at every time: all shifts and scales are 0 and all gates 1.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from ..errors import UserError
from .preprocess import P1
from .scorers._clip import STEP_AWARE as FILE
from .scorers._clip import load_towers

if TYPE_CHECKING:
    from .scorers._clip import Towers

FREQUENCIES, PERIOD = 256, 10_000
# PickScore v1 is a CLIP ViT-H/14: what a plan counts where its weights are not (as its config.json has it, from memory)
H14: dict[str, Any] = {
    "projection_dim": 1024,
    "text_config": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "hidden_act": "gelu",
    },
    "vision_config": {
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
        "patch_size": 14,
        "hidden_act": "gelu",
    },
}


def time_embedding(t: Tensor, width: int = FREQUENCIES) -> Tensor:
    """Sinusoids (B, width) of times (B,), fp32: cosines, then sines, of frequencies that fall from 1 to 1 / 10,000."""
    half = width // 2
    rates = torch.exp(-math.log(PERIOD) / half * torch.arange(half, device=t.device, dtype=torch.float32))
    angles = t.float()[:, None] * rates
    return torch.cat([angles.cos(), angles.sin()], 1)


class StepAware(nn.Module):
    """A CLIP (N, 3, S, S) x times (N,) -> image embeddings, with the text tower and scale as they are.

    The time enters by hooks on the image tower's norms, attentions and MLPs, so that CLIP's forward and its names stay
    the library's own.

    Args:
        clip: the model it starts as; trained in place.
        tokenizer, pixels: how prompts and pictures become its inputs; kept for saving.
    """

    def __init__(self, clip: CLIPModel, tokenizer: CLIPTokenizer, pixels: P1) -> None:
        super().__init__()
        self.clip, self.tokenizer, self.pixels = clip, tokenizer, pixels
        vision = clip.config.vision_config
        width, depth = int(vision.hidden_size), int(vision.num_hidden_layers)
        ends = nn.Linear(FREQUENCIES, width), nn.Linear(width, width)
        blocks = [nn.Linear(width, 6 * width) for _ in range(depth)]
        self.time = nn.Sequential(ends[0], nn.SiLU(), ends[1])
        self.blocks = nn.ModuleList(blocks)
        self.final = nn.Linear(width, 2 * width)
        start_as_clip(ends, blocks, self.final)
        self._parts: list[tuple[Tensor, ...]] | None = None  # of the call that is under way
        for number, layer in enumerate(clip.vision_model.encoder.layers):
            layer.layer_norm1.register_forward_hook(partial(self._modulate, number, 0))
            layer.self_attn.register_forward_hook(partial(self._gate, number, 2))
            layer.layer_norm2.register_forward_hook(partial(self._modulate, number, 3))
            layer.mlp.register_forward_hook(partial(self._gate, number, 5))
        clip.vision_model.post_layernorm.register_forward_hook(partial(self._modulate, depth, 0))

    def _modulate(self, number: int, place: int, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        """(1 + scale) x + shift."""
        if self._parts is None:
            return None
        shift, scale = (_beside(part, output) for part in self._parts[number][place : place + 2])
        return output * (1 + scale) + shift

    def _gate(self, number: int, place: int, module: nn.Module, args: Any, output: Any) -> Any:
        if self._parts is None:
            return None
        if isinstance(output, tuple):  # attention gives its weights too
            return (output[0] * _beside(self._parts[number][place], output[0]), *output[1:])
        return output * _beside(self._parts[number][place], output)

    @property
    def config(self) -> CLIPConfig:
        """CLIP's own."""
        return self.clip.config

    @property
    def logit_scale(self) -> Tensor:
        """log of what the cosine is multiplied with."""
        return self.clip.logit_scale

    def get_image_features(self, pixel_values: Tensor, t: Tensor | None = None) -> Tensor:
        """Image embeddings (N, D) of normalised pixels (N, 3, S, S) at times (N,); None: at time 0."""
        times = torch.zeros(len(pixel_values), device=pixel_values.device) if t is None else t
        told = nn.functional.silu(self.time(time_embedding(times).to(self.final.weight.dtype)))
        parts = [block(told).chunk(6, 1) for block in self.blocks]
        self._parts = [*parts, self.final(told).chunk(2, 1)]
        try:
            out = self.clip.get_image_features(pixel_values=pixel_values)
        finally:
            self._parts = None
        return out if isinstance(out, Tensor) else out.pooler_output

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Text embeddings (N, D). Without a mask too, as the tower is causal and pooled at the first end token."""
        out = self.clip.get_text_features(input_ids=input_ids, attention_mask=attention_mask)
        return out if isinstance(out, Tensor) else out.pooler_output

    def tokens(self, prompts: list[str]) -> Tensor:
        """Token ids (N, L) on the CPU, padded to the longest prompt and cut at the tower's own length."""
        limit = int(self.config.text_config.max_position_embeddings)
        found: Tensor = self.tokenizer(
            prompts, padding=True, truncation=True, max_length=limit, return_tensors="pt"
        ).input_ids
        return found

    def scores(self, images: Tensor, prompts: list[str], t: Tensor) -> Tensor:
        """exp(logit scale) x cosine, fp32 (N,), of pictures (N, 3, H, W) in [0, 1] for prompts (N) at times (N,).

        Differentiable by everything; equal prompts are encoded once."""
        distinct = list(dict.fromkeys(prompts))
        ids = self.tokens(distinct).to(images.device, non_blocking=True)
        places = torch.tensor([distinct.index(prompt) for prompt in prompts], device="cpu")
        text = nn.functional.normalize(self.get_text_features(ids).float(), dim=-1)
        image = nn.functional.normalize(self.get_image_features(self.pixels.tensor(images), t).float(), dim=-1)
        cosine = (image * text[places.to(images.device, non_blocking=True)]).sum(1)
        return self.logit_scale.float().exp() * cosine

    def save(self, folder: Path) -> None:
        """A CLIP's folder with ``step_aware.safetensors`` beside its weights: what ``spm=FOLDER`` takes."""
        folder.mkdir(parents=True, exist_ok=True)
        named = {name: tensor.detach().to("cpu").contiguous() for name, tensor in self.state_dict().items()}
        own = {name.removeprefix("clip."): tensor for name, tensor in named.items() if name.startswith("clip.")}
        time = {name: tensor for name, tensor in named.items() if not name.startswith("clip.")}
        self.config.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        stated = {"image_mean": list(self.pixels.mean), "image_std": list(self.pixels.std)}
        (folder / "preprocessor_config.json").write_text(json.dumps(stated, indent=1) + "\n")
        for tensors, file in ((time, FILE), (own, "model.safetensors")):
            save_file(tensors, folder / f".{file}.partial", {"format": "pt"})
            os.replace(folder / f".{file}.partial", folder / file)


@torch.no_grad()
def start_as_clip(time: Sequence[nn.Linear], blocks: Sequence[nn.Linear], final: nn.Linear) -> None:
    """Makes what the time adds do nothing: all shifts and scales 0, all gates 1."""
    for layer in time:
        nn.init.normal_(layer.weight, std=0.02)
        nn.init.zeros_(layer.bias)
    for layer in (*blocks, final):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    for block in blocks:
        for gate in (2, 5):
            block.bias.unflatten(0, (6, -1))[gate] = 1


def _beside(part: Tensor, x: Tensor) -> Tensor:
    """(N, d) beside x (N, d) or (N, tokens, d), in its number format."""
    return (part if x.ndim == 2 else part[:, None]).to(x.dtype)


def scorer_folder(source: str | Path) -> str | Path:
    """The folder of weights behind a run's folder; anything else as it is."""
    inner = Path(str(source)).expanduser() / "model"
    return inner if (inner / FILE).is_file() else source


def load_step_aware(source: str | Path, name: str = "spm") -> tuple[StepAware, Towers]:
    """A step-aware model in fp32 on the CPU, and the files that it came from.

    Args:
        source: the folder that `StepAware.save` wrote, a run's folder of one, or a CLIP (``asset:NAME``, folder, hub
            id): then it starts as that CLIP at every time.

    Raises UserError when it is missing, is no CLIP, or its parts do not fit one another."""
    from .scorers._base import read_state, resolve_weights

    source = scorer_folder(source)
    if Path(str(source)).parts[:1] == ("runs",) and not Path(str(source)).exists():
        raise UserError(
            f"there is no preference model at '{source}' yet: train one (`diffalign train spm/sd15` leaves "
            f"runs/spm-sd15), or say {name}=FOLDER"
        )
    towers = load_towers(source, name)
    if towers.openclip:
        raise UserError(f"'{source}' for scorer '{name}' is in OpenCLIP's layout; give a transformers folder of a CLIP")
    model = StepAware(towers.model, towers.tokenizer, towers.pixels())
    file = resolve_weights(source, name) / FILE
    if file.is_file():
        try:
            own = {key: value for key, value in model.state_dict().items() if key.startswith("clip.")}
            model.load_state_dict({**own, **read_state(file, name)})
        except RuntimeError as error:
            raise UserError(f"'{file}' for scorer '{name}' does not fit the CLIP beside it; restore the folder") from (
                error
            )
    return model, towers


def shape_of(source: str | Path, name: str = "spm") -> StepAware:
    """A step-aware model without weights, for plans; PickScore's shape where ``source`` is not on this machine."""
    from .scorers._base import resolve_weights
    from .scorers._text import load_tokenizer

    folder = None
    try:
        folder = resolve_weights(scorer_folder(source), name)
        config = CLIPConfig.from_pretrained(folder)
    except UserError:
        config = CLIPConfig(**H14)
    size = int(config.vision_config.image_size)
    tokenizer = load_tokenizer(folder, int(config.text_config.max_position_embeddings))
    with torch.device("meta"):
        return StepAware(CLIPModel(config), tokenizer, P1(size))
