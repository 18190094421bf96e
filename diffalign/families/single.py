"""Checkpoints of one file in the original layout: recognised by names and shapes, converted once into a folder.

The conversion is diffusers' own ``from_single_file``, offline: the configs are the family's known ones, or those of
``model.config``. The folder lies in the cache, so that everything else sees an ordinary model.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import pickle
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..data.files import default_root
from ..errors import RunError, UserError
from .folder import Config, ModelFolder, builtin_models, check_safetensors
from .known import KNOWN, SCHEDULE

CODE = "1"  # to be raised whenever the same file would give another folder
SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
UNET, VAE, XL = "model.diffusion_model.", "first_stage_model.", "conditioner.embedders."
DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float32}
PIPELINES = {"sd1": "StableDiffusionPipeline", "sd2": "StableDiffusionPipeline", "sdxl": "StableDiffusionXLPipeline"}
SCHEDULERS: dict[str, tuple[str, Config]] = {
    "sd1": ("PNDMScheduler", {"skip_prk_steps": True}),
    "sd2": ("DDIMScheduler", {"clip_sample": False}),
    "sdxl": ("EulerDiscreteScheduler", {}),
}
NAMES = {"sd1": "SD1.x", "sd2": "SD2.x", "sdxl": "SDXL"}


@dataclass(frozen=True)
class SingleFile:
    """A checkpoint file: where it is, of which family, its number format, and what its marker tensors say."""

    path: Path
    family: str
    dtype: torch.dtype
    prediction: str | None
    zero_snr: bool
    config: str | None


def read_shapes(file: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and number format of each tensor, without reading the tensors.

    Raises UserError for a damaged file, and for a pickle that holds more than tensors."""
    if file.suffix == ".safetensors":
        from safetensors import safe_open

        check_safetensors(file)
        with safe_open(file, framework="pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 - not a dict
            return {name: (tuple(s.get_shape()), str(s.get_dtype())) for name, s in slices.items()}
    try:
        state = torch.load(file, map_location="meta", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, ValueError, OSError, EOFError, KeyError) as error:
        raise UserError(
            f"model '{file}' is a pickle that torch does not load safely (weights_only); convert it to .safetensors"
        ) from error
    while isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    short = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.float64: "F64"}
    tensors = {str(k): v for k, v in state.items() if isinstance(v, torch.Tensor)} if isinstance(state, dict) else {}
    return {name: (tuple(t.shape), short.get(t.dtype, str(t.dtype))) for name, t in tensors.items()}


def recognise(file: Path, config: str | None = None) -> SingleFile:
    """What a checkpoint file is, from the names and shapes of its tensors.

    Raises UserError, in one line, for what is no complete SD1.x, SD2.x or SDXL text-to-image checkpoint."""
    if file.suffix not in SUFFIXES:
        raise UserError(f"model '{file}' is a {file.suffix or 'nameless'} file; give a .safetensors file or a folder")
    shapes = read_shapes(file)
    first = shapes.get(f"{UNET}input_blocks.0.0.weight")
    if first is None:
        raise UserError(f"model '{file}' {_what_else(shapes)}")
    if first[0][1] != 4:
        raise UserError(
            f"model '{file}' takes {first[0][1]} input channels (9 inpainting, 8 editing); give the text-to-image base"
        )
    if any(name.startswith("edm_") for name in shapes):
        raise UserError(f"model '{file}' is an EDM model; its parametrisation is not supported")
    if any(name.startswith(XL) for name in shapes):
        family, text = "sdxl", f"{XL}1.model."
        if not any(name.startswith(text) for name in shapes):
            raise UserError(f"model '{file}' is an SDXL refiner; give the SDXL base model")
    elif any(name.startswith("cond_stage_model.model.") for name in shapes):
        family, text = "sd2", "cond_stage_model.model."
    else:
        family, text = "sd1", "cond_stage_model.transformer."
    for prefix, part in ((text, "text encoder"), (VAE, "VAE")):
        if not any(name.startswith(prefix) for name in shapes):
            raise UserError(f"model '{file}' has no {part} in it; give the full checkpoint or a folder")
    if first[1] not in DTYPES:
        raise UserError(f"model '{file}' is stored as {first[1]}, too coarse to train from; give the fp16 or fp32 file")
    prediction = "v_prediction" if "v_pred" in shapes else "epsilon" if family != "sd2" else None
    return SingleFile(file, family, DTYPES[first[1]], prediction, "ztsnr" in shapes, config)


def _what_else(shapes: Mapping[str, object]) -> str:
    names = list(shapes)
    if any("lora" in name for name in names):
        return "is a LoRA, not a model; give its base and name the file in model.loras"
    if any(name.startswith(("encoder.", VAE)) for name in names):
        return "is a VAE alone; give it as model.vae"
    if any("joint_blocks." in name or "double_blocks." in name for name in names):
        return "is a transformer (SD3, FLUX and their like); only Stable Diffusion U-Nets are trained"
    if any(name.startswith("down_blocks.") for name in names):
        return "is one network of a diffusers folder; give the folder that holds model_index.json"
    return "is no Stable Diffusion checkpoint in the original layout"


def open_single(single: SingleFile) -> ModelFolder:
    """The model as its configs describe it; `convert` makes the folder.

    Raises UserError when ``model.config`` is no folder of the same family."""
    from .folder import identify, open_folder

    if single.config is None:
        index, unet, scheduler = known_index(single.family), _unet_config(single.family), _scheduler(single)
        return ModelFolder(str(single.path), single.path, index, unet, scheduler, single=single)
    if not Path(single.config).expanduser().is_dir() and single.config not in builtin_models():
        raise UserError(
            f"model.config '{single.config}' is no folder; give a model folder with the configs of this file"
        )
    given = open_folder(single.config)
    family = identify(given)
    if family != single.family:
        raise UserError(f"model.config '{single.config}' is {family}, and '{single.path}' is {single.family}")
    return ModelFolder(str(single.path), given.path, given.index, given.unet, given.scheduler, single=single)


def known_index(family: str) -> Config:
    """model_index.json of a family's base model."""
    from diffusers import __version__

    index: Config = {"_class_name": PIPELINES[family], "_diffusers_version": __version__}
    index |= {part: ["diffusers" if "CLIP" not in kind else "transformers", kind] for part, (kind, _) in _parts(family)}
    index |= {"scheduler": ["diffusers", SCHEDULERS[family][0]], "tokenizer": ["transformers", "CLIPTokenizer"]}
    if family == "sdxl":
        return index | {"tokenizer_2": ["transformers", "CLIPTokenizer"], "force_zeros_for_empty_prompt": True}
    return index | {"safety_checker": [None, None], "feature_extractor": [None, None], "requires_safety_checker": False}


def _parts(family: str) -> list[tuple[str, tuple[str, Config]]]:
    return list(KNOWN[family].networks.items())


def _unet_config(family: str) -> Config:
    kind, config = KNOWN[family].networks["unet"]
    return {"_class_name": kind, **config}


def _scheduler(single: SingleFile) -> Config:
    name, options = SCHEDULERS[single.family]
    told = {"prediction_type": single.prediction or "v_prediction"}
    return {
        "_class_name": name,
        **SCHEDULE,
        **options,
        **told,
        **({"rescale_betas_zero_snr": True} if single.zero_snr else {}),
    }


def clip_tokenizer(pad: str) -> Any:
    """The tokenizer of every CLIP text encoder, from its published merges (MIT); SD2 and SDXL's second pad with "!"."""
    from transformers import CLIPTokenizer

    packed = resources.files(__package__ or "").joinpath("clip_merges.txt.gz").read_bytes()
    merges = gzip.decompress(packed).decode().splitlines()
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    symbols = [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    start, end = "<|startoftext|>", "<|endoftext|>"
    tokens = [*symbols, *(s + "</w>" for s in symbols), *("".join(m.split()) for m in merges), start, end]
    return CLIPTokenizer(
        vocab={token: i for i, token in enumerate(tokens)},
        merges=[tuple(m.split()) for m in merges],
        bos_token=start,
        eos_token=end,
        unk_token=end,
        pad_token=pad,
        model_max_length=77,
    )


def write_configs(folder: Path, single: SingleFile) -> None:
    """A model folder of the family's base without its weights."""
    family = single.family
    networks = {part: {"_class_name": kind, **config} for part, (kind, config) in _parts(family)}
    for part, config in networks.items():
        (folder / part).mkdir(parents=True)
        if part.startswith("text_encoder"):
            config = {"model_type": "clip_text_model", "architectures": [config.pop("_class_name")], **config}
        (folder / part / "config.json").write_text(json.dumps(config))
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(_scheduler(single)))
    clip_tokenizer("!" if family == "sd2" else "<|endoftext|>").save_pretrained(folder / "tokenizer")
    if family == "sdxl":
        clip_tokenizer("!").save_pretrained(folder / "tokenizer_2")
    (folder / "model_index.json").write_text(json.dumps(known_index(family)))


def convert(single: SingleFile) -> Path:
    """The diffusers folder of a checkpoint file, made once and kept under ``models/`` in the cache.

    Raises UserError when the file does not fit its family's (or ``model.config``'s) networks, RunError when the folder
    cannot be written."""
    return _kept(single.path, f"{single.config}", lambda folder: _convert(single, folder))


def convert_vae(file: Path, config: Path) -> Path:
    """The folder of a VAE file in the original layout. ``config``: folder of a VAE of the same make."""

    def make(folder: Path) -> None:
        from diffusers import AutoencoderKL

        from .base import DTYPE

        _, stored = next(iter(read_shapes(file).values()), ((), "F32"))
        with _quiet(), _explained(file, "a VAE of another make than this model's"):
            options: dict[str, Any] = {DTYPE: DTYPES.get(stored, torch.float32)}
            vae = AutoencoderKL.from_single_file(str(file), config=str(config), local_files_only=True, **options)
            vae.save_pretrained(folder)

    return _kept(file, str(config), make)


def _kept(file: Path, config: str, make: Callable[[Path], None]) -> Path:
    from filelock import FileLock

    stat = file.stat()
    key = hashlib.sha256(f"{file.resolve()} {stat.st_size} {stat.st_mtime_ns} {config} {CODE}".encode()).hexdigest()
    target = default_root() / "models" / f"{file.stem}-{key[:16]}"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{target}.lock"):  # processes of one run ask together
            if not target.is_dir():
                partial = target.with_name(f".{target.name}.partial")
                shutil.rmtree(partial, ignore_errors=True)
                make(partial)
                os.replace(partial, target)
    except OSError as error:
        raise RunError(
            f"'{file}' cannot be converted into '{target.parent}': {error.strerror or error}; free some space or set "
            "DIFFALIGN_CACHE to another folder"
        ) from error
    return target


@contextmanager
def _explained(file: Path, guess: str) -> Iterator[None]:
    """Turns what diffusers raises for a file that does not fit into one line."""
    try:
        yield
    except (ValueError, RuntimeError, KeyError, TypeError, IndexError, AttributeError) as error:
        reason = " ".join(str(error).split())[:160]
        if "meta tensor" in reason:  # a weight that nothing was loaded into
            raise UserError(f"'{file}' lacks some of its tensors; download it again") from error
        raise UserError(f"'{file}' cannot be read: it may be {guess} ({reason})") from error


def _convert(single: SingleFile, folder: Path) -> None:
    import diffusers

    from .base import DTYPE

    guess = f"of other sizes than {NAMES[single.family]}'s base; set model.config to a folder of the same sizes"
    with tempfile.TemporaryDirectory() as place, _quiet():
        configs = Path(place)
        if single.config is None:
            write_configs(configs, single)
        else:
            configs = open_single(single).path
        kind = getattr(diffusers, PIPELINES[single.family])
        with _explained(single.path, guess):
            options: dict[str, Any] = {DTYPE: single.dtype}
            pipeline = kind.from_single_file(str(single.path), config=str(configs), local_files_only=True, **options)
            if single.prediction is None and single.config is None and predicts_noise(pipeline):
                pipeline.scheduler.register_to_config(prediction_type="epsilon")
            pipeline.save_pretrained(folder)


@contextmanager
def _quiet() -> Iterator[None]:
    """Neither bars nor diffusers' remarks on casting; what fails is raised."""
    from diffusers.utils import logging as remarks
    from transformers.utils import logging as bars

    shown, level = (remarks.is_progress_bar_enabled(), bars.is_progress_bar_enabled()), remarks.get_verbosity()
    remarks.disable_progress_bar()
    bars.disable_progress_bar()
    remarks.set_verbosity_error()
    try:
        yield
    finally:
        remarks.set_verbosity(level)
        if shown[0]:
            remarks.enable_progress_bar()
        if shown[1]:
            bars.enable_progress_bar()


@torch.no_grad()
def predicts_noise(pipeline: Any) -> bool:
    """Whether a U-Net predicts noise rather than v; an SD2 file does not say it.

    At the last time step the noisy latents are nearly all noise, so a prediction of noise is nearly its input, while v
    is nearly the negative of clean latents that nothing is known of."""
    unet = pipeline.unet
    dtype, side = unet.dtype, min(32, int(unet.config.sample_size))
    nn.Module.to(unet, torch.float32)
    noise = torch.randn(1, 4, side, side, generator=torch.Generator().manual_seed(0))
    text = torch.zeros(1, 77, unet.config.cross_attention_dim)
    output = unet(noise, pipeline.scheduler.config.num_train_timesteps - 1, encoder_hidden_states=text).sample
    nn.Module.to(unet, dtype)
    return bool(torch.cosine_similarity(output.flatten(), noise.flatten(), dim=0) > 0.5)
