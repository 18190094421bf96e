"""Few-step students as they were distilled: a diffusers pipeline for SD1.x, SD2.x and SDXL that reads the sampler which
is recorded beside the weights (scheduler, exact times, first noise, no guidance), so that the right steps are default.

Also usable as ``custom_pipeline``, with a student's LoRA or a whole student:

    pipe = DiffusionPipeline.from_pretrained("stabilityai/stable-diffusion-xl-base-1.0",
                                             custom_pipeline="diffalign/pipelines/few_step.py", trust_remote_code=True)
    pipe.load_student("runs/sdxl-tdm")
    pipe("a cat").images[0]                    # the recorded times, no guidance
    pipe("a cat", base_first=1).images[0]      # the first step by the base, for its diversity

All drawing is done by diffusers' own pipeline of the family; a student of others is given its record by hand:
``pipe.record = student_record(pipe.scheduler.config, [999, 749, 499, 249])``.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    SchedulerMixin,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)

from diffalign.errors import UserError
from diffalign.facts import SamplingRecord, recorded, student_record
from diffalign.families.guidance import embedding_width, remove_embedding
from diffalign.families.lora import find_lora, load_lora
from diffalign.families.schedulers import recorded_scheduler
from diffalign.pipelines.spec import BASE_GUIDANCE, BASE_STEPS, allowed_guidance

ADAPTERS = ("student", "student-again")  # the one not in use is loaded next


class FewStepPipeline(DiffusionPipeline):
    """Samples a few-step student as its record says; see the module's text.

    ``base_unet``: the teacher, where the student is no adapter and the base shall make the first steps.
    """

    _optional_components = [  # noqa: RUF012 - diffusers reads a list
        "text_encoder_2",
        "tokenizer_2",
        "base_unet",
        "safety_checker",
        "feature_extractor",
        "image_encoder",
    ]
    model_cpu_offload_seq = "text_encoder->text_encoder_2->base_unet->unet->vae"

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: Any,
        tokenizer: Any,
        unet: UNet2DConditionModel,
        scheduler: SchedulerMixin,
        text_encoder_2: Any = None,
        tokenizer_2: Any = None,
        base_unet: UNet2DConditionModel | None = None,
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
            base_unet=base_unet,
            safety_checker=None,
            feature_extractor=feature_extractor,
            image_encoder=image_encoder,
        )
        self.register_to_config(force_zeros_for_empty_prompt=force_zeros_for_empty_prompt)
        self._record: SamplingRecord | None = None
        self._weight = 1.0  # of the loaded student
        self._given = False  # whether a student brought the guidance embedding

    @classmethod
    def of(cls, pipe: DiffusionPipeline, record: SamplingRecord, base_unet: Any = None) -> FewStepPipeline:
        """From an opened pipeline, which shares its networks, and a record."""
        names = ("vae", "text_encoder", "tokenizer", "unet", "scheduler", "text_encoder_2", "tokenizer_2")
        zeros = bool(pipe.config.get("force_zeros_for_empty_prompt", True))
        parts: dict[str, Any] = {name: getattr(pipe, name, None) for name in names}
        made = cls(**parts, base_unet=base_unet, force_zeros_for_empty_prompt=zeros)
        made.record = record
        return made

    @property
    def record(self) -> SamplingRecord:
        """How the student is sampled: as was set or loaded, else what lies beside the opened weights.

        Raises UserError where nothing is recorded."""
        if self._record is None:
            source = str(self.config.get("_name_or_path") or "")
            self._record = recorded(source) if source else None
            if self._record is None:
                raise UserError(
                    f"'{source or 'this pipeline'}' records no few-step sampler; load a student with "
                    "load_student(...), or set pipe.record"
                )
        return self._record

    @record.setter
    def record(self, record: SamplingRecord) -> None:
        self._record = record

    def load_student(self, path: str, weight: float = 1.0) -> FewStepPipeline:
        """A student's LoRA (file, folder, run's folder or hub id) at ``weight``, with its record, in the place of the
        one that was loaded before; returns the pipeline.

        Raises UserError when it is no LoRA that fits this base, or records no sampler; the one before stays."""
        record = recorded(path)
        if record is None:
            raise UserError(f"'{path}' records no few-step sampler; is it a student that diffalign distilled?")
        record.check_base(self.scheduler.config, path)
        stock, told = self.stock, embedding_width(self.unet)
        before = [name for name in ADAPTERS if name in getattr(self.unet, "peft_config", {})]
        name = next(name for name in ADAPTERS if name not in before)
        weights = self._weight
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`")  # the one before, which goes
            warnings.filterwarnings("ignore", "Adapter .* was active which is now deleted")
            try:
                load_lora(stock, find_lora(path), name)
            except UserError:
                if before:
                    stock.set_adapters(before, [weights])
                stock.delete_adapters([name])
                self._tell(told)
                raise
        stock.set_adapters([name], [weight])
        stock.delete_adapters(before)
        self._given = self._given or embedding_width(self.unet) > told
        if self._given and record.told is None:
            self._tell(0)  # the one before was told its guidance, and this one is not
        self._weight = weight
        self.record = record
        return self

    def _tell(self, width: int) -> None:
        """Takes the guidance embedding away that a student brought, where the U-Net is to have none (``width`` 0)."""
        if embedding_width(self.unet) > width:
            remove_embedding(self.unet)
            self._given = False

    @property
    def stock(self) -> DiffusionPipeline:
        """diffusers' own pipeline of this family over the same networks."""
        parts = {n: getattr(self, n) for n in ("vae", "text_encoder", "tokenizer", "unet", "scheduler")}
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

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        base_first: int = 0,
        base_steps: int = BASE_STEPS,
        base_guidance: float = BASE_GUIDANCE,
        **options: Any,
    ) -> Any:
        """Draws, and returns what the family's own pipeline returns (``.images``).

        Args:
            num_inference_steps: fewer than are recorded pick evenly among the recorded times.
            guidance_scale: above 1 it is ignored, with a warning, for a student that takes none.
            base_first: so many of the student's first steps are made by the base instead (diversity distillation,
                Gandikota and Bau): DDIM from the first noise down to the student's next time.
            base_steps: of the base over the whole schedule, of which it takes those above that time.
            base_guidance: of the base alone.
            options: any other argument of the family's pipeline; ``latents`` are unit noise.

        Raises:
            UserError: more steps than are recorded, no base for ``base_first``.
        """
        record = self.record
        call = record.call(num_inference_steps, allowed_guidance(record, guidance_scale))
        times: list[int] = call.get("timesteps") or []
        stock = self.stock
        if base_first:
            first = self._base(
                stock, times, base_first, base_steps, prompt, {**options, "guidance_scale": base_guidance}
            )
            if base_first == len(times):
                return first
            call["timesteps"] = times[base_first:]
            call["num_inference_steps"] = len(call["timesteps"])
            options["latents"] = first
            record = record.model_copy(update={"scale": 1.0})  # the base's latents have their size already
        stock.scheduler = recorded_scheduler(record)
        drawn = stock(prompt, **{**call, **options})
        self.maybe_free_model_hooks()
        return drawn

    def _base(
        self,
        stock: Any,
        times: Sequence[int],
        count: int,
        steps: int,
        prompt: str | Sequence[str] | None,
        options: dict[str, Any],
    ) -> Any:
        """Latents at the student's time number ``count``, by the base; its finished pictures after the last one."""
        if not 0 < count <= len(times):
            raise UserError(f"base_first {count} must lie between 0 and the student's {len(times)} recorded times")
        total = int(self.record.config.get("num_train_timesteps", 1000))
        if not 1 <= steps <= total:
            raise UserError(f"base_steps must lie between 1 and {total}, not {steps}")
        grid = [round(total - k * total / steps) - 1 for k in range(steps)]
        whole = count == len(times)
        reached = grid if whole else [*(t for t in grid if t > times[count]), times[count]]
        plan = student_record(self.record.config, reached, renoise=False)
        stock.scheduler = recorded_scheduler(plan)
        stop = {} if whole else {"output_type": "latent", "callback_on_step_end": _stopper(len(reached) - 1)}
        with self._as_base(stock):
            drawn = stock(prompt, **{**options, **stop, "timesteps": reached, "num_inference_steps": len(reached)})
        return drawn if whole else drawn.images

    @contextmanager
    def _as_base(self, stock: Any) -> Iterator[None]:
        """The base's weights in the pipeline for a while: another network, or the student's adapters off."""
        if self.base_unet is not None:
            stock.unet = self.base_unet
            try:
                yield
            finally:
                stock.unet = self.unet
            return
        if embedding_width(self.unet):
            raise UserError("this student is told its guidance, which its base is not: base_first needs base_unet=...")
        if not getattr(self.unet, "_hf_peft_config_loaded", False):
            raise UserError("this student is merged into its base: give the base as base_unet=... for base_first")
        self.unet.disable_adapters()
        try:
            yield
        finally:
            self.unet.enable_adapters()


def _stopper(last: int) -> Any:
    """Ends a pipeline's loop after ``last`` steps: the next latents are reached, the next network call is another's."""

    def stop(pipe: Any, step: int, time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = step + 1 >= last
        return tensors

    return stop
