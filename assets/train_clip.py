"""Stages "clip" and "pickscore": a small CLIPModel, and the same model tuned by PickScore's preference loss."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from . import scenes
from .common import Log, set_lr, start
from .scenes import Scene
from .variants import ORDER_KINDS, blended, near_miss, random_blend, worn

CLIP_STEPS, CLIP_LR, CLIP_SEED, GROUPS, MEMBERS = 3000, 1e-3, 4, 16, 4
PICK_STEPS, PICK_LR, PICK_SEED, PICK_BATCH = 1200, 5e-4, 5, 32
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)


def new_clip(tokenizer: CLIPTokenizer) -> CLIPModel:
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 96,
        "intermediate_size": 384,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": tokenizer.model_max_length,
        "hidden_act": "gelu",
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {
        "hidden_size": 96,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": scenes.SIZE,
        "patch_size": 4,
        "hidden_act": "gelu",
    }
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=64))


def pixels(images: torch.Tensor) -> torch.Tensor:
    """float (N, 3, 32, 32) in -1..1 -> CLIP's normalised pixel values."""
    return ((images + 1) / 2 - MEAN) / STD


def embed_text(model: CLIPModel, tokenizer: CLIPTokenizer, texts: list[str]) -> torch.Tensor:
    """Unit vectors (N, D). Padding to the longest text changes nothing: the tower is causal and read at the end."""
    batch = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
    out = model.text_model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
    return F.normalize(model.text_projection(out.pooler_output), dim=-1)


def embed_images(model: CLIPModel, images: torch.Tensor) -> torch.Tensor:
    """Unit vectors (N, D) of float images in -1..1."""
    return F.normalize(model.visual_projection(model.vision_model(pixels(images)).pooler_output), dim=-1)


def save(model: CLIPModel, tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Weights in fp16; the config says float32, so that they are raised when they are loaded."""
    model.half().save_pretrained(folder)
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), "dtype": "float32"}
    for part in ("text_config", "vision_config"):
        config[part]["dtype"] = "float32"
    path.write_text(json.dumps(config, indent=2) + "\n")
    tokenizer.save_pretrained(folder)
    side = {"height": scenes.SIZE, "width": scenes.SIZE}
    CLIPImageProcessorPil(size={"shortest_edge": scenes.SIZE}, crop_size=side).save_pretrained(folder)


def rate(k: int, steps: int, lr: float) -> float:
    return lr * min(1, (k + 1) / 100) * 0.5 * (1 + math.cos(math.pi * k / steps))


def train_clip(folder: Path, tokenizer_folder: Path, vae_folder: Path) -> None:
    """Contrastive training on batches of groups: a scene beside near misses of it."""
    rng, log = start(CLIP_SEED), Log("clip")
    tokenizer = CLIPTokenizer.from_pretrained(tokenizer_folder)
    vae = AutoencoderKL.from_pretrained(vae_folder).eval()
    model = new_clip(tokenizer)
    opt = torch.optim.AdamW(model.parameters(), CLIP_LR, weight_decay=0.02, betas=(0.9, 0.98))
    hits: list[float] = []
    for k in range(CLIP_STEPS):
        set_lr(opt, rate(k, CLIP_STEPS, CLIP_LR))
        batch: list[Scene] = []
        members = MEMBERS if rng.random() < min(1, k / 500) * 0.8 else 1  # strangers first, then near misses
        for scene in scenes.sample_scenes(GROUPS * MEMBERS // members, rng):
            batch += [scene, *(near_miss(scene, rng) for _ in range(members - 1))]
        images = worn(scenes.render(batch, rng), vae, rng)
        logits = model.logit_scale.exp() * (
            embed_text(model, tokenizer, scenes.random_captions(batch, rng)) @ embed_images(model, images).T
        )
        same = torch.tensor([[a == b for b in batch] for a in batch]) & ~torch.eye(len(batch), dtype=torch.bool)
        logits = logits.masked_fill(same, -1e4)  # another drawing of the same scene is no negative
        target = torch.arange(len(batch))
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        opt.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        model.logit_scale.data.clamp_(max=math.log(100))
        hits.append(float((logits.argmax(1) == target).float().mean()))
        if (k + 1) % 100 == 0:
            log(k + 1, loss=loss.item(), hit=float(np.mean(hits[-100:])), scale=float(model.logit_scale.exp()))
    save(model, tokenizer, folder)


def preference_batch(
    count: int, vae: AutoencoderKL, rng: np.random.Generator, heldout: bool = False
) -> tuple[list[str], torch.Tensor, torch.Tensor]:
    """Prompts, pictures that fit, pictures that do not (float, -1..1): near misses, merged objects, mixtures."""
    drawn = scenes.sample_scenes(count, rng, two=0.85, heldout=heldout)
    good = scenes.render(drawn, rng)
    bad = scenes.render([near_miss(s, rng, ORDER_KINDS) for s in drawn], rng)
    two, kind = np.array([s.second is not None for s in drawn]), rng.random(count)
    merge = two & (kind < 0.3)
    if merge.any():
        codes = scenes.labels([s for s, m in zip(drawn, merge, strict=True) if m])
        bad[merge] = scenes.paint(codes, scenes.draw_look(len(codes), rng), random_blend(len(codes), rng))
    mix = kind > 0.8
    if mix.any():
        bad[mix] = blended(good[mix], bad[mix], vae, rng)
    if mix.any():  # the picture that fits must not be recognisable by being a fresh drawing
        good[mix] = scenes.render([s for s, m in zip(drawn, mix, strict=True) if m], rng)
    return scenes.random_captions(drawn, rng), worn(good, vae, rng), worn(bad, vae, rng)


def preference_logits(
    model: CLIPModel, tokenizer: CLIPTokenizer, texts: list[str], good: torch.Tensor, bad: torch.Tensor
) -> torch.Tensor:
    """PickScore's score difference (N,): exp(logit_scale) * (cos(text, good) - cos(text, bad))."""
    text, image = embed_text(model, tokenizer, texts), embed_images(model, torch.cat([good, bad]))
    score = model.logit_scale.exp() * (text.repeat(2, 1) * image).sum(1)
    return score[: len(texts)] - score[len(texts) :]


def train_pickscore(folder: Path, clip_folder: Path, vae_folder: Path) -> None:
    """Softmax over the two scores, as PickScore: -log sigmoid(s_good - s_bad). No oracle labels."""
    rng, log = start(PICK_SEED), Log("pickscore")
    tokenizer = CLIPTokenizer.from_pretrained(clip_folder)
    vae = AutoencoderKL.from_pretrained(vae_folder).eval()
    model = CLIPModel.from_pretrained(clip_folder, dtype=torch.float32).train()
    opt = torch.optim.AdamW(model.parameters(), PICK_LR, weight_decay=0.02, betas=(0.9, 0.98))
    right: list[float] = []
    for k in range(PICK_STEPS):
        set_lr(opt, rate(k, PICK_STEPS, PICK_LR))
        gap = preference_logits(model, tokenizer, *preference_batch(PICK_BATCH, vae, rng))
        loss = -F.logsigmoid(gap).mean()
        opt.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        model.logit_scale.data.clamp_(max=math.log(100))
        right.append(float((gap > 0).float().mean()))
        if (k + 1) % 100 == 0:
            log(k + 1, loss=loss.item(), right=float(np.mean(right[-100:])), scale=float(model.logit_scale.exp()))
    save(model.eval(), tokenizer, folder)
