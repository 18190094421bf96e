"""Image -> noise -> image: DDIM inversion with ReNoise as a plain diffusers pipeline, for SD1.x, SD2.x and SDXL.

Also usable as ``custom_pipeline``:

    pipe = DiffusionPipeline.from_pretrained("stable-diffusion-v1-5/stable-diffusion-v1-5",
                                             custom_pipeline="diffalign/pipelines/inversion.py", trust_remote_code=True)
    result = pipe(image, "a cat in the rain", renoise=4)
    result.images[0], result.latents, result.error
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import BaseOutput
from PIL import Image
from torch import Tensor

from diffalign.denoiser import Denoiser, guide
from diffalign.errors import UserError
from diffalign.pipelines import stock

Images = Image.Image | Sequence[Image.Image] | Tensor


@dataclass
class InversionOutput(BaseOutput):
    """What a round trip gives.

    Args:
        images: pictures sampled back from the noise.
        latents: the noise that was found, (B, C, h, w).
        error: root mean square difference between the pictures and what came back, pixels in [0, 1], one number a
            picture (B,). The part that the VAE alone loses is ``vae_error``.
        vae_error: the same for encoding and decoding without any diffusion.
        latent_error: root mean square difference of the latents, (B,).
    """

    images: list[Image.Image]
    latents: Tensor
    error: Tensor
    vae_error: Tensor
    latent_error: Tensor


class InversionPipeline(stock.StockPipeline):
    """DDIM inversion in both time conventions, with ReNoise's fixed-point steps (Garibi et al., arXiv 2403.14602).

    All arithmetic of the schedule is in fp32, whatever the networks compute in.
    """

    @cached_property
    def factor(self) -> int:
        """Pixels a side of one of the VAE's latents."""
        return int(2 ** (len(self.vae.config.block_out_channels) - 1))

    @cached_property
    def processor(self) -> VaeImageProcessor:
        """Pictures to pixels and back."""
        return VaeImageProcessor(vae_scale_factor=self.factor)

    @cached_property
    def denoiser(self) -> Denoiser:
        """The schedule."""
        return Denoiser.from_config({**self.scheduler.config, "_class_name": type(self.scheduler).__name__})

    @torch.no_grad()
    def invert(
        self,
        image: Images,
        prompt: str | Sequence[str] = "",
        *,
        num_inference_steps: int = 50,
        guidance_scale: float = 1.0,
        negative_prompt: str | Sequence[str] | None = None,
        convention: Literal["target", "source"] = "target",
        renoise: int = 0,
        average: Sequence[int] = (),
    ) -> Tensor:
        """The noise (B, C, h, w), fp32, from which sampling with the same settings gives the pictures back.

        Args:
            image: one or many pictures, or a tensor (B, 3, H, W) in [0, 1]; sides are multiples of the VAE's factor.
            guidance_scale: uncond + w (cond - uncond); 1 is conditional only. Above 1 inversion is less exact.
            convention: ``target`` tells the network the level entered, ``source`` the level left (diffusers <= 0.21).
            renoise: repetitions of each step at the point just reached; helps with ``target`` only.
            average: which of the estimates 0..renoise are averaged; none: the last one moves.

        Raises:
            UserError: another number of prompts than of pictures, or sides that do not fit.
        """
        x0 = self._encode(self._pixels(image))
        predict = self._predictor(prompt, negative_prompt, guidance_scale, x0)
        return self.denoiser.invert(
            predict, x0, num_inference_steps, convention, renoise=renoise, average=tuple(average)
        )

    @torch.no_grad()
    def __call__(
        self,
        image: Images,
        prompt: str | Sequence[str] = "",
        *,
        num_inference_steps: int = 50,
        guidance_scale: float = 1.0,
        negative_prompt: str | Sequence[str] | None = None,
        convention: Literal["target", "source"] = "target",
        renoise: int = 0,
        average: Sequence[int] = (),
        edit_prompt: str | Sequence[str] | None = None,
    ) -> InversionOutput:
        """Invert (see :meth:`invert`) and sample back, with ``edit_prompt`` in the place of the prompt where given.

        The errors then measure the edit too."""
        pixels = self._pixels(image)
        x0 = self._encode(pixels)
        predict = self._predictor(prompt, negative_prompt, guidance_scale, x0)
        noise = self.denoiser.invert(
            predict, x0, num_inference_steps, convention, renoise=renoise, average=tuple(average)
        )
        if edit_prompt is not None:
            predict = self._predictor(edit_prompt, negative_prompt, guidance_scale, x0)
        times = self.denoiser.inversion_grid(num_inference_steps, convention)[0].flip(0)
        found = self.denoiser.sample(predict, noise, times)
        decoded = self._decode(found)
        return InversionOutput(
            images=self.processor.postprocess(decoded),
            latents=noise,
            error=_distance(decoded / 2, pixels / 2),
            vae_error=_distance(self._decode(x0) / 2, pixels / 2),
            latent_error=_distance(found, x0),
        )

    # -- inside -------------------------------------------------------------------------------------------------------

    def _pixels(self, image: Images) -> Tensor:
        """(B, 3, H, W) in [-1, 1], fp32, on the device."""
        pictures = [image] if isinstance(image, Image.Image) else image if isinstance(image, Tensor) else list(image)
        if isinstance(pictures, list):
            if not pictures:
                raise UserError("no picture is given to be inverted")
            if len({picture.size for picture in pictures}) > 1:
                raise UserError("pictures of one call must have the same size; give them in several calls")
        first = pictures[0]
        sides = first.size if isinstance(first, Image.Image) else (first.shape[-1], first.shape[-2])
        if any(side % self.factor for side in sides):
            raise UserError(
                f"a picture of {sides[0]} x {sides[1]}: both sides must be multiples of {self.factor}; resize it"
            )
        pixels: Tensor = self.processor.preprocess(pictures)
        return pixels.to(self._execution_device, torch.float32)

    def _encode(self, pixels: Tensor) -> Tensor:
        posterior = self.vae.encode(pixels.to(self.vae.dtype)).latent_dist
        return (posterior.mean.float() - self._shift) * self.vae.config.scaling_factor

    def _decode(self, latents: Tensor) -> Tensor:
        raw = latents / self.vae.config.scaling_factor + self._shift
        return self.vae.decode(raw.to(self.vae.dtype)).sample.float().clamp(-1, 1)

    @property
    def _shift(self) -> float:
        return float(getattr(self.vae.config, "shift_factor", None) or 0.0)

    def _predictor(
        self, prompt: str | Sequence[str], negative: str | Sequence[str] | None, guidance: float, x0: Tensor
    ) -> Any:
        """(x (B, C, h, w), t (B,)) -> the network's own prediction under guidance."""
        prompts = [prompt] * len(x0) if isinstance(prompt, str) else list(prompt)
        if len(prompts) != len(x0):
            raise UserError(f"{len(x0)} pictures but {len(prompts)} prompts; give one prompt a picture, or one for all")
        if negative is not None:
            negative = [negative] * len(x0) if isinstance(negative, str) else list(negative)
        guided = guidance != 1.0
        embeds, added = self._text(prompts, negative, guided, x0)
        dtype = self.unet.dtype

        def predict(x: Tensor, t: Tensor) -> Tensor:
            n = 2 if guided else 1
            output = self.unet(
                x.repeat(n, 1, 1, 1).to(dtype),
                t.repeat(n),
                encoder_hidden_states=embeds,
                added_cond_kwargs=added,
            ).sample.float()
            if not guided:
                return output
            uncond, cond = output.chunk(2)
            return guide(cond, uncond, guidance)

        return predict

    def _text(
        self, prompts: list[str], negative: list[str] | None, guided: bool, x0: Tensor
    ) -> tuple[Tensor, dict[str, Tensor] | None]:
        """Embeddings, unconditional branch first, encoded as the family's own pipeline does it."""
        pipe: Any = self.stock
        device = self._execution_device
        if self.text_encoder_2 is None:
            cond, uncond = pipe.encode_prompt(prompts, device, 1, guided, negative)
            return torch.cat([uncond, cond]) if guided else cond, None
        cond, uncond, pooled, plain_pooled = pipe.encode_prompt(
            prompts, device=device, do_classifier_free_guidance=guided, negative_prompt=negative
        )
        height, width = (side * self.factor for side in x0.shape[-2:])
        ids = torch.tensor([[height, width, 0, 0, height, width]], dtype=cond.dtype, device=device)
        if guided:
            cond, pooled = torch.cat([uncond, cond]), torch.cat([plain_pooled, pooled])
        return cond, {"text_embeds": pooled, "time_ids": ids.expand(len(cond), -1)}


def _distance(a: Tensor, b: Tensor) -> Tensor:
    """Root mean square difference, one number a sample (B,), on the CPU."""
    return (a - b).square().mean((1, 2, 3)).sqrt().cpu()
