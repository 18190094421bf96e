"""Stage "check": measure the built world against its gates and write QUALITY.json."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from diffusers import AutoencoderKL

from diffalign.eval.oracle import Oracle
from diffalign.eval.scorers import load_scorer

from . import scenes
from .common import start, to_tensor
from .make_pairs import scores
from .sampling import load_pipeline, sample
from .train_clip import preference_batch
from .train_vae import psnr
from .variants import near_miss

#: name of the measured number: (lowest, highest) value that passes
GATES: dict[str, tuple[float, float]] = {
    "oracle_drawings_all": (0.995, 1.0),
    "vae_psnr_db": (27.0, 99.0),
    "oracle_reconstructions_all": (0.97, 1.0),
    "single_all": (0.9, 1.0),
    "single_dark_share": (0.3, 0.7),
    "two_heldout_all": (0.2, 0.75),
    "two_train_all": (0.2, 0.85),
    "sdxl_single_all": (0.9, 1.0),
    "sdxl_two_heldout_all": (0.2, 0.85),
    "sdxl_softness_of_small": (0.0, 0.99),
    "clip_near_miss_accuracy": (0.85, 1.0),
    "pick_preference_accuracy": (0.85, 1.0),
    "pick_preference_heldout_accuracy": (0.8, 1.0),
    "pick_samples_accuracy": (0.8, 1.0),
    "hps_preference_accuracy": (0.85, 1.0),
    "hps_preference_heldout_accuracy": (0.8, 1.0),
    "hps_samples_accuracy": (0.8, 1.0),
    "pairs_usable": (1000, 1e9),
    "pairs_heldout": (0, 0),
    "ranked_lists": (350, 1e9),
    "ranked_heldout": (0, 0),
    "megabytes": (0, 30),
}


def diversity(images: torch.Tensor) -> float:
    """Mean absolute pixel distance (0..1) among pictures of the same prompt: uint8 (P, K, 3, H, W)."""
    x = images.float().flatten(2) / 255
    pairs = [(x[:, i] - x[:, j]).abs().mean() for i in range(x.shape[1]) for j in range(i)]
    return float(torch.stack(pairs).mean())


def hps_scores(folder: Path, prompts: list[str], images: torch.Tensor) -> np.ndarray:
    """HPS (N,) of N prompts with uint8 images (N, 3, 32, 32), by the eval suite's own scorer."""
    return load_scorer("tiny-hps", str(folder), device="cpu")(images, prompts, batch=256).double().numpy()


def measure(root: Path) -> dict[str, float]:
    rng = start(7)
    oracle = Oracle.from_pretrained(root / "tiny-oracle")
    out = _drawings(root, oracle, rng) | _samples(root, oracle) | _preferences(root, rng)
    out |= _sdxl(root, oracle)
    out["megabytes"] = sum(f.stat().st_size for f in root.rglob("*") if f.is_file() and f.suffix != ".pyc") / 1e6
    return out | _data(root)


def _data(root: Path) -> dict[str, float]:
    """Counts of the pairs and of the ranked lists."""
    table = pq.read_table(root / "tiny-pairs" / "pickapic.parquet", columns=["caption", "has_label", "label_0"])
    out: dict[str, float] = {"pairs_heldout": _heldout(table["caption"].to_pylist())}
    out["pairs_usable"] = sum(v is not None and v != 0.5 for v in table["label_0"].to_pylist())
    lists = pq.read_table(root / "tiny-ranked" / "ranked.parquet", columns=["prompt", "scores"])
    out |= {"ranked_heldout": _heldout(lists["prompt"].to_pylist()), "ranked_lists": len(lists)}
    return out


def _heldout(prompts: Sequence[str]) -> int:
    """Prompts that no training may see."""
    asked = [scenes.parse(prompt) for prompt in prompts]
    return sum(s is None or s.heldout for s in asked)


def _drawings(root: Path, oracle: Oracle, rng: np.random.Generator) -> dict[str, float]:
    drawn = scenes.sample_scenes(1000, rng, heldout=None)
    images, prompts = to_tensor(scenes.render(drawn, rng)), [scenes.caption(s) for s in drawn]
    vae = AutoencoderKL.from_pretrained(root / "tiny-sd" / "vae").eval()
    with torch.no_grad():
        z = vae.encode(images.float() / 127.5 - 1).latent_dist.mean
        again = ((vae.decode(z).sample.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return {
        "oracle_drawings_all": float(oracle.judge(images, prompts)["all"].mean()),
        "oracle_reconstructions_all": float(oracle.judge(again, prompts)["all"].mean()),
        "vae_psnr_db": psnr(vae, images),
    }


def _samples(root: Path, oracle: Oracle) -> dict[str, float]:
    """Rates of tiny-sd's samples, and how often tiny-pickscore sides with the oracle among samples of one prompt."""
    pipe, out = load_pipeline(root / "tiny-sd"), {}
    singles = [p for p in scenes.single_prompts() for _ in range(8)]
    images = sample(pipe, singles, range(len(singles)))
    out.update({f"single_{k}": float(v.mean()) for k, v in oracle.judge(images, singles).items()})
    out["single_dark_share"] = float((images.float().mean((1, 2, 3)) < 128).float().mean())
    out["single_diversity"] = diversity(images.view(24, 8, *images.shape[1:]))
    held = scenes.heldout_prompts()
    images = sample(pipe, held, range(5000, 5000 + len(held)))
    out.update({f"two_heldout_{k}": float(v.mean()) for k, v in oracle.judge(images, held).items()})
    train = scenes.training_prompts()[24:]
    train = [train[i] for i in np.random.default_rng(0).permutation(len(train))[:100] for _ in range(4)]
    images = sample(pipe, train, range(9000, 9000 + len(train)))
    verdict = oracle.judge(images, train)
    out.update({f"two_train_{k}": float(v.mean()) for k, v in verdict.items()})
    out["two_train_diversity"] = diversity(images.view(100, 4, *images.shape[1:]))
    for name, key in (("tiny-pickscore", "pick"), ("tiny-hps", "hps"), ("tiny-clip", "clip")):
        judge = hps_scores if key == "hps" else scores
        value = judge(root / name, train, images).reshape(100, 4)
        right = verdict["all"].reshape(100, 4)
        gaps = np.concatenate(
            [
                v[r][:, None].repeat((~r).sum(), 1).ravel() - np.tile(v[~r], r.sum())
                for v, r in zip(value, right, strict=True)
            ]
        )
        out[f"{key}_samples_accuracy"], out[f"{key}_samples_pairs"] = float((gaps > 0).mean()), len(gaps)
    return out


def _sdxl(root: Path, oracle: Oracle) -> dict[str, float]:
    """Rates of tiny-sdxl's samples, and what its size conditioning does: pictures told to come from small originals are
    softer, pictures told to be the left end of a wide original show the scene further right."""
    pipe, out = load_pipeline(root / "tiny-sdxl"), {}
    singles = [p for p in scenes.single_prompts() for _ in range(4)]
    seeds = range(len(singles))
    images = sample(pipe, singles, seeds)
    out.update({f"sdxl_single_{k}": float(v.mean()) for k, v in oracle.judge(images, singles).items()})
    side, wide = scenes.SIZE, (scenes.SIZE, scenes.SIZE + 16)
    small = sample(pipe, singles, seeds, original_size=(14, 14), negative_original_size=(14, 14))
    ends = []
    for left in (0, 16):
        crop: dict[str, Any] = {"crops_coords_top_left": (0, left), "negative_crops_coords_top_left": (0, left)}
        ends.append(sample(pipe, singles, seeds, original_size=wide, negative_original_size=wide, **crop))
    out["sdxl_softness_of_small"] = sharpness(small) / sharpness(images)
    out["sdxl_shift_of_left_end"] = (centre(ends[0]) - centre(ends[1])) / side
    held = scenes.heldout_prompts()
    images = sample(pipe, held, range(5000, 5000 + len(held)))
    out.update({f"sdxl_two_heldout_{k}": float(v.mean()) for k, v in oracle.judge(images, held).items()})
    return out


def sharpness(images: torch.Tensor) -> float:
    """Mean of the strongest 2 % of horizontal steps between neighbouring pixels: uint8 (N, 3, H, W)."""
    steps = images.float().diff(dim=-1).abs().mean(1).flatten(1)
    return float(steps.topk(max(1, steps.shape[1] // 50)).values.mean())


def centre(images: torch.Tensor) -> float:
    """Mean column, in pixels, of what differs from the picture's median colour: uint8 (N, 3, H, W)."""
    x = images.float()
    mass = (x - x.flatten(2).median(-1).values[..., None, None]).abs().mean((1, 2)) + 1e-3
    return float((mass * torch.arange(x.shape[-1])).sum(1).div(mass.sum(1)).mean())


def _preferences(root: Path, rng: np.random.Generator) -> dict[str, float]:
    """Choices on worn drawings: PickScore's own kind of pairs, and CLIP on near misses."""
    vae, out = AutoencoderKL.from_pretrained(root / "tiny-sd" / "vae").eval(), {}
    for suffix, heldout in (("", False), ("_heldout", True)):
        _, texts, good, bad = preference_batch(500, vae, rng, heldout)
        both = torch.cat([good, bad])
        both = ((both + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        value = scores(root / "tiny-pickscore", texts * 2, both).reshape(2, -1)
        out[f"pick_preference{suffix}_accuracy"] = float((value[0] > value[1]).mean())
        value = hps_scores(root / "tiny-hps", texts * 2, both).reshape(2, -1)
        out[f"hps_preference{suffix}_accuracy"] = float((value[0] > value[1]).mean())
    drawn = scenes.sample_scenes(500, rng)
    misses = [near_miss(s, rng) for s in drawn]
    images = to_tensor(scenes.render([*drawn, *misses], rng))
    value = scores(root / "tiny-clip", [scenes.caption(s) for s in drawn] * 2, images).reshape(2, -1)
    out["clip_near_miss_accuracy"] = float((value[0] > value[1]).mean())
    return out


def check(root: Path) -> bool:
    """Print every number beside its gate, write QUALITY.json, say whether all gates hold."""
    numbers, good = measure(root), True
    for name, value in numbers.items():
        low, high = GATES.get(name, (-np.inf, np.inf))
        fits = low <= value <= high
        good &= fits
        print(f"{'ok  ' if fits else 'FAIL'} {name} {value:.4g}" + (f"  [{low}, {high}]" if name in GATES else ""))
    rounded = {k: round(v, 4) for k, v in numbers.items()}
    report = {"passed": good, "numbers": rounded, "gates": {k: list(v) for k, v in GATES.items()}}
    (root / "QUALITY.json").write_text(json.dumps(report, indent=2) + "\n")
    return good
