"""Stage "vae": a small AutoencoderKL (f = 4, four latent channels) on drawings of the training split."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from diffusers import AutoencoderKL

from . import scenes
from .common import Log, set_lr, start, to_signed, to_tensor

STEPS, BATCH, LR, PICTURES, SEED = 6000, 8, 5e-3, 40_000, 1


def new_vae() -> AutoencoderKL:
    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(8, 16, 32),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=scenes.SIZE,
        mid_block_add_attention=False,
    )
    with torch.no_grad():  # a posterior of std about 1 drowns the signal and training stalls at the background
        vae.quant_conv.weight[4:] *= 0.1
        vae.quant_conv.bias[4:] = -6
    return vae


def psnr(vae: AutoencoderKL, images: torch.Tensor) -> float:
    """Reconstruction from the posterior mean, in dB for pixels in 0..1. ``images``: uint8 (N, 3, 32, 32)."""
    x = to_signed(images)
    with torch.no_grad():
        r = vae.decode(vae.encode(x).latent_dist.mean).sample.clamp(-1, 1)
    return -10 * math.log10(float((r - x).pow(2).mean()) / 4)


def train(folder: Path, steps: int = STEPS) -> None:
    """Write the autoencoder with ``scaling_factor`` = 1 / std of the latents."""
    rng, log = start(SEED), Log("vae")
    images = to_tensor(scenes.render(scenes.sample_scenes(PICTURES, rng), rng))
    vae = new_vae()
    opt = torch.optim.AdamW(vae.parameters(), LR, weight_decay=0, betas=(0.9, 0.95))
    for k in range(steps):
        set_lr(opt, LR * min(1, (k + 1) / 50) * (1 - k / steps))
        x = to_signed(images[torch.from_numpy(rng.integers(0, PICTURES - 1000, BATCH))])
        posterior = vae.encode(x).latent_dist
        r = vae.decode(posterior.sample()).sample
        l1, l2 = (r - x).abs().mean(), (r - x).pow(2).mean()
        opt.zero_grad(set_to_none=True)
        (l1 + l2 + 1e-6 * posterior.kl().mean()).backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        opt.step()
        if (k + 1) % 250 == 0:
            log(k + 1, l1=l1.item(), mse=l2.item())
    vae.eval()
    with torch.no_grad():
        z = torch.cat([vae.encode(to_signed(b)).latent_dist.mean for b in images[:4000].split(250)])
    vae.register_to_config(scaling_factor=1 / float(z.std()))
    log("done", psnr=psnr(vae, images[-1000:]), std=float(z.std()))
    vae.save_pretrained(folder)
