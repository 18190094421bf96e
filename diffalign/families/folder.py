"""Finds a model's folder and reads from its configs what it is, before any weight is loaded."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import facts
from ..errors import UserError, nearest

if TYPE_CHECKING:
    from .single import SingleFile

Config = dict[str, Any]  # the contents of a JSON config

WEIGHTS = re.compile(
    r"^(diffusion_pytorch_model|model|pytorch_model)"
    r"(?:\.(?P<variant>[A-Za-z0-9_]+))?(?:-\d{5}-of-(?P<shards>\d{5}))?(?:\.(?P<late>[A-Za-z0-9_]+))?"
    r"\.(?P<kind>safetensors|bin)$"
)
HUB_ID = re.compile(f"^{facts.HUB_ID}$")


@dataclass(frozen=True)
class Weights:
    """The weight files of one component: all shards of one variant in one format."""

    files: tuple[Path, ...]
    variant: str | None
    safetensors: bool


@dataclass
class ModelFolder:
    """A model in the diffusers layout. ``index``, ``unet`` and ``scheduler`` are its JSON configs; ``replaced`` holds
    the folders of components that come from elsewhere. ``single``: the checkpoint file that `fetch` makes the folder
    of; ``vae``: the name of the VAE that `fetch` puts in place of the model's own."""

    source: str
    path: Path
    index: Config
    unet: Config
    scheduler: Config
    variant: str | None = None
    replaced: dict[str, Path] = field(default_factory=dict)
    single: SingleFile | None = None
    vae: str | None = None
    _hashes: dict[str, str] = field(default_factory=dict)

    def part(self, component: str) -> Path:
        """Where a component lies."""
        return self.replaced.get(component, self.path / component)

    def components(self) -> list[str]:
        """Names of the components that model_index.json gives a class."""
        return [k for k, v in self.index.items() if isinstance(v, list) and len(v) == 2 and v[0] is not None]

    def config(self, component: str, name: str = "config.json") -> Config:
        """The JSON config of a component; UserError when it is absent or no JSON."""
        return read_json(self.part(component) / name, self.source)

    def weights(self, component: str) -> Weights:
        """Weight files of ``component``: the asked variant where it has one, safetensors before pickles.

        Raises UserError when there are none, a shard is missing, or a file is torn."""
        groups: dict[tuple[str | None, bool, int], list[Path]] = {}
        for file in sorted(p for p in self.part(component).glob("*") if p.is_file()):
            match = WEIGHTS.match(file.name)
            if match:
                shards = int(match["shards"] or 0)
                key = (match["variant"] or match["late"], match["kind"] == "safetensors", shards)
                groups.setdefault(key, []).append(file)
        variants = sorted({variant or "none" for variant, _, _ in groups})
        if not groups:
            raise UserError(f"model '{self.source}' has no weights in {component}/; download the folder again")
        wanted = self.variant if any(variant == self.variant for variant, _, _ in groups) else None
        fitting = [key for key in groups if key[0] == wanted]
        if not fitting or (component == "unet" and wanted != self.variant):
            asked = f"has no variant '{self.variant}'" if self.variant else "has no weights without a variant"
            hint = "null" if variants == ["none"] else variants[-1] if variants[-1] != "none" else variants[0]
            raise UserError(
                f"model '{self.source}' {asked} in {component}/; "
                f"present: {', '.join(variants)}: set model.variant={hint}"
            )
        variant, safe, shards = max(fitting, key=lambda key: (key[1], key[2] == 0))
        files = groups[variant, safe, shards]
        if shards and len(files) != shards:
            raise UserError(
                f"model '{self.source}' has {len(files)} of {shards} shards in {component}/; download it again"
            )
        if safe:
            for file in files:
                check_safetensors(file)
        return Weights(tuple(files), variant, safe)

    def fingerprint(self, component: str) -> str:
        """sha256 of a component: of its tensors by name (not of their split into shards) and its config.

        A component without weights (tokenizer, scheduler) is hashed by its files. Computed once."""
        if component not in self._hashes:
            self._hashes[component] = self._hash(component)
        return self._hashes[component]

    def _hash(self, component: str) -> str:
        folder = self.part(component)
        digest = hashlib.sha256()
        if not (folder / "config.json").is_file():
            for file in sorted(p for p in folder.iterdir() if p.is_file()):
                digest.update(file.name.encode() + b"\0" + bytes.fromhex(hash_file(file)))
            return digest.hexdigest()
        config = {k: v for k, v in self.config(component).items() if not k.startswith("_")}
        digest.update(json.dumps(config, sort_keys=True).encode())
        weights = self.weights(component)
        hashes = hash_tensors(weights.files) if weights.safetensors else {f.name: hash_file(f) for f in weights.files}
        for name in sorted(hashes):
            digest.update(f"{name}\0{hashes[name]}\0".encode())
        return digest.hexdigest()


def read_json(file: Path, source: str) -> Config:
    """A JSON object, or UserError."""
    where = f"{file.parent.name}/{file.name}" if file.parent.name else file.name
    if not file.is_file():
        raise UserError(f"model '{source}' lacks {where}; it must be a folder in the diffusers layout")
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"model '{source}': {where} is not valid JSON ({error}); download it again") from error
    if not isinstance(data, dict):
        raise UserError(f"model '{source}': {where} holds no JSON object; download it again")
    return data


def check_safetensors(file: Path) -> None:
    """UserError when the file's header or length is wrong (a torn download)."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"weights file '{file}' is damaged ({reason}); download it again") from error


def hash_file(file: Path) -> str:
    """sha256 of a file, read in pieces."""
    with file.open("rb") as stream:
        digest = hashlib.sha256()
        while piece := stream.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def hash_tensors(files: Sequence[Path]) -> dict[str, str]:
    """sha256 of each tensor (dtype, shape, bytes) of safetensors files, one tensor in memory at a time."""
    import torch
    from safetensors import safe_open

    hashes: dict[str, str] = {}
    for file in files:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - not a dict
                tensor = opened.get_tensor(name).contiguous()
                digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
                hashes[name] = digest.hexdigest()
    return hashes


def builtin_models() -> list[str]:
    """Names of the models that ship with the package, such as ``tiny-sd``."""
    root = resources.files("diffalign.assets")
    return sorted(p.name for p in root.iterdir() if p.is_dir() and p.joinpath("model_index.json").is_file())


def open_folder(
    source: str, revision: str | None = None, variant: str | None = None, config: str | None = None
) -> ModelFolder:
    """A model by folder, single file, built-in name or hub id. Only configs (of a file: names and shapes) are read;
    `fetch` downloads a hub model and converts a file.

    Raises UserError: no such folder or hub model, not the diffusers layout, a file that is no checkpoint."""
    path = Path(source).expanduser()
    if path.is_file():
        from .single import open_single, recognise

        return open_single(recognise(path, config))
    if config is not None:
        raise UserError(f"model.config is for single files, and model '{source}' is none; set model.config=null")
    if path.is_dir():
        if (path / "model" / "model_index.json").is_file() and not (path / "model_index.json").is_file():
            path = path / "model"  # a run's folder
    elif source in builtin_models():
        path = Path(str(resources.files("diffalign.assets").joinpath(source)))
    elif HUB_ID.match(source) and not Path(source).parent.is_dir():
        return _open_hub(source, revision, variant)
    else:
        hint = nearest(source, builtin_models()) if "/" not in source else ""
        raise UserError(f"model '{source}' does not exist: no such folder, built-in model or hub id{hint}")
    if not (path / "model_index.json").is_file():
        what = (
            "a LoRA, not a model; give its base"
            if (path / "pytorch_lora_weights.safetensors").is_file()
            else ("not a model in the diffusers layout: it has no model_index.json")
        )
        raise UserError(f"model '{source}' is {what}")
    index = read_json(path / "model_index.json", source)
    unet = read_json(path / "unet" / "config.json", source) if "unet" in index else {}
    folder = ModelFolder(source, path, index, unet, {}, variant)
    if "scheduler" in folder.components():
        folder.scheduler = folder.config("scheduler", "scheduler_config.json")
    return folder


def _open_hub(source: str, revision: str | None, variant: str | None) -> ModelFolder:
    from huggingface_hub import hf_hub_download

    def get(name: str) -> Path:
        try:
            return Path(hf_hub_download(source, name, revision=revision))
        except (OSError, ValueError) as error:  # every error of the hub client is one of these
            reason = " ".join(str(error).split())[:160]
            at = f" at revision '{revision}'" if revision else ""
            raise UserError(
                f"model '{source}'{at} is no folder here and {name} cannot be had from the hub: {reason}"
            ) from error

    index = read_json(get("model_index.json"), source)
    unet = read_json(get("unet/config.json"), source) if "unet" in index else {}
    file = get("scheduler/scheduler_config.json") if "scheduler" in index else None
    scheduler = read_json(file, source) if file else {}
    return ModelFolder(source, get("model_index.json").parent, index, unet, scheduler, variant)


def fetch(folder: ModelFolder, revision: str | None) -> None:
    """Brings a hub model's weights into the local cache (safetensors first, no safety checker), makes the folder of a
    single file, and finds the VAE that replaces the model's; else does nothing."""
    if folder.single is not None:
        from .single import convert

        folder.path, folder.variant = convert(folder.single), None
        folder.scheduler = folder.config("scheduler", "scheduler_config.json")
    elif not Path(folder.source).is_dir() and HUB_ID.match(folder.source):
        _download(folder, revision)
    if folder.vae is not None:
        from .vae import find_vae

        folder.replaced["vae"] = find_vae(folder.vae, folder)


def _download(folder: ModelFolder, revision: str | None) -> None:
    from diffusers import DiffusionPipeline

    skip: Mapping[str, None] = {"safety_checker": None, "feature_extractor": None, "image_encoder": None}
    try:
        folder.path = Path(DiffusionPipeline.download(folder.source, revision=revision, variant=folder.variant, **skip))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"model '{folder.source}' cannot be downloaded: {reason}") from error


def identify(folder: ModelFolder) -> str:
    """The family: ``sd1``, ``sd2`` or ``sdxl``.

    Raises UserError, in one line, for what no family can train: inpainting, refiner, EDM and other networks."""
    source, unet, index = folder.source, folder.unet, folder.index
    pipeline = str(index.get("_class_name", "unknown pipeline"))
    if not unet or unet.get("_class_name", "UNet2DConditionModel") != "UNet2DConditionModel":
        raise UserError(
            f"model '{source}' is a {pipeline} without a 2-D U-Net; only Stable Diffusion U-Nets are trained"
        )
    scheduler = str(folder.scheduler.get("_class_name", ""))
    if "EDM" in scheduler or "sigma_data" in folder.scheduler:
        raise UserError(f"model '{source}' is an EDM model ({scheduler}); its parametrisation is not supported")
    channels = unet.get("in_channels", 4)
    if channels != 4:
        kind = {9: "an inpainting", 8: "an image-editing", 7: "an upscaling", 5: "a depth"}.get(
            channels, "a conditioned"
        )
        raise UserError(
            f"model '{source}' has {kind} U-Net ({channels} input channels); give the text-to-image base (4)"
        )
    if unet.get("addition_embed_type") == "text_time":
        encoders = {"text_encoder", "text_encoder_2"} & set(folder.components())
        if index.get("requires_aesthetics_score") or len(encoders) < 2:
            raise UserError(f"model '{source}' is an SDXL refiner; give the SDXL base model")
        return "sdxl"
    if unet.get("addition_embed_type") or unet.get("class_embed_type") or unet.get("encoder_hid_dim_type"):
        raise UserError(f"model '{source}' ({pipeline}) has a conditioning that no family here knows")
    return "sd2" if unet.get("use_linear_projection") else "sd1"
