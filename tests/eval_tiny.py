"""Small real things for the eval tests: a random CLIPModel folder, synthetic pictures, a manifest folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tiny import byte_tokenizer
from transformers import CLIPConfig, CLIPModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from diffalign.eval.scorers._openclip import to_openclip

# (height, width): square, upright, wide, a crop margin of 3 modulo 4, smaller than 224, extreme, a long side of 224
AWKWARD_SIZES = [
    (512, 512),
    (768, 512),
    (227, 224),
    (300, 451),
    (1000, 667),
    (97, 31),
    (1024, 40),
    (224, 112),
    (224, 224),
]
AWKWARD_TEXTS = [
    "",
    "a cat",
    "  Two   CATS!! ",
    "café ☃",
    "a corgi’s head",
    "salt &amp; pepper",
    "“curly” ‘quotes’ — dash…",
    "ｆｕｌｌ　ｗｉｄｔｈ",
    "mojibake: donâ€™t, sÃ£o",
    "&lt;b&gt; &amp;amp; &#39;x&#39;",
    "tabs\tand\nnew\r\nlines\u00a0nbsp",
    "emoji 🦊👩‍🚀, 日本語, Ελληνικά, İSTANBUL ẞ",
    "don't I'll we've 'S 1234 3.14",
    "e\u0301 versus é, ﬁligree",
    "<end_of_text> <|endoftext|> <start_of_text>",
    "\x07control\x1b[31m chars",
    "long " * 100,
]


def golden(height: int, width: int) -> Image.Image:
    """The synthetic picture of spec/evaluators.md 19: integer arithmetic on the pixel grid."""
    y, x = np.mgrid[0:height, 0:width]
    channels = [(7 * x + 13 * y) % 256, (x * y // 5) % 256, (x * x // 9 + 3 * y) % 256]
    return Image.fromarray(np.stack(channels, -1).astype(np.uint8))


def write_tiny_clip(folder: Path, seed: int = 0, size: int = 32, max_tokens: int = 40, tau: float = 100.0) -> Path:
    """A CLIPModel of the real class with random weights, its tokenizer and its processor, as a hub folder has them."""
    tokenizer = byte_tokenizer(max_tokens)
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": max_tokens,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {
        "image_size": size,
        "patch_size": 8,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    config = CLIPConfig(
        text_config=text, vision_config=vision, projection_dim=12, logit_scale_init_value=float(np.log(tau))
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CLIPModel(config)
        for parameter in model.parameters():
            if parameter.ndim > 1:  # the default init is so small that every cosine looks alike
                torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size}).save_pretrained(
        folder
    )
    return folder


def write_tiny_openclip(folder: Path, seed: int = 0) -> Path:
    """The same kind of model as OpenCLIP stores it: open_clip_config.json, open_clip_pytorch_model.bin, a tokenizer."""
    plain = write_tiny_clip(folder / "plain", seed)
    model = CLIPModel.from_pretrained(plain)
    torch.save(to_openclip(model.state_dict()), folder / "open_clip_pytorch_model.bin")
    vision = {"image_size": 32, "patch_size": 8, "width": 16, "layers": 2, "head_width": 8, "mlp_ratio": 2.0}
    text = {
        "context_length": 40,
        "vocab_size": model.config.text_config.vocab_size,
        "width": 16,
        "heads": 2,
        "layers": 2,
    }
    config = {"embed_dim": 12, "vision_cfg": vision, "text_cfg": {**text, "mlp_ratio": 2.0}}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    byte_tokenizer(40).save_pretrained(folder)
    return folder


def write_samples(folder: Path, prompts: Sequence[str], per_prompt: int = 1, size: int = 40, salt: int = 0) -> Path:
    """A folder as `diffalign sample` leaves it: noise pictures, ``manifest.jsonl`` and ``sample.json``."""
    (folder / "images").mkdir(parents=True)
    rows = []
    for i, prompt in enumerate(prompts):
        for k in range(per_prompt):
            name = f"images/{i:06d}-{k}.png"
            pixels = np.random.default_rng([salt, i, k]).integers(0, 256, (size, size, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name)
            category = "even" if i % 2 == 0 else "odd"
            rows.append({"id": f"p{i:03d}", "prompt": prompt, "category": category, "k": k, "seed": k, "image": name})
    (folder / "manifest.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (folder / "sample.json").write_text(json.dumps({"model": "m", "settings": {"steps": 20, "seed": 0}}))
    return folder
