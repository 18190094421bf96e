"""ImageReward v1.0: Xu et al. 2023 (arXiv 2304.05977). BLIP: a ViT-L/16 whose 197 tokens a BERT-base reads by cross
attention; a stack of linear layers on the first text token; (x - mean) / std of the authors' data.

The layers are transformers' BLIP; the published checkpoint comes in by the key map below. Unlike BLIP's own matching
head the text starts with [CLS], not [ENC]. Texts end after 35 tokens."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from PIL import Image
from transformers import BertTokenizer, BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

from ...errors import UserError
from ..preprocess import P1
from . import list_scorers
from ._base import (
    CODE_VERSION,
    Scored,
    Scorer,
    check_known,
    from_hub,
    read_state,
    resolve_device,
    resolve_dtype,
    resolve_weights,
    texts_for,
    weights_sha256,
)
from ._load import collapse, load_model

SCORERS: dict[str, dict[str, object]] = {
    "imagereward": {
        "about": "ImageReward v1.0: BLIP with a reward head, standardised",
        "weights": "THUDM/ImageReward:ImageReward.pt",
        "band": (-2.1, 2.2),
    },
}
MEAN, STD = 0.16717362830052426, 1.0333394966054072
MAX_TOKENS = 35
TOKENIZER = "google-bert/bert-base-uncased"
TOKENIZER_FILES = ("tokenizer.json", "vocab.txt")
HEAD = [f"mlp.layers.{n}" for n in (0, 2, 4, 6, 7)]
UNUSED = re.compile(r"blip\.(vision_proj|text_proj)\.|.*position_ids$")
VISION = {  # after "blip.visual_encoder." -> BlipVisionModel
    r"cls_token": "embeddings.class_embedding",
    r"pos_embed": "embeddings.position_embedding",
    r"patch_embed\.proj\.(weight|bias)": r"embeddings.patch_embedding.\1",
    r"norm\.(weight|bias)": r"post_layernorm.\1",
    r"blocks\.(\d+)\.norm([12])\.(weight|bias)": r"encoder.layers.\1.layer_norm\2.\3",
    r"blocks\.(\d+)\.attn\.qkv\.(weight|bias)": r"encoder.layers.\1.self_attn.qkv.\2",
    r"blocks\.(\d+)\.attn\.proj\.(weight|bias)": r"encoder.layers.\1.self_attn.projection.\2",
    r"blocks\.(\d+)\.mlp\.fc([12])\.(weight|bias)": r"encoder.layers.\1.mlp.fc\2.\3",
}
State = dict[str, torch.Tensor]


class ImageReward(Scorer):
    """``ImageReward.from_pretrained("ImageReward.pt")(images, prompts)``: about -2 to 2, fp32 (N,)."""

    def __init__(self, state: State, config: dict[str, Any], tokenizer: BertTokenizer, source: str, name: str) -> None:
        vision, text = split_state(state, source, name)
        try:
            eyes, reader = _configs(vision, text, config)
            weight, bias = collapse(state, HEAD)
        except (KeyError, RuntimeError, ValueError) as error:
            raise UserError(
                f"'{source}' for scorer '{name}' is not laid out as ImageReward.pt ({error.args[0]}); give that file"
            ) from error
        self.vision = load_model(BlipVisionModel, None, source, name, config=eyes, state_dict=vision)
        self.text = load_model(
            BlipTextModel, None, source, name, config=reader, state_dict=text, add_pooling_layer=False
        )
        if len(tokenizer) > reader.vocab_size:
            raise UserError(
                f"the tokenizer of scorer '{name}' has {len(tokenizer)} tokens, '{source}' {reader.vocab_size}; "
                f"put the vocab.txt of {TOKENIZER} beside it"
            )
        self.name, self.tokenizer, self.max_tokens = name, tokenizer, min(MAX_TOKENS, reader.max_position_embeddings)
        self.weight, self.bias = weight.float(), float(bias)
        # torchvision's rounding: the authors crop with its transforms
        self.pixels = P1(size=int(eyes.image_size), rounding="torchvision")
        self.preprocess_id = self.pixels.id
        self.to("cpu", torch.float32)

    def to(self, device: str | torch.device, dtype: torch.dtype) -> Self:
        """Towers to a device and type; the head stays fp32."""
        self.device, self.dtype = torch.device(device), dtype
        for tower in (self.vision, self.text):
            tower.eval().requires_grad_(False).to(device=device, dtype=dtype)
        self.weight = self.weight.to(device)
        return self

    @classmethod
    def from_pretrained(
        cls, path: str | Path | None = None, device: str = "auto", dtype: str = "auto", name: str | None = None
    ) -> Self:
        """``path``: ImageReward.pt, or a folder that holds it; ``med_config.json`` and the tokenizer's ``vocab.txt``
        are read beside it, the latter otherwise from the hub.

        Raises UserError when they are missing or of another layout."""
        name = name or "imagereward"
        source = str(path or list_scorers()[name].weights)
        file = resolve_weights(source, name, ("*.pt", "*.safetensors"))
        if file.is_dir():
            file = min(f for f in file.iterdir() if f.suffix in (".pt", ".safetensors"))
        where = resolve_device(device)
        dtype_name, torch_dtype = resolve_dtype(dtype, where)
        beside = file.parent
        config = beside / "med_config.json"
        words = next((beside for n in TOKENIZER_FILES if (beside / n).is_file()), None) or _hub_words(name, file)
        scorer = cls(
            read_state(file, name),
            json.loads(config.read_text()) if config.is_file() else {},
            BertTokenizer.from_pretrained(words),
            source,
            name,
        ).to(where, torch_dtype)
        scorer.path, scorer.weights_note = source, check_known([file], name)
        scorer.fingerprint = {
            "scorer": "imagereward",
            "formula": f"(mlp-{MEAN})/{STD}",
            "scale": "1",
            "weights": weights_sha256([file, *(words / n for n in TOKENIZER_FILES if (words / n).is_file())]),
            "preprocess": scorer.preprocess_id,
            "max_tokens": str(scorer.max_tokens),
            "dtype": dtype_name,
            "code": CODE_VERSION,
        }
        return scorer

    def prepare(self, image: Image.Image) -> np.ndarray:
        return self.pixels.crop(image)

    @torch.no_grad()
    def score_prepared(self, prepared: Sequence[np.ndarray], prompts: Sequence[str]) -> Scored:
        return Scored(self.score_pixels(self.pixels.normalise(np.stack(list(prepared))), prompts).cpu())

    def reward(self, images: torch.Tensor, prompts: str | Sequence[str]) -> torch.Tensor:
        texts = texts_for(len(images), prompts)
        return self.score_pixels(self.pixels.tensor(images), texts).to(images.device)

    def score_pixels(self, pixels: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """Normalised pixels (N, 3, S, S) -> fp32 (N,). Differentiable in the pixels."""
        seen = self.vision(pixel_values=pixels.to(self.device, self.dtype)).last_hidden_state
        # Padding to the longest only: pads are masked, and position 0 alone is read.
        tokens = self.tokenizer(
            list(prompts), padding=True, truncation=True, max_length=self.max_tokens, return_tensors="pt"
        ).to(self.device)
        read = self.text(
            input_ids=tokens.input_ids,
            attention_mask=tokens.attention_mask,
            encoder_hidden_states=seen,
            encoder_attention_mask=seen.new_ones(seen.shape[:2], dtype=torch.long),
            is_decoder=False,
        ).last_hidden_state[:, 0]
        return (read.float() @ self.weight + self.bias - MEAN) / STD

    def truncated(self, prompts: Sequence[str]) -> list[bool]:
        if not prompts:
            return []
        ids = self.tokenizer(list(prompts), truncation=False, verbose=False).input_ids
        return [len(one) > self.max_tokens for one in ids]


def _hub_words(name: str, file: Path) -> Path:
    try:
        return from_hub(TOKENIZER, "", name)
    except UserError as error:
        raise UserError(
            f"scorer '{name}' needs the tokenizer {TOKENIZER}, which is not to be had; put its vocab.txt beside "
            f"{file.name}"
        ) from error


def split_state(state: State, source: str, name: str) -> tuple[State, State]:
    """The published layout under transformers' names: (BlipVisionModel's, BlipTextModel's).

    Raises UserError naming the first tensor that has no place."""
    vision: State = {}
    text: State = {}
    for key, value in state.items():
        if UNUSED.match(key) or key.startswith("mlp."):
            continue
        if key.startswith("blip.text_encoder."):
            text[key.removeprefix("blip.text_encoder.")] = value.float()
            continue
        short = key.removeprefix("blip.visual_encoder.")
        pattern = next((p for p in VISION if short != key and re.fullmatch(p, short)), None)
        if pattern is None:
            raise UserError(f"'{source}' for scorer '{name}' is no ImageReward.pt: it holds '{key}'; give that file")
        vision[re.sub(f"^{pattern}$", VISION[pattern], short)] = value.float()
    return vision, text


def _configs(vision: State, text: State, stated: dict[str, Any]) -> tuple[BlipVisionConfig, BlipTextConfig]:
    """Sizes from the tensors; head counts from ``med_config.json`` or by the rule of both published towers, 64 wide."""
    patch = vision["embeddings.patch_embedding.weight"]
    width, side = patch.shape[0], round((vision["embeddings.position_embedding"].shape[1] - 1) ** 0.5)
    words = text["embeddings.word_embeddings.weight"]
    eyes = BlipVisionConfig(
        hidden_size=width,
        intermediate_size=vision["encoder.layers.0.mlp.fc1.weight"].shape[0],
        num_hidden_layers=_count(vision, r"encoder\.layers\.(\d+)\."),
        num_attention_heads=max(1, width // 64),
        image_size=side * patch.shape[-1],
        patch_size=patch.shape[-1],
        hidden_act="gelu",
        layer_norm_eps=1e-6,
    )
    reader = BlipTextConfig(
        vocab_size=words.shape[0],
        hidden_size=words.shape[1],
        encoder_hidden_size=text["encoder.layer.0.crossattention.self.key.weight"].shape[1],
        intermediate_size=text["encoder.layer.0.intermediate.dense.weight"].shape[0],
        num_hidden_layers=_count(text, r"encoder\.layer\.(\d+)\."),
        num_attention_heads=int(stated.get("num_attention_heads", max(1, words.shape[1] // 64))),
        max_position_embeddings=text["embeddings.position_embeddings.weight"].shape[0],
        hidden_act="gelu",
        layer_norm_eps=1e-12,
        is_decoder=True,  # makes the cross-attention layers; the mask stays two-sided
    )
    return eyes, reader


def _count(state: State, pattern: str) -> int:
    return 1 + max(int(m[1]) for k in state if (m := re.match(pattern, k)))
