"""Stages "clip" and "pickscore": a small CLIPModel, and the same model tuned by PickScore's preference loss."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import nn
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from . import scenes
from .common import Log, set_lr, start
from .scenes import Scene
from .variants import ORDER_KINDS, blended, near_miss, random_blend, worn

CLIP_STEPS, CLIP_LR, CLIP_SEED, GROUPS, MEMBERS = 3000, 1e-3, 4, 16, 4
PICK_STEPS, PICK_LR, PICK_SEED, PICK_BATCH = 1200, 1e-3, 5, 32
READ_STEPS, READ_TEXTS = 300, 128
HEADS = (len(scenes.LAYOUTS), len(scenes.COLOURS), len(scenes.SHAPES), len(scenes.COLOURS), len(scenes.SHAPES))
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


def text_features(model: CLIPModel, tokenizer: CLIPTokenizer, texts: list[str]) -> torch.Tensor:
    """Projected features (N, D). Padding to the longest text changes nothing: the tower is causal, read at the end."""
    batch = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
    out = model.text_model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
    return model.text_projection(out.pooler_output)


def image_features(model: CLIPModel, images: torch.Tensor) -> torch.Tensor:
    """Projected features (N, D) of float images in -1..1."""
    return model.visual_projection(model.vision_model(pixels(images)).pooler_output)


def embed_text(model: CLIPModel, tokenizer: CLIPTokenizer, texts: list[str]) -> torch.Tensor:
    """Unit vectors (N, D)."""
    return F.normalize(text_features(model, tokenizer, texts), dim=-1)


def embed_images(model: CLIPModel, images: torch.Tensor) -> torch.Tensor:
    """Unit vectors (N, D) of float images in -1..1."""
    return F.normalize(image_features(model, images), dim=-1)


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
) -> tuple[list[Scene], list[str], torch.Tensor, torch.Tensor]:
    """Scenes, prompts, pictures that fit, pictures that do not (float, -1..1): near misses, merged ones, mixtures."""
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
    return drawn, scenes.random_captions(drawn, rng), worn(good, vae, rng), worn(bad, vae, rng)


def preference_logits(model: CLIPModel, text: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
    """PickScore's score difference (N,): exp(logit_scale) * (cos(text, good) - cos(text, bad)) of features (N, D) and
    (2N, D), the good ones first."""
    score = model.logit_scale.exp() * (F.normalize(text.repeat(2, 1), dim=-1) * F.normalize(image, dim=-1)).sum(1)
    return score[: len(text)] - score[len(text) :]


def slot_loss(slots: nn.Linear, features: torch.Tensor, drawn: list[Scene]) -> torch.Tensor:
    """Cross entropy of reading layout, colours and shapes (``scenes.labels``) from either tower's features."""
    target = torch.from_numpy(scenes.labels(drawn))
    heads = slots(features).split(HEADS, 1)
    return sum((F.cross_entropy(h, target[:, j], ignore_index=-100) for j, h in enumerate(heads)), torch.zeros(()))


def read_texts(
    model: CLIPModel,
    tokenizer: CLIPTokenizer,
    slots: nn.Linear,
    opt: torch.optim.Optimizer,
    lr: float,
    rng: np.random.Generator,
    log: Log,
) -> None:
    """The text tower alone, taught to tell the scene: order is learnt in seconds when nothing else pulls."""
    for k in range(READ_STEPS):
        set_lr(opt, lr * min(1, (k + 1) / 50))
        more = scenes.sample_scenes(READ_TEXTS, rng, two=0.95)
        told = slot_loss(slots, text_features(model, tokenizer, scenes.random_captions(more, rng)), more)
        opt.zero_grad(set_to_none=True)
        told.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        if (k + 1) % 50 == 0:
            log(f"read {k + 1}", told=told.item())


def train_pickscore(folder: Path, clip_folder: Path, vae_folder: Path) -> None:
    """Softmax over the two scores, as PickScore: -log sigmoid(s_good - s_bad). No oracle labels.

    The contrastive model is blind to order ("a above b" is "b above a" to it), and the preference loss alone does not
    leave that plateau. One linear reader of the scene, shared by both towers and thrown away at the end, does.
    """
    rng, log = start(PICK_SEED), Log("pickscore")
    tokenizer = CLIPTokenizer.from_pretrained(clip_folder)
    vae = AutoencoderKL.from_pretrained(vae_folder).eval()
    model = CLIPModel.from_pretrained(clip_folder, dtype=torch.float32).train()
    slots = nn.Linear(model.config.projection_dim, sum(HEADS))
    opt = torch.optim.AdamW([*model.parameters(), *slots.parameters()], PICK_LR, weight_decay=0.02, betas=(0.9, 0.98))
    read_texts(model, tokenizer, slots, opt, PICK_LR, rng, log)
    history: list[tuple[float, ...]] = []
    for k in range(PICK_STEPS):
        set_lr(opt, rate(k, PICK_STEPS, PICK_LR))
        drawn, texts, good, bad = preference_batch(PICK_BATCH, vae, rng)
        more = scenes.sample_scenes(READ_TEXTS // 4, rng, two=0.95)
        text = text_features(model, tokenizer, texts + scenes.random_captions(more, rng))
        image = image_features(model, torch.cat([good, bad]))
        gap = preference_logits(model, text[:PICK_BATCH], image)
        told, seen = slot_loss(slots, text, drawn + more), slot_loss(slots, image[:PICK_BATCH], drawn)
        opt.zero_grad(set_to_none=True)
        (-F.logsigmoid(gap).mean() + 0.5 * told + seen).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        model.logit_scale.data.clamp_(max=math.log(100))
        history.append((float((gap > 0).float().mean()), told.item(), seen.item()))
        if (k + 1) % 50 == 0:
            right, told_mean, seen_mean = np.mean(history[-50:], 0)
            log(k + 1, right=right, told=told_mean, seen=seen_mean, scale=float(model.logit_scale.exp()))
    save(model.eval(), tokenizer, folder)
