"""Stage "hps": a model like HPSv2, tuned from tiny-clip on ranked lists and stored as OpenCLIP stores its models."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPModel, CLIPTokenizer

from diffalign.eval.scorers._openclip import to_openclip

from . import scenes
from .common import Log, set_lr, start
from .train_clip import HEADS, READ_TEXTS, image_features, preference_batch, rate, read_texts, slot_loss, text_features

HPS_STEPS, HPS_LR, HPS_SEED, HPS_BATCH = 1200, 1e-3, 11, 32


def ranked_loss(scores: torch.Tensor) -> torch.Tensor:
    """Pairwise logistic loss of ranked lists: scores (N, K), best first; mean over the K (K - 1) / 2 pairs."""
    pairs = [-F.logsigmoid(scores[:, i] - scores[:, j]) for j in range(scores.shape[1]) for i in range(j)]
    return torch.stack(pairs).mean()


def train(folder: Path, clip_folder: Path, vae_folder: Path) -> None:
    """Lists of three for each prompt: a picture that fits, a near miss of it, the picture of another prompt.

    As HPSv2 it is taught by the order of pictures of one prompt. A throw-away reader of the scene helps both towers
    over the plateau of order, as it does for tiny-pickscore. No oracle labels, no samples of tiny-sd."""
    rng, log = start(HPS_SEED), Log("hps")
    tokenizer = CLIPTokenizer.from_pretrained(clip_folder)
    vae = AutoencoderKL.from_pretrained(vae_folder).eval()
    model = CLIPModel.from_pretrained(clip_folder, dtype=torch.float32).train()
    slots = nn.Linear(model.config.projection_dim, sum(HEADS))
    opt = torch.optim.AdamW([*model.parameters(), *slots.parameters()], HPS_LR, weight_decay=0.02, betas=(0.9, 0.98))
    read_texts(model, tokenizer, slots, opt, HPS_LR, rng, log)
    history: list[tuple[float, ...]] = []
    for k in range(HPS_STEPS):
        set_lr(opt, rate(k, HPS_STEPS, HPS_LR))
        drawn, texts, good, bad = preference_batch(HPS_BATCH, vae, rng)
        more = scenes.sample_scenes(READ_TEXTS // 4, rng, two=0.95)
        text = text_features(model, tokenizer, texts + scenes.random_captions(more, rng))
        image = image_features(model, torch.cat([good, bad]))
        fits, misses = F.normalize(image, dim=-1).chunk(2)
        lists = torch.stack([fits, misses, fits.roll(1, 0)], 1)
        scores = model.logit_scale.exp() * (lists * F.normalize(text[:HPS_BATCH], dim=-1)[:, None]).sum(-1)
        told, seen = slot_loss(slots, text, drawn + more), slot_loss(slots, image[:HPS_BATCH], drawn)
        opt.zero_grad(set_to_none=True)
        (ranked_loss(scores) + 0.5 * told + seen).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        model.logit_scale.data.clamp_(max=math.log(100))
        history.append((float((scores[:, 0] > scores[:, 1]).float().mean()), told.item(), seen.item()))
        if (k + 1) % 50 == 0:
            right, told_mean, seen_mean = np.mean(history[-50:], 0)
            log(k + 1, right=right, told=told_mean, seen=seen_mean, scale=float(model.logit_scale.exp()))
    save(model.eval(), tokenizer, folder)


def save(model: CLIPModel, tokenizer: CLIPTokenizer, folder: Path) -> None:
    """As a hub folder of OpenCLIP: ``open_clip_config.json``, ``open_clip_model.safetensors`` (fp16), the tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {k: v.half().contiguous() for k, v in to_openclip(model.state_dict()).items()}
    save_file(state, folder / "open_clip_model.safetensors", metadata={"format": "pt"})
    vision, text = model.config.vision_config, model.config.text_config
    config = {
        "embed_dim": model.config.projection_dim,
        "vision_cfg": {
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "width": vision.hidden_size,
            "layers": vision.num_hidden_layers,
            "head_width": vision.hidden_size // vision.num_attention_heads,
            "mlp_ratio": vision.intermediate_size / vision.hidden_size,
        },
        "text_cfg": {
            "context_length": text.max_position_embeddings,
            "vocab_size": text.vocab_size,
            "width": text.hidden_size,
            "heads": text.num_attention_heads,
            "layers": text.num_hidden_layers,
        },
    }
    pixels = {"mean": [0.48145466, 0.4578275, 0.40821073], "std": [0.26862954, 0.26130258, 0.27577711]}
    stated = {"model_cfg": config, "preprocess_cfg": pixels}
    (folder / "open_clip_config.json").write_text(json.dumps(stated, indent=2) + "\n")
    tokenizer.save_pretrained(folder)
