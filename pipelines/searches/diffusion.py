"""A diffusers pipeline of SD1.x, SD2.x or SDXL as the world of a search."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

from ...denoiser import Denoiser, guide
from ...eval.scorers import Scorer, load_scorer
from ...facts import RENOISING, SamplingRecord
from ...families.guidance import embedding_width, guidance_embedding
from ...keyed import normal
from ...rollouts.policy import CLEAN, Policy
from ..sample import step_noise
from .core import MADE, Key, World

Reward = Callable[[list[Image.Image], list[str]], Sequence[float] | Tensor]  # pictures, prompts -> one score each


class DiffusionWorld(World):
    """P prompts of an opened pipeline.

    The ordinary sampler is the pipeline itself with its scheduler; steps that add noise are DDIM's with ``eta`` over
    the model's own schedule (arXiv 2010.02502), or those that a few-step student's record asks for.

    Args:
        pipe: diffusers' own pipeline of the family.
        texts, keys: P prompts, and seed and id of each.
        embeds: their conditioning as keyword arguments of the pipeline, P rows each.
        reward: a scorer, or any function of pictures and prompts.
        size: (height, width) in pixels.
        steps, guidance: as the pipeline takes them; guidance 1 or less is none.
        eta: share of new noise in a step of a search, and of the ordinary sampler where it takes one.
        record: of a few-step student.
    """

    def __init__(
        self,
        pipe: Any,
        texts: Sequence[str],
        keys: Sequence[Key],
        embeds: Mapping[str, Tensor],
        reward: Scorer | Reward,
        *,
        size: tuple[int, int],
        steps: int,
        guidance: float,
        eta: float,
        record: SamplingRecord | None = None,
    ) -> None:
        config = {**pipe.scheduler.config, "_class_name": type(pipe.scheduler).__name__}
        denoiser = Denoiser.from_config(record.scheduler_config() if record else config)
        factor = pipe.vae_scale_factor
        shape = (pipe.unet.config.in_channels, size[0] // factor, size[1] // factor)
        self.told = embedding_width(pipe.unet)
        self.guided = guidance > 1 and not self.told
        policy = policy_of(denoiser, config, steps, eta, record)
        super().__init__(keys, denoiser, policy, shape, pipe.unet.device, 2 if self.guided else 1)
        self.pipe, self.texts, self.embeds, self.reward = pipe, list(texts), dict(embeds), reward
        self.size, self.guidance = size, guidance
        self.call: dict[str, Any] = {"num_inference_steps": steps, "guidance_scale": guidance}
        if record is not None:
            self.call = record.call(steps, guidance)
        elif "eta" in inspect.signature(pipe.scheduler.step).parameters:
            self.call["eta"] = eta
        times = self.call.get("timesteps")
        pipe.scheduler.set_timesteps(**({"timesteps": times} if times else {"num_inference_steps": steps}))
        self.draw_steps = len(pipe.scheduler.timesteps)  # some schedulers ask the network more than once a step
        if isinstance(reward, Scorer):
            reward.check_prompts(self.texts)
            reward.plan_texts(self.texts)
        vae = pipe.vae
        if vae.dtype == torch.float16 and vae.config.force_upcast:
            vae.to(torch.float32)  # SDXL's overflows

    @property
    def draw_price(self) -> int:
        return self.price * self.draw_steps

    def network(self, x: Tensor, t: Tensor, rows: Sequence[int]) -> Tensor:
        index = list(rows)
        told, dtype = {name: tensor[index] for name, tensor in self.embeds.items()}, self.pipe.unet.dtype
        names = ["negative_", ""] if self.guided else [""]
        n = len(names)
        added = None
        if "pooled_prompt_embeds" in told:
            height, width = self.size
            ids = torch.tensor([[height, width, 0, 0, height, width]], dtype=dtype, device=x.device)
            pooled = torch.cat([told[f"{name}pooled_prompt_embeds"] for name in names])
            added = {"text_embeds": pooled, "time_ids": ids.expand(len(pooled), -1)}
        w = torch.full((len(x),), self.guidance, device=x.device)
        output = self.pipe.unet(
            x.repeat(n, 1, 1, 1).to(dtype),
            t.repeat(n),
            encoder_hidden_states=torch.cat([told[f"{name}prompt_embeds"] for name in names]),
            added_cond_kwargs=added,
            timestep_cond=guidance_embedding(w, self.told).to(dtype) if self.told else None,
        ).sample.float()
        if not self.guided:
            return output
        uncond, cond = output.chunk(2)
        return guide(cond, uncond, self.guidance)

    def decode(self, latents: Tensor) -> list[Any]:
        vae = self.pipe.vae
        raw = latents / vae.config.scaling_factor + float(getattr(vae.config, "shift_factor", None) or 0.0)
        pixels = vae.decode(raw.to(vae.dtype)).sample
        return list(self.pipe.image_processor.postprocess(pixels.float(), output_type="pil"))

    def score(self, pictures: Sequence[Any], rows: Sequence[int], t: Sequence[int]) -> list[float]:
        from ...eval.scorers.spm import StepAwareScorer

        texts = [self.texts[row] for row in rows]
        if isinstance(self.reward, StepAwareScorer):
            pixels = self.pipe.image_processor.pil_to_numpy(list(pictures))
            images = torch.from_numpy(pixels).permute(0, 3, 1, 2)
            return self.reward.reward(images, texts, torch.tensor(list(t))).tolist()
        scores = self.reward(list(pictures), texts)
        return [float(value) for value in scores]

    def draw(self, rows: Sequence[int], draws: Sequence[int]) -> list[Any]:
        index = list(rows)
        named = [(*self.keys[row], draw) for row, draw in zip(rows, draws, strict=True)]
        noise = [normal(self.shape, seed, MADE, name, draw) for seed, name, draw in named]
        return list(
            self.pipe(
                **{name: tensor[index] for name, tensor in self.embeds.items()},
                latents=torch.stack(noise).to(self.device, self.pipe.unet.dtype),
                generator=[step_noise(*key) for key in named],
                height=self.size[0],
                width=self.size[1],
                **self.call,
            ).images
        )


def policy_of(
    denoiser: Denoiser, config: Mapping[str, Any], steps: int, eta: float, record: SamplingRecord | None
) -> Policy:
    """The steps that add noise: DDIM's over the scheduler's ``config``, or those of a few-step student's times. A
    deterministic student's add none (eta 0), nor do those of a scheduler that cannot be followed."""
    if record is None or (record.timesteps is None and record.scheduler == "DDIMScheduler"):
        spacing, offset = config.get("timestep_spacing", "leading"), config.get("steps_offset", 0)
        times = tuple(denoiser.timesteps(steps, spacing, offset).tolist())
        return Policy(times, (*times[1:], CLEAN), eta=eta)
    followed = record.times(steps)
    times = followed or tuple(denoiser.timesteps(steps).tolist())
    if followed is None or record.deterministic:
        return Policy(times, (*times[1:], CLEAN), eta=0.0)
    kernel: Literal["renoise", "ddim"] = "renoise" if record.scheduler in RENOISING else "ddim"
    return Policy(times, (*times[1:], CLEAN), kernel=kernel, scale=record.scale)


def reward_of(reward: str | Scorer | Reward, device: str, dtype: str = "auto") -> Scorer | Reward:
    """A scorer by name (or ``name=PATH``) on the device, or what is given. Raises UserError as `load_scorer`."""
    return load_scorer(reward, None, device, dtype) if isinstance(reward, str) else reward
