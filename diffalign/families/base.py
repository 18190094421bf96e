"""A loaded base model and what every family does alike; a family overrides what differs (DESIGN 4)."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import diffusers
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, ModelMixin, UNet2DConditionModel
from packaging import version
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

from ..data.batch import Cond
from ..errors import UserError
from ..recipe import LoraFile
from .folder import ModelFolder
from .guidance import EMBEDDING, PROJECTION, embedding_width
from .lora import fuse_loras
from .schedulers import make_scheduler
from .segments import count_tokens, encode_segments, towers_of
from .targets import lora_targets
from .text import overflow

if TYPE_CHECKING:
    from ..denoiser import Denoiser


# diffusers renamed the argument as transformers had done before.
DTYPE = "dtype" if version.parse(diffusers.__version__) >= version.parse("0.42") else "torch_dtype"

PIXELS = 1 << 20  # that pass through the VAE together


class Model:
    """A frozen base: U-Net in ``dtype``, VAE and text encoder in fp32, all on ``device``, in eval mode.

    VAE and text encoder stay fp32 because their outputs are cached once and used thousands of times;
    ``model.vae_dtype`` lowers the VAE. ``zero_uncond``: the unconditional branch is zeros, no encoded empty prompt.
    """

    zero_uncond: bool = False
    long_prompts: int | None = None  # places of text, where prompts are encoded by segments

    family: ClassVar[str]
    pipeline_class: ClassVar[type[DiffusionPipeline]]

    def __init__(
        self,
        folder: ModelFolder,
        unet: UNet2DConditionModel,
        vae: AutoencoderKL,
        text_encoder: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.folder = folder
        self.source = folder.source
        self.unet = unet
        self.vae = vae
        self.text_encoder = text_encoder
        self.tokenizer = tokenizer
        self.scheduler_config: dict[str, Any] = dict(folder.scheduler)
        self.device = device
        self.dtype = dtype
        self.offload = False  # encoders are on the device one kind at a time
        self.kept: tuple[nn.Module, ...] = ()  # encoders that a method calls while it trains: they never leave
        self.fused: list[str] = []  # hash and scale of each LoRA fused into this base
        self._uncond: Cond | None = None
        for module in (unet, vae, text_encoder):
            module.requires_grad_(False).eval()

    @classmethod
    def load(cls, folder: ModelFolder, unet_dtype: torch.dtype, device: torch.device, dtype: torch.dtype) -> Model:
        """The networks of a folder, on the CPU: U-Net in ``unet_dtype``, the others fp32. ``device`` and ``dtype`` are
        where and what the U-Net will be when the caller has placed it."""
        raise TypeError(f"{cls.__name__} cannot be loaded")

    # -- text ---------------------------------------------------------------------------------------------------------

    def encode_prompts(self, prompts: Sequence[str], batch: int = 64) -> Cond:
        """Text conditioning (B, L, D) in fp32 on the device; longer prompts are cut (see `token_overflow`), or, with
        ``long_prompts``, encoded by segments to that L (`families.segments`)."""
        raise TypeError(f"{type(self).__name__} has no text encoding")

    def by_segments(self, prompts: Sequence[str], batch: int) -> Cond:
        """``encode_prompts`` with ``long_prompts``."""
        assert self.long_prompts is not None
        found = encode_segments(towers_of(self), prompts, self.long_prompts, batch)
        return found.to(self.device, torch.float32)

    def uncond(self, n: int = 1) -> Cond:
        """The unconditional branch of guidance for n samples: the empty prompt, as the base pipeline makes it."""
        if self._uncond is None:
            self._uncond = self.encode_prompts([""])
        return self._uncond.expand(n)

    def token_overflow(self, prompts: Sequence[str]) -> list[int]:
        """Tokens that each prompt loses to the encoder's limit (77 with start and end for CLIP); 0 = it fits."""
        if self.long_prompts:
            towers = towers_of(self)
            return [max(0, count_tokens(towers, text) - self.long_prompts) for text in prompts]
        return overflow(self.tokenizer, prompts)

    def sized(self, cond: Cond, height: int, width: int) -> Cond:
        """The conditioning for whole pictures of this size in pixels, as the pipeline tells it; SDXL alone takes it."""
        sizes = torch.tensor([[height, width, 0, 0, height, width]], dtype=torch.float32, device=cond.embeds.device)
        return cond.sized(sizes.expand(len(cond), -1))

    # -- latents ------------------------------------------------------------------------------------------------------

    @property
    def factor(self) -> int:
        """Pixels per latent along a side (8 for SD1.x)."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def default_resolution(self) -> int:
        """The side in pixels that the U-Net was trained on (512 for SD1.5)."""
        return int(self.unet.config.sample_size) * self.factor

    def latent_size(self, height: int, width: int) -> tuple[int, int]:
        """(h, w) of the latents; UserError when a side is no positive multiple of `factor`."""
        for name, side in (("height", height), ("width", width)):
            if side <= 0 or side % self.factor:
                raise UserError(f"{name} {side} is not a multiple of {self.factor}, the VAE's factor")
        return height // self.factor, width // self.factor

    @staticmethod
    def at_once(height: int, width: int) -> int:
        """Pictures of this size that pass through the VAE together: its memory grows with pixels (3 GiB in fp32 to
        decode one of 1024 x 1024)."""
        return max(1, PIXELS // (height * width))

    @torch.no_grad()
    def encode_images(self, pixels: Tensor, batch: int = 8) -> tuple[Tensor, Tensor]:
        """Pixels (B, 3, H, W) in [-1, 1] -> mean and std (B, C, h, w) of the posterior in scaled latents, fp32.

        The scaled latent z has z = (encoder output - shift) * scaling_factor; a sample is mean + std * normal."""
        self.latent_size(pixels.shape[-2], pixels.shape[-1])
        self.ensure_encoders(self.vae)
        scale, shift = self._scaling()
        means, stds = [], []
        for part in pixels.split(min(batch, self.at_once(*pixels.shape[-2:]))):
            posterior = self.vae.encode(part.to(self.device, self.vae.dtype)).latent_dist
            means.append((posterior.mean.float() - shift) * scale)
            stds.append(posterior.std.float() * scale)
        return torch.cat(means), torch.cat(stds)

    @torch.no_grad()
    def decode(self, latents: Tensor, batch: int = 8) -> Tensor:
        """Scaled latents (B, C, h, w) -> pixels (B, 3, H, W) clamped to [-1, 1], fp32."""
        self.ensure_encoders(self.vae)
        scale, shift = self._scaling()
        parts = [
            self.vae.decode((part.to(self.device) / scale + shift).to(self.vae.dtype)).sample.float().clamp(-1, 1)
            for part in latents.split(min(batch, self.at_once(*(side * self.factor for side in latents.shape[-2:]))))
        ]
        return torch.cat(parts)

    def decode_with_gradient(self, latents: Tensor) -> Tensor:
        """Scaled latents (B, C, h, w) -> pixels (B, 3, H, W) in [0, 1], fp32, all at once and differentiable.

        The VAE must be on the device (see `keep_vae`); autocast is off: its activations overflow fp16."""
        scale, shift = self._scaling()
        with torch.autocast(latents.device.type, enabled=False):
            images = self.vae.decode((latents.float() / scale + shift).to(self.vae.dtype)).sample.float()
        return (images / 2 + 0.5).clamp(0, 1)

    def keep_vae(self, checkpointing: bool = False) -> None:
        """The VAE stays on the device from now on; with ``checkpointing`` its decoder recomputes in the backward."""
        self.kept = (self.vae,)
        self.ensure_encoders(self.vae)
        if checkpointing:
            self.vae.enable_gradient_checkpointing()

    def _scaling(self) -> tuple[float, float]:
        config = self.vae.config
        return float(config.scaling_factor), float(getattr(config, "shift_factor", None) or 0.0)

    # -- the network --------------------------------------------------------------------------------------------------

    def denoiser(self) -> Denoiser:
        """The noise schedule of the model's own scheduler."""
        from ..denoiser import Denoiser

        return Denoiser.from_config(self.scheduler_config)

    def call_unet(self, unet: UNet2DConditionModel, x_t: Tensor, t: Tensor | int, cond: Cond) -> Tensor:
        """One forward of ``unet`` (this model's, or a copy of it): (B, C, h, w) in its own prediction, at least fp32.

        ``x_t`` and the conditioning are cast to the U-Net's weights; ``t`` is (B,) int64 or one int for all."""
        dtype = unet.conv_in.weight.dtype
        text = cond.to(dtype=dtype)
        output = unet(x_t.to(dtype), t, encoder_hidden_states=text.embeds, **self._extra(text)).sample
        return output.to(torch.promote_types(output.dtype, torch.float32))

    def _extra(self, cond: Cond) -> dict[str, Any]:
        """Keyword arguments of the U-Net beyond the text."""
        found: dict[str, Any] = {"added_cond_kwargs": cond.added} if cond.added else {}
        return found | ({EMBEDDING: cond.added[EMBEDDING]} if EMBEDDING in cond.added else {})

    def lora_targets(self, preset: str | Sequence[str]) -> list[str]:
        """Exact names of the layers that carry adapters (see `families.targets.lora_targets`), and the guidance
        embedding's where there is one: nothing else would train it."""
        found = lora_targets(self.unet, preset)
        return found if not embedding_width(self.unet) or PROJECTION in found else [*found, PROJECTION]

    def fuse_loras(self, files: Sequence[LoraFile]) -> None:
        """Adds existing LoRAs to the base weights (U-Net and text encoder), in the given order.

        Raises UserError when a file is absent, damaged or made for another model."""
        if not files:
            return
        self.fused += fuse_loras(self.assemble(unet=self.unet, **self.parts()), files)
        self._uncond = None
        for module in (self.unet, *self.encoders()):
            module.requires_grad_(False)

    def place_unet(self) -> None:
        """The U-Net goes to the device; a quantised one is quantised there."""
        nn.Module.to(self.unet, self.device)

    # -- housekeeping -------------------------------------------------------------------------------------------------

    def encoders(self) -> tuple[nn.Module, ...]:
        """What is needed to encode and decode only."""
        return (self.vae, self.text_encoder)

    def release_encoders(self) -> None:
        """VAE and text encoder leave the device (to the CPU), but for what is kept, and its memory is given back."""
        for module in self.encoders():
            if all(module is not other for other in self.kept):
                module.to("cpu")
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def ensure_encoders(self, *wanted: nn.Module) -> None:
        """VAE and text encoders, or those that are wanted, are on the device; encoding and decoding ask for theirs.

        With ``offload`` only the wanted ones are, and the others leave first."""
        chosen = wanted or (() if self.offload else self.encoders())
        if self.offload and self.device.type != "cpu":
            for module in self.encoders():
                if all(module is not other for other in (*chosen, *self.kept)):
                    module.to("cpu")
        for module in chosen:
            if next(module.parameters()).device.type != self.device.type:
                module.to(self.device)

    def fingerprint(self, *components: str) -> dict[str, str]:
        """sha256 by component (default: unet, vae, text_encoder, tokenizer and their like), computed once.

        Fused LoRAs count: they are named under ``loras``."""
        names = components or tuple(c for c in self.folder.components() if c in self._weighted())
        hashes = {name: self.folder.fingerprint(name) for name in names}
        if self.fused:
            hashes["loras"] = " ".join(self.fused)
        return hashes

    def _weighted(self) -> tuple[str, ...]:
        return ("unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")

    def pipeline(self, scheduler: str | None = None) -> DiffusionPipeline:
        """A plain diffusers pipeline over the live U-Net, adapters included; no safety checker.

        VAE and text encoder are live when ``dtype`` is fp32, else copies in ``dtype`` (a pipeline has one dtype).
        ``scheduler``: a short name (see `families.schedulers`), default the model's own."""
        self.ensure_encoders()
        return self.assemble(scheduler, unet=self.unet, **{k: self._in_dtype(part) for k, part in self.parts().items()})

    def assemble(self, scheduler: str | None = None, **parts: Any) -> DiffusionPipeline:
        """A pipeline of this family from the given networks and tokenizers."""
        made = make_scheduler(scheduler or "default", self.scheduler_config)
        return self.pipeline_class(scheduler=made, **parts, **self._pipeline_options())

    def parts(self) -> dict[str, Any]:
        """The pipeline's components beside U-Net and scheduler."""
        return {"vae": self.vae, "text_encoder": self.text_encoder, "tokenizer": self.tokenizer}

    def _pipeline_options(self) -> Mapping[str, Any]:
        return {}

    def _in_dtype(self, part: Any) -> Any:
        if not isinstance(part, nn.Module) or next(part.parameters()).dtype == self.dtype:
            return part
        return nn.Module.to(copy.deepcopy(part), self.dtype)


def require_parts(folder: ModelFolder, names: Sequence[str]) -> None:
    """UserError when a component of a family is not in the folder."""
    for component in names:
        if component not in folder.components() or not folder.part(component).is_dir():
            raise UserError(f"model '{folder.source}' lacks its {component}/; download the whole folder")


def load_part(kind: type[Any], folder: ModelFolder, component: str, dtype: torch.dtype) -> Any:
    """One network of a model folder, on the CPU in ``dtype``, through its own ``from_pretrained``.

    Pickled weights are read only where no safetensors exist; both libraries then load with weights_only.

    Raises UserError when files are missing or damaged, or the weights do not fit the config."""
    weights = folder.weights(component)
    bars = is_progress_bar_enabled()
    disable_progress_bar()
    try:
        module, info = kind.from_pretrained(
            str(folder.part(component)),
            **{DTYPE if issubclass(kind, ModelMixin) else "dtype": dtype},
            variant=weights.variant,
            use_safetensors=weights.safetensors,
            local_files_only=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"model '{folder.source}': {component} cannot be loaded: {reason}") from error
    finally:
        if bars:
            enable_progress_bar()
    lost = sorted(info["missing_keys"])
    if lost or info.get("mismatched_keys"):
        names = lost or sorted(str(key) for key in info["mismatched_keys"])
        raise UserError(
            f"model '{folder.source}': the weights of {component} do not fit its config, {len(names)} "
            f"tensors are absent or of another shape, such as {names[0]}; download it again"
        )
    return module
