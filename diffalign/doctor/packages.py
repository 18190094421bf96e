"""Installed packages: versions, what is missing, what does not fit, and whether it truly works."""

from __future__ import annotations

import platform
import re
from importlib import metadata

from packaging.requirements import InvalidRequirement, Requirement

from .probe import Probe
from .report import Finding, Level

TOPIC = "packages"
SHOWN = (
    "torch",
    "diffusers",
    "transformers",
    "accelerate",
    "peft",
    "datasets",
    "safetensors",
    "huggingface_hub",
    "numpy",
)
# Packages that are built against one version of torch.
BOUND = ("torchvision", "torchaudio", "xformers", "bitsandbytes", "torchao", "flash_attn")
GIVES = {
    "xformers": "model.attention=xformers; the default is torch's own attention",
    "8bit": "train.optimizer=adamw8bit and model.quantize=8bit or 4bit: less GPU memory",
    "tensorboard": "curves in TensorBoard",
    "wandb": "curves on Weights & Biases",
    "openclip": "scorers of any OpenCLIP tower",
    "fid": "FID and KID",
    "lpips": "LPIPS diversity",
    "webdataset": "reading of WebDataset shards",
    "label": "the labelling page",
    "notebook": "the notebooks",
    "trackio": "curves in trackio",
}
FOR_DEVELOPERS = {"test", "dev", "all"}

# What training and sampling import, and a LoRA put on a layer: peft asks other packages for their versions only then.
LIBRARIES = """
import json
import accelerate, datasets, diffusers, peft, torch, transformers
from diffusers import AutoencoderKL, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer
net = torch.nn.Sequential(torch.nn.Linear(4, 4))
peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["0"]), net)(torch.zeros(1, 4)).sum().backward()
print(json.dumps({}))
"""
TORCHVISION = """
import json, torch, torchvision
from torchvision import transforms
torchvision.ops.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)
print(json.dumps({}))
"""
XFORMERS = """
import json, torch, xformers.ops as ops
if torch.cuda.is_available():
    q = torch.zeros(1, 16, 2, 32, device="cuda", dtype=torch.float16)
    ops.memory_efficient_attention(q, q, q)
print(json.dumps({}))
"""
BITSANDBYTES = """
import json, torch, bitsandbytes
bitsandbytes.optim.AdamW8bit([torch.nn.Parameter(torch.zeros(4))])
print(json.dumps({}))
"""


def version_of(name: str) -> str | None:
    """The installed version; None where the package is not there."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def versions() -> list[Finding]:
    """Python and the main packages, as information."""
    shown = ", ".join(f"{name} {version_of(name) or 'missing'}" for name in ("diffalign", *SHOWN))
    return [
        Finding("ok", TOPIC, f"Python {platform.python_version()} on {platform.system()} {platform.machine()}: {shown}")
    ]


def requirements() -> list[Finding]:
    """What diffalign asks for, by its own metadata, beside what is installed; and the extras that are not."""
    try:
        lines = metadata.requires("diffalign") or []
    except metadata.PackageNotFoundError:
        return [
            Finding("warning", TOPIC, "diffalign is not installed, only imported", "pip install -e . in its folder")
        ]
    found: list[Finding] = []
    extras: dict[str, list[str]] = {}
    for requirement in map(Requirement, lines):
        if requirement.name == "diffalign":
            continue
        extra = _extra(requirement)
        if extra is None and requirement.marker and not requirement.marker.evaluate():
            continue
        have = version_of(requirement.name)
        fits = have is not None and requirement.specifier.contains(have, prereleases=True)
        wanted = f"{requirement.name}{requirement.specifier}"
        if extra is None and have is None:
            found.append(Finding("error", TOPIC, f"{requirement.name} is missing", f"pip install '{wanted}'"))
        elif have is not None and not fits and extra not in FOR_DEVELOPERS:
            level: Level = "error" if extra is None else "warning"
            text = f"{requirement.name} {have} is too old or too new: diffalign asks for {requirement.specifier}"
            found.append(Finding(level, TOPIC, text, f"pip install '{wanted}'"))
        elif have is None and extra is not None and extra not in FOR_DEVELOPERS:
            extras.setdefault(extra, []).append(requirement.name)
    for extra, names in sorted(extras.items()):
        gives = GIVES.get(extra, f"what needs {' and '.join(names)}")
        found.append(
            Finding("note", "extras", f"[{extra}] is not installed: {gives}", f"pip install 'diffalign[{extra}]'")
        )
    return found


def _extra(requirement: Requirement) -> str | None:
    named = re.search(r"""extra\s*==\s*["']([^"']+)["']""", str(requirement.marker or ""))
    return named[1] if named else None


def bound_to_torch() -> list[Finding]:
    """Packages whose metadata asks for another torch than the one that is here."""
    torch = version_of("torch")
    if torch is None:
        return []
    found = []
    for name in BOUND:
        have = version_of(name)
        for line in (metadata.requires(name) or []) if have else []:
            try:
                wanted = Requirement(line)
            except InvalidRequirement:
                continue
            applies = wanted.marker is None or wanted.marker.evaluate({"extra": ""})
            if wanted.name == "torch" and applies and not wanted.specifier.contains(torch, prereleases=True):
                text = f"{name} {have} is built for torch{wanted.specifier}, and torch {torch} is installed"
                found.append(Finding("warning", TOPIC, text, f"pip install -U {name} torch=={torch.partition('+')[0]}"))
    return found


def judge_libraries(probe: Probe, torchvision: Probe | None) -> list[Finding]:
    """Whether what training imports can be imported."""
    if probe.ok:
        return [Finding("ok", TOPIC, "torch, diffusers, transformers, accelerate, peft and datasets work together")]
    if torchvision is not None and not torchvision.ok:
        return []  # it breaks them, and its own finding says so
    return [
        Finding(
            "error", TOPIC, f"the libraries cannot be used: {probe.fault}", "pip install -U --force-reinstall diffalign"
        )
    ]


def judge_torchvision(probe: Probe, libraries: Probe) -> list[Finding]:
    """A torchvision that does not fit its torch is worse than none: diffusers and transformers break on import."""
    if probe.ok:
        return [Finding("ok", TOPIC, f"torchvision {version_of('torchvision')} works")]
    level: Level = "warning" if libraries.ok else "error"
    so = "" if libraries.ok else ", and breaks diffusers and transformers"
    text = (
        f"torchvision {version_of('torchvision')} does not work beside torch {version_of('torch')}{so}: {probe.fault}"
    )
    return [
        Finding(
            level, TOPIC, text, "pip uninstall torchvision (nothing here needs it), or install the one of this torch"
        )
    ]


def judge_xformers(probe: Probe) -> list[Finding]:
    """xformers, where it is installed."""
    unfit = next(
        (line.strip() for line in probe.said.splitlines() if "xFormers was built for" in line or "can't load" in line),
        "",
    )
    if probe.ok and not unfit:
        return [Finding("ok", TOPIC, f"xformers {version_of('xformers')} works")]
    text = f"xformers {version_of('xformers')} does not work here: {probe.fault or unfit[:160]}"
    return [Finding("warning", TOPIC, text, "pip install -U xformers for this torch, or leave model.attention=auto")]


def judge_bitsandbytes(probe: Probe) -> list[Finding]:
    """bitsandbytes, where it is installed."""
    if probe.ok:
        return [Finding("ok", TOPIC, f"bitsandbytes {version_of('bitsandbytes')} works")]
    text = f"bitsandbytes {version_of('bitsandbytes')} does not work here: {probe.fault}"
    return [
        Finding(
            "warning", TOPIC, text, "pip install -U bitsandbytes, or use train.optimizer=adamw and model.quantize=none"
        )
    ]
