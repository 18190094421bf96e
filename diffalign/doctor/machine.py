"""The machine: GPUs and what torch makes of them, threads, memory, disks, and the hub's settings."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .packages import version_of
from .probe import Probe
from .report import Finding, Level

GIB = 2**30
LITTLE, TIGHT = 1.0, 20.0  # GiB of free disk: below the first nothing can be done; SDXL alone takes 7
DRIVER = Path("/proc/driver/nvidia/version")

TORCH = """
import json, os, warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import torch
    facts = {"version": torch.__version__, "cuda": torch.version.cuda, "hip": torch.version.hip}
    facts["available"] = torch.cuda.is_available()
    facts["mps"] = torch.backends.mps.is_available()
    facts["threads"] = torch.get_num_threads()
facts["said"] = [" ".join(str(w.message).split())[:200] for w in caught if "cuda" in str(w.message).lower()]
facts["sum"] = float(torch.ones(3).sum())
import numpy
facts["numpy"] = float(torch.from_numpy(numpy.ones(3)).sum())
facts["gpus"] = []
for i in range(torch.cuda.device_count() if facts["available"] else 0):
    p = torch.cuda.get_device_properties(i)
    gpu = {"name": p.name, "total": p.total_memory, "capability": [p.major, p.minor]}
    try:
        gpu["free"] = torch.cuda.mem_get_info(i)[0]
        float((torch.ones(64, 64, device=f"cuda:{i}") @ torch.ones(64, 64, device=f"cuda:{i}")).sum())
        with torch.cuda.device(i):
            gpu["bf16"] = torch.cuda.is_bf16_supported(including_emulation=False)
    except RuntimeError as error:
        gpu["fault"] = " ".join(str(error).split())[:200]
    facts["gpus"].append(gpu)
print(json.dumps(facts))
"""


def nvidia() -> list[dict[str, str]] | None:
    """The NVIDIA GPUs that the driver shows, torch or not; empty where it shows none; None without a driver."""
    command = shutil.which("nvidia-smi")
    if command is not None:
        query = ["--query-gpu=name,memory.total,memory.free,driver_version", "--format=csv,noheader,nounits"]
        try:
            done = subprocess.run([command, *query], capture_output=True, text=True, timeout=30, check=False)
        except (OSError, subprocess.TimeoutExpired):
            done = None
        if done is not None and done.returncode == 0:
            rows = [
                [cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines() if line.count(",") == 3
            ]
            return [dict(zip(("name", "total", "free", "driver"), row, strict=True)) for row in rows]
    return [] if DRIVER.is_file() else None


def judge_torch(probe: Probe, cards: list[dict[str, str]] | None) -> list[Finding]:
    """torch itself, and whether it uses the GPU that is there."""
    if version_of("torch") is None:
        return []  # `requirements` says so
    if not probe.ok:
        mend = "pip install --force-reinstall torch, of the build that pytorch.org names for this machine"
        return [Finding("error", "torch", f"torch {version_of('torch')} does not work: {probe.fault}", mend)]
    facts = probe.facts
    build = f"CUDA {facts['cuda']}" if facts["cuda"] else f"ROCm {facts['hip']}" if facts["hip"] else "CPU"
    found = [Finding("ok", "torch", f"torch {facts['version']}, {build} build, works")]
    if facts["gpus"]:
        return found + [finding for gpu in facts["gpus"] for finding in judge_gpu(gpu)]
    if cards is not None:
        shown = cards[0]["name"] if cards else "an NVIDIA GPU"
        if not facts["cuda"]:
            text = f"this machine has {shown}, but torch is a CPU build: everything would run on the CPU"
            mend = "pip uninstall torch torchvision; then install the CUDA build of torch that pytorch.org names"
            return [*found, Finding("error", "gpu", text, mend)]
        reason = (
            "; ".join(facts["said"]) or "torch does not say why (a container without GPUs, or CUDA_VISIBLE_DEVICES?)"
        )
        mend = "update the NVIDIA driver, or install a torch of an older CUDA; check CUDA_VISIBLE_DEVICES"
        return [*found, Finding("error", "gpu", f"this machine has {shown}, but torch cannot use it: {reason}", mend)]
    if facts["mps"]:
        return [*found, Finding("note", "gpu", "an Apple GPU, used in fp32 (train.device=mps)")]
    text = "no GPU: the tiny models and small tests run well, Stable Diffusion takes minutes a step"
    return [*found, Finding("note", "gpu", text)]


def judge_gpu(gpu: Mapping[str, Any]) -> list[Finding]:
    """One card: memory, whether it computes, and in which half precision."""
    name = f"{gpu['name']}, {gpu['total'] / GIB:.0f} GiB"
    if "fault" in gpu:
        mend = "install a torch whose build covers this card, or free it from other processes (nvidia-smi)"
        return [Finding("error", "gpu", f"{name}: a small product failed on it: {gpu['fault']}", mend)]
    half = "bf16" if gpu["bf16"] else "fp16 (it does not compute in bf16)"
    found = [Finding("ok", "gpu", f"{name}, {gpu['free'] / GIB:.1f} GiB free, half precision {half}")]
    if gpu["free"] < 0.8 * gpu["total"]:
        text = f"{gpu['name']}: {(gpu['total'] - gpu['free']) / GIB:.1f} GiB are taken by other processes"
        found.append(Finding("note", "gpu", text, "nvidia-smi shows whose they are"))
    return found


def processors(probe: Probe) -> list[Finding]:
    """Cores, threads and memory."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = ""
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        memory = f", {os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / GIB:.0f} GiB of memory"
    threads = probe.facts.get("threads")
    found = [
        Finding(
            "ok", "machine", f"{cores} cores{memory}" + (f", torch computes in {threads} threads" if threads else "")
        )
    ]
    if threads and threads < cores / 2 and "OMP_NUM_THREADS" in os.environ:
        text = f"OMP_NUM_THREADS={os.environ['OMP_NUM_THREADS']} leaves most of {cores} cores idle on the CPU"
        found.append(Finding("note", "machine", text, "unset OMP_NUM_THREADS"))
    return found


def disks(places: Mapping[str, Path]) -> list[Finding]:
    """Free space where things are written; each disk once for each place."""
    found = []
    for what, folder in places.items():
        there = folder
        while not there.exists():
            there = there.parent
        try:
            free = shutil.disk_usage(there).free / GIB
        except OSError as error:
            found.append(Finding("warning", "disk", f"{what} '{folder}' cannot be looked at ({error.strerror})"))
            continue
        mend = {
            "cache": "set data.cache_dir or DIFFALIGN_CACHE",
            "runs": "set output.dir",
            "hub models": "set HF_HOME",
        }[what]
        if not os.access(there, os.W_OK):
            found.append(Finding("error", "disk", f"{what}: '{there}' is not writable", mend))
        elif free < TIGHT:
            level: Level = "error" if free < LITTLE else "warning"
            found.append(
                Finding(level, "disk", f"{what}: {free:.1f} GiB free at '{folder}'", f"free some space, or {mend}")
            )
        else:
            found.append(Finding("ok", "disk", f"{what}: {free:.0f} GiB free at '{folder}'"))
    return found


def hub_home() -> Path:
    """Where hub models are kept."""
    own = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    if own:
        return Path(own).expanduser()
    return _hf_home() / "hub"


def _hf_home() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("HF_HOME") or f"{cache}/huggingface").expanduser()


def hub() -> list[Finding]:
    """Offline switches, and whether there is a token (its text is never read out)."""
    found = []
    offline = [
        n for n in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE") if _on(os.environ.get(n, ""))
    ]
    if offline:
        text = f"{' and '.join(offline)} is set: only what is in the hub cache can be used, and nothing pushed"
        found.append(Finding("note", "hub", text, f"unset {' '.join(offline)}"))
    file = Path(os.environ.get("HF_TOKEN_PATH") or _hf_home() / "token").expanduser()
    named = next((name for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN") if os.environ.get(name, "").strip()), None)
    if named or file.is_file():
        found.append(Finding("ok", "hub", f"a hub token is set (by {named or 'its file'})"))
    else:
        text = "no hub token: public models work; gated ones and --push-to-hub do not"
        found.append(Finding("note", "hub", text, "hf auth login, or set HF_TOKEN"))
    return found


def _on(value: str) -> bool:
    return value.strip().upper() in {"1", "ON", "YES", "TRUE"}
