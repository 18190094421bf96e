"""Stage "unet": text encoder and U-Net, trained together on latents of the training split, saved as a pipeline."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from diffalign.eval.oracle import Oracle

from . import scenes
from .common import Log, set_lr, start, to_signed, to_tensor
from .sampling import load_pipeline, sample

STEPS, BATCH, LR, SEED = 7000, 32, 2e-3, 2
PICTURES, TWO_SHARE, CAPTION_DROPOUT, EMA_DECAY = 40_000, 0.7, 0.1, 0.998
SNAPSHOT = 1000
HEADS = (len(scenes.LAYOUTS), len(scenes.COLOURS), len(scenes.SHAPES), len(scenes.COLOURS), len(scenes.SHAPES))


def new_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length,
        projection_dim=64,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = CLIPTextModel(config)
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.3)
    return model


def new_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=scenes.SIZE // 4,
        in_channels=4,
        out_channels=4,
        block_out_channels=(48, 96),
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        layers_per_block=1,
        cross_attention_dim=64,
        attention_head_dim=4,
        norm_num_groups=8,
    )


def new_scheduler() -> DDIMScheduler:
    """The scheduler of SD1.5."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="epsilon",
        timestep_spacing="leading",
    )


def save_pipeline(
    folder: Path,
    vae: AutoencoderKL,
    tokenizer: CLIPTokenizer,
    nets: tuple[nn.Module, nn.Module],
    weights: list[torch.Tensor],
) -> None:
    """Write (U-Net, text encoder) with the given weights as a StableDiffusionPipeline folder, U-Net and VAE in fp16."""
    unet, text = new_unet(), new_text_encoder(tokenizer)
    for p, w in zip([*unet.parameters(), *text.parameters()], weights, strict=True):
        p.data.copy_(w)
    for old, new in zip(nets, (unet, text), strict=True):
        new.load_state_dict({**dict(old.named_buffers()), **dict(new.named_parameters())}, strict=False)
    half = AutoencoderKL.from_config(vae.config)
    half.load_state_dict(vae.state_dict())
    pipe = StableDiffusionPipeline(
        vae=half.half(),
        text_encoder=text,  # fp32: transformers loads a text encoder in its stored dtype, diffusers the rest in fp32
        tokenizer=tokenizer,
        unet=unet.half(),
        scheduler=new_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(folder)


def encode(vae: AutoencoderKL, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """uint8 (N, 3, 32, 32) -> posterior mean and std (N, 4, 8, 8), unscaled."""
    with torch.no_grad():
        parts = [vae.encode(to_signed(b)).latent_dist for b in images.split(250)]
    return torch.cat([p.mean for p in parts]), torch.cat([p.std for p in parts])


def train(folder: Path, tokenizer_folder: Path, vae_folder: Path, snapshots: Path | None = None) -> None:
    """Write the whole pipeline; ``snapshots`` receives the averaged weights every 1000 steps."""
    n = STEPS
    rng, log = start(SEED), Log("unet")
    tokenizer = CLIPTokenizer.from_pretrained(tokenizer_folder)
    vae = AutoencoderKL.from_pretrained(vae_folder).eval().requires_grad_(False)
    drawn = scenes.sample_scenes(PICTURES, rng, two=TWO_SHARE)
    mean, std = encode(vae, to_tensor(scenes.render(drawn, rng)))
    scale = vae.config.scaling_factor
    mean, std = mean * scale, std * scale
    texts = [scenes.caption(s, p) for s in drawn for p in (0, 1)]
    ids = _tokens(tokenizer, texts).view(PICTURES, 2, -1)
    null = _tokens(tokenizer, [""])
    log("encoded", std=float(std.mean()))

    unet, text, scheduler = new_unet(), new_text_encoder(tokenizer), new_scheduler()
    params = [*unet.parameters(), *text.parameters()]
    average = [p.detach().clone() for p in params]
    opt = torch.optim.AdamW(params, LR, weight_decay=0.01, betas=(0.9, 0.99))
    losses: list[float] = []
    for k in range(n):
        decay = min(1.0, (1 - k / n) / 0.6)  # constant for 40 %, then linear to 2 %
        set_lr(opt, LR * min(1, (k + 1) / 100) * (0.02 + 0.98 * decay))
        pick = torch.from_numpy(rng.integers(0, PICTURES, BATCH))
        tokens = ids[pick, torch.from_numpy(rng.integers(0, 2, BATCH))]
        tokens[torch.from_numpy(rng.random(BATCH) < CAPTION_DROPOUT)] = null
        z = mean[pick] + std[pick] * torch.randn_like(mean[pick])
        t, noise = torch.randint(0, 1000, (BATCH,)), torch.randn_like(z)
        loss = F.mse_loss(unet(scheduler.add_noise(z, noise, t), t, text(tokens)[0]).sample, noise)
        opt.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        opt.step()
        losses.append(loss.item())
        torch._foreach_lerp_(average, [p.detach() for p in params], 1 - min(EMA_DECAY, k / (10 + k)))
        if (k + 1) % 100 == 0:
            log(k + 1, loss=float(np.mean(losses[-100:])))
        if snapshots is not None and (k + 1) % SNAPSHOT == 0 and k + 1 < n:
            save_pipeline(snapshots, vae, tokenizer, (unet, text), average)
    save_pipeline(folder, vae, tokenizer, (unet, text), average)
    log("done", loss=float(np.mean(losses[-500:])))


@dataclass(frozen=True)
class Course:
    """One run of :func:`refine`: ``read`` steps of the text encoder alone, then joint ones up to ``stop`` on a rate
    that would reach zero at ``steps``. Of the 32 latents of a step ``plain`` are trained as ever, the others at high
    noise (t in 500..949), where the order is decided, on the error of the clean latents times ``weight``. With
    ``until`` the course ends at the first look, one every ``LOOK`` joint steps, that finds this share of two-object
    training prompts drawn all right: order comes within a few hundred steps, and not at the same one everywhere."""

    read: int
    steps: int
    stop: int
    lr: float
    pictures: int
    plain: int = BATCH
    weight: float = 0.0
    until: float | None = None


LOOK = 50
COURSES = (
    Course(read=700, steps=1200, stop=800, lr=1e-3, pictures=20_000),
    Course(read=40, steps=1500, stop=1000, lr=1.5e-3, pictures=8_000, plain=8, weight=0.1, until=0.55),
)


def share_right(folder: Path, oracle: Oracle) -> float:
    """Share of 200 two-object training prompts that the pipeline in ``folder`` draws all right."""
    prompts = [p for p in scenes.training_prompts() if " a " in p][::9][:200]
    return float(oracle.judge(sample(load_pipeline(folder), prompts, range(len(prompts))), prompts)["all"].mean())


def refine(folder: Path, unet_folder: Path, vae_folder: Path, course: Course, oracle: Oracle) -> None:
    """Go on from the pipeline in ``unet_folder`` while the text encoder is taught order.

    After :func:`train` no linear reader of the text encoder tells "a above b" from "b above a", so nothing downstream
    (a LoRA on the U-Net least of all) can learn the order. A reader of the scene on its pooled output, thrown away at
    the end, breaks that plateau; the U-Net is given just enough steps to begin to use it.
    """
    rng, log = start(SEED + 100), Log("refine")
    pipe = StableDiffusionPipeline.from_pretrained(unet_folder)
    vae = AutoencoderKL.from_pretrained(vae_folder).eval().requires_grad_(False)
    unet, text, tokenizer, scheduler = pipe.unet.train(), pipe.text_encoder.train(), pipe.tokenizer, new_scheduler()
    drawn = scenes.sample_scenes(course.pictures, rng, two=0.9)
    mean, std = (x * vae.config.scaling_factor for x in encode(vae, to_tensor(scenes.render(drawn, rng))))
    ids = _tokens(tokenizer, [scenes.caption(s, p) for s in drawn for p in (0, 1)]).view(len(drawn), 2, -1)
    null, target = _tokens(tokenizer, [""]), torch.from_numpy(scenes.labels(drawn))
    slots = nn.Linear(text.config.hidden_size, sum(HEADS))
    params = [*unet.parameters(), *text.parameters()]
    average = [p.detach().clone() for p in params]
    opt = torch.optim.AdamW([*params, *slots.parameters()], course.lr, weight_decay=0.01, betas=(0.9, 0.99))
    history: list[tuple[float, float]] = []
    for k in range(course.read + course.stop):
        joint = k - course.read  # negative while the text encoder learns alone
        set_lr(opt, course.lr * min(1, (k + 1) / 50) * (1 if joint < 0 else 1.02 - joint / course.steps))
        many = torch.from_numpy(rng.integers(0, len(drawn), 128 if joint < 0 else BATCH))
        out = text(ids[many, torch.from_numpy(rng.integers(0, 2, len(many)))])
        heads = slots(out.pooler_output).split(HEADS, 1)
        told = torch.zeros(())
        for j, head in enumerate(heads):
            told = told + F.cross_entropy(head, target[many, j], ignore_index=-100)
        loss = torch.zeros(())
        if joint >= 0:
            states = out.last_hidden_state.clone()
            drop = torch.from_numpy(rng.random(len(many)) < CAPTION_DROPOUT)
            if drop.any():
                states[drop] = text(null)[0]
            z = mean[many] + std[many] * torch.randn_like(mean[many])
            t, noise = torch.randint(0, 1000, (len(many),)), torch.randn_like(z)
            t[course.plain :] = torch.randint(500, 950, (len(many) - course.plain,))
            error = (unet(scheduler.add_noise(z, noise, t), t, states).sample - noise).pow(2).mean((1, 2, 3))
            loss = error[: course.plain].mean()
            if course.plain < len(many):
                alpha = scheduler.alphas_cumprod[t]
                loss = loss + course.weight * (error * (1 - alpha) / alpha)[course.plain :].mean()
        opt.zero_grad(set_to_none=True)
        (loss + 0.05 * told).backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        opt.step()
        fresh = 1.0 if joint < 0 else 1 - min(0.99, joint / (10 + joint))
        torch._foreach_lerp_(average, [p.detach() for p in params], fresh)
        history.append((loss.item(), told.item()))
        if (k + 1) % 50 == 0:
            log(k + 1, loss=float(np.mean(history[-50:], 0)[0]), told=float(np.mean(history[-50:], 0)[1]))
        if course.until is not None and joint > 0 and joint % LOOK == 0:
            with torch.random.fork_rng():  # a look leaves the course as it is
                save_pipeline(folder, vae, tokenizer, (unet, text), average)
                share = share_right(folder, oracle)
            log(k + 1, right=share)
            if share >= course.until:
                return
    save_pipeline(folder, vae, tokenizer, (unet, text), average)


def _tokens(tokenizer: CLIPTokenizer, texts: list[str]) -> torch.Tensor:
    return tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
