"""What our pipelines for SD1.x, SD2.x and SDXL share: the components of either family, and diffusers' own pipeline.

A file given as ``custom_pipeline`` may name one pipeline class alone, so that it imports this module, not the class.
"""

from __future__ import annotations

from typing import Any, Self

from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    SchedulerMixin,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)

PARTS = ("vae", "text_encoder", "tokenizer", "unet", "scheduler", "text_encoder_2", "tokenizer_2")


class StockPipeline(DiffusionPipeline):
    """Components of SD1.x and SD2.x, or with the second text encoder those of SDXL."""

    _optional_components = [  # noqa: RUF012 - diffusers reads a list
        "text_encoder_2",
        "tokenizer_2",
        "safety_checker",
        "feature_extractor",
        "image_encoder",
    ]
    model_cpu_offload_seq = "text_encoder->text_encoder_2->unet->vae"

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: Any,
        tokenizer: Any,
        unet: UNet2DConditionModel,
        scheduler: SchedulerMixin,
        text_encoder_2: Any = None,
        tokenizer_2: Any = None,
        safety_checker: Any = None,
        feature_extractor: Any = None,
        image_encoder: Any = None,
        force_zeros_for_empty_prompt: bool = True,
        requires_safety_checker: bool = False,
    ) -> None:
        super().__init__()
        self.register_modules(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=unet,
            scheduler=scheduler,
            text_encoder_2=text_encoder_2,
            tokenizer_2=tokenizer_2,
            safety_checker=None,
            feature_extractor=feature_extractor,
            image_encoder=image_encoder,
        )
        self.register_to_config(force_zeros_for_empty_prompt=force_zeros_for_empty_prompt)

    @classmethod
    def of(cls, pipe: DiffusionPipeline) -> Self:
        """From an opened pipeline, which shares its networks."""
        zeros = bool(pipe.config.get("force_zeros_for_empty_prompt", True))
        parts: dict[str, Any] = {name: getattr(pipe, name, None) for name in PARTS}
        return cls(**parts, force_zeros_for_empty_prompt=zeros)

    @property
    def stock(self) -> DiffusionPipeline:
        """diffusers' own pipeline of this family over the same networks."""
        parts = {name: getattr(self, name) for name in PARTS[:5]}
        if self.text_encoder_2 is None:
            made: Any = StableDiffusionPipeline(
                **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
            )
        else:
            made = StableDiffusionXLPipeline(
                **parts,
                text_encoder_2=self.text_encoder_2,
                tokenizer_2=self.tokenizer_2,
                force_zeros_for_empty_prompt=self.config.force_zeros_for_empty_prompt,
                add_watermarker=False,
            )
        made.set_progress_bar_config(**getattr(self, "_progress_bar_config", {}))
        return made
