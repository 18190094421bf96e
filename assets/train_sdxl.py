"""Stage "sdxl": a tiny model of SDXL's architecture, grown out of tiny-sd and taught size and crop.

Text encoder 1 is tiny-sd's, encoder 2 tiny-pickscore's text tower; both stay frozen, and so does tiny-sd's VAE. SDXL
reads the penultimate layer of both, so encoder 1 gets one more layer that nothing reads. The U-Net starts from
tiny-sd's weights: its cross attentions read the new states through the linear map that best gives back tiny-sd's own,
what is new in SDXL (a second transformer layer, the embedding of pooled text and time ids) starts at zero.

With encoder 2, which knows order, the course ends at 92 % of two-object prompts all right, which leaves alignment next
to nothing to win. So the shipped U-Net lies a share ``MIX`` of the way from the start to the end of the course, but for
the embedding of pooled text and sizes, which is the trained one.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from . import scenes
from .common import Log, set_lr, start, to_signed, to_tensor
from .train_unet import CAPTION_DROPOUT, EMA_DECAY, encode, new_scheduler

STEPS, BATCH, LR, SEED, PICTURES = 1600, 32, 1e-3, 11, 20_000
MIX = 0.5
PLAIN_SHARE, WIDE_SHARE = 0.6, 0.2  # the rest are small originals
MOST_WIDE, SMALLEST = 16, 12  # pixels beyond the square, side of the smallest original


def new_unet(width: int, pooled: int) -> UNet2DConditionModel:
    """tiny-sd's sizes in SDXL's make; ``width`` of the text states, ``pooled`` of the pooled text."""
    ids = 16
    return UNet2DConditionModel(
        sample_size=scenes.SIZE // 4,
        in_channels=4,
        out_channels=4,
        block_out_channels=(48, 96),
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        layers_per_block=1,
        cross_attention_dim=width,
        attention_head_dim=[4, 4],
        transformer_layers_per_block=[2, 1],
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=ids,
        projection_class_embeddings_input_dim=6 * ids + pooled,
        norm_num_groups=8,
    )


def text_encoders(sd: StableDiffusionPipeline, clip: CLIPModel) -> tuple[CLIPTextModel, CLIPTextModelWithProjection]:
    """Encoder 1 with its unread third layer, and encoder 2 with its projection."""
    first = CLIPTextModel(CLIPTextConfig.from_dict({**sd.text_encoder.config.to_dict(), "num_hidden_layers": 3}))
    first.load_state_dict(sd.text_encoder.state_dict(), strict=False)
    config = {**clip.config.text_config.to_dict(), "projection_dim": clip.config.projection_dim}
    second = CLIPTextModelWithProjection(CLIPTextConfig.from_dict(config))
    tower = {f"text_model.{name}": w for name, w in clip.text_model.state_dict().items()}
    second.load_state_dict({**tower, "text_projection.weight": clip.text_projection.weight})
    return first.eval(), second.eval()


@torch.no_grad()
def encode_texts(
    texts: list[str],
    tokenizers: tuple[CLIPTokenizer, CLIPTokenizer],
    encoders: tuple[CLIPTextModel, CLIPTextModelWithProjection],
) -> tuple[Tensor, Tensor]:
    """States (N, L, 160) of the penultimate layers side by side, and the pooled projection (N, 64) of encoder 2."""
    states, pooled = [], torch.empty(0)
    for tokenizer, encoder in zip(tokenizers, encoders, strict=True):
        ids = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
        out = encoder(ids, output_hidden_states=True)
        states.append(out.hidden_states[-2])
        pooled = out[0]
    return torch.cat(states, -1), pooled


@torch.no_grad()
def grow(old: UNet2DConditionModel, new: UNet2DConditionModel, read: Tensor) -> None:
    """Fill ``new`` so that it computes what ``old`` does. ``read`` (161, 64): new states with a 1 -> tiny-sd's."""
    theirs, ours = old.state_dict(), new.state_dict()
    for name, weight in ours.items():
        if ".transformer_blocks.1." in name or name.startswith("add_embedding"):
            if name.endswith(("to_out.0.weight", "to_out.0.bias", "net.2.weight", "net.2.bias", "linear_2.weight")):
                weight.zero_()
            continue
        source = theirs[name]
        if name.endswith(("attn2.to_k.weight", "attn2.to_v.weight")):
            weight.copy_(source @ read[:-1].T)
        elif name.endswith("attn2.to_out.0.bias"):  # a constant in the values; one in the keys changes nothing
            layer = name.removesuffix("to_out.0.bias")
            weight.copy_(source + theirs[f"{layer}to_out.0.weight"] @ (theirs[f"{layer}to_v.weight"] @ read[-1]))
        else:
            weight.copy_(source.reshape(weight.shape))
    new.load_state_dict(ours)


@dataclass(frozen=True)
class Views:
    """N pictures of 32x32 as a resize of the shorter side and a crop give them, uint8 (N, 3, 32, 32), with their
    ``time_ids`` (N, 6): height and width of the original, top and left of the crop, height and width of the target."""

    images: Tensor
    time_ids: Tensor


def views(images: np.ndarray, rng: np.random.Generator) -> Views:
    """Most drawings as they are; some as a crop of a wider or higher picture, which shifts the scene; some from a
    small original, which blurs it. ``images``: uint8 (N, 32, 32, 3)."""
    side, n = scenes.SIZE, len(images)
    out, ids = images.copy(), np.tile([side, side, 0, 0, side, side], (n, 1)).astype(np.float32)
    kind, flat = rng.random(n), rng.random(n) < 0.5
    room, place = 2 * rng.integers(1, MOST_WIDE // 2 + 1, n), rng.random(n)
    small = rng.integers(SMALLEST, side, n)
    for i in np.flatnonzero((kind >= PLAIN_SHARE) & (kind < PLAIN_SHARE + WIDE_SHARE)):
        axis, corner = int(flat[i]), int(place[i] * (room[i] + 1))
        pad = [(0, 0)] * 3
        pad[axis] = (room[i] // 2, room[i] // 2)  # the background is plain, so its edge goes on
        out[i] = np.pad(images[i], pad, mode="edge").take(range(corner, corner + side), axis)
        ids[i, axis], ids[i, 2 + axis] = side + room[i], corner
    pictures = to_tensor(out)
    for size in range(SMALLEST, side):
        pick = torch.from_numpy(np.flatnonzero((kind >= PLAIN_SHARE + WIDE_SHARE) & (small == size)))
        if len(pick):
            x = F.interpolate(to_signed(pictures[pick]), size=(size, size), mode="area")
            x = F.interpolate(x, size=(side, side), mode="bicubic").clamp(-1, 1)
            pictures[pick] = ((x + 1) * 127.5).round().to(torch.uint8)
            ids[pick.numpy(), :2] = size
    return Views(pictures, torch.from_numpy(ids))


def save_pipeline(
    folder: Path,
    vae: AutoencoderKL,
    tokenizers: tuple[CLIPTokenizer, CLIPTokenizer],
    encoders: tuple[CLIPTextModel, CLIPTextModelWithProjection],
    unet: UNet2DConditionModel,
) -> None:
    """Write a StableDiffusionXLPipeline folder, every weight in fp16."""
    pipe = StableDiffusionXLPipeline(
        vae=vae.half(),
        text_encoder=encoders[0].half(),
        text_encoder_2=encoders[1].half(),
        tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[1],
        unet=unet.half(),
        scheduler=new_scheduler(),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )
    pipe.save_pretrained(folder)
    for name in ("text_encoder", "text_encoder_2"):  # transformers opens a model in the type its config names
        config = folder / name / "config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), "dtype": "float32"}, indent=2) + "\n")


def train(folder: Path, sd_folder: Path, clip_folder: Path) -> None:
    """Write the whole pipeline."""
    rng, log = start(SEED), Log("sdxl")
    sd, clip = StableDiffusionPipeline.from_pretrained(sd_folder), CLIPModel.from_pretrained(clip_folder)
    vae, encoders = sd.vae.eval().requires_grad_(False), text_encoders(sd, clip)
    # SDXL's second tokenizer pads with "!", token 0
    tokenizers = (sd.tokenizer, CLIPTokenizer.from_pretrained(sd_folder / "tokenizer", pad_token="!"))

    captions = ["", *scenes.training_prompts()]
    states, pooled = encode_texts(captions, tokenizers, encoders)
    with torch.no_grad():
        ids = sd.tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
        wanted = sd.text_encoder(ids)[0].flatten(0, 1)
    known = torch.cat([states.flatten(0, 1), torch.ones(len(wanted), 1)], 1).double()
    read = torch.linalg.lstsq(known, wanted.double(), driver="gelsd").solution.float()
    log("read", error=float((known.float() @ read - wanted).pow(2).mean() / wanted.var()))
    unet = new_unet(states.shape[-1], pooled.shape[-1])
    grow(sd.unet, unet, read)
    states[0], pooled[0] = 0, 0  # the unconditional branch of SDXL's pipeline

    drawn = scenes.sample_scenes(PICTURES, rng, two=0.8)
    seen = views(scenes.render(drawn, rng), rng)
    mean, std = (x * vae.config.scaling_factor for x in encode(vae, seen.images))
    row = {text: i for i, text in enumerate(captions)}
    said = torch.tensor([[row[scenes.caption(s, p)] for p in (0, 1)] for s in drawn])
    log("encoded", std=float(std.mean()))

    scheduler, params = new_scheduler(), list(unet.parameters())
    first, average = ([p.detach().clone() for p in params] for _ in range(2))
    opt = torch.optim.AdamW(params, LR, weight_decay=0.01, betas=(0.9, 0.99))
    losses: list[float] = []
    for k in range(STEPS):
        set_lr(opt, LR * min(1, (k + 1) / 50) * (1 - k / STEPS))
        pick = torch.from_numpy(rng.integers(0, PICTURES, BATCH))
        text = said[pick, torch.from_numpy(rng.integers(0, 2, BATCH))]
        text[torch.from_numpy(rng.random(BATCH) < CAPTION_DROPOUT)] = 0
        z = mean[pick] + std[pick] * torch.randn_like(mean[pick])
        t, noise = torch.randint(0, 1000, (BATCH,)), torch.randn_like(z)
        added = {"text_embeds": pooled[text], "time_ids": seen.time_ids[pick]}
        out = unet(scheduler.add_noise(z, noise, t), t, states[text], added_cond_kwargs=added).sample
        loss = F.mse_loss(out, noise)
        opt.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        opt.step()
        losses.append(loss.item())
        torch._foreach_lerp_(average, [p.detach() for p in params], 1 - min(EMA_DECAY, (1 + k) / (10 + k)))
        if (k + 1) % 100 == 0:
            log(k + 1, loss=float(np.mean(losses[-100:])))
    for (name, parameter), begin, end in zip(unet.named_parameters(), first, average, strict=True):
        parameter.data = end if name.startswith("add_embedding") else begin.lerp(end, MIX)
    save_pipeline(folder, vae, tokenizers, encoders, unet)
    log("done", loss=float(np.mean(losses[-500:])))
