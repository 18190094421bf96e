"""On the tiny world the scorers rank models as the oracle does. Slow: samples seven models."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import pearsonr, spearmanr

from diffalign.assets.sampling import load_pipeline, sample
from diffalign.assets.scenes import heldout_prompts, training_prompts
from diffalign.eval.scorers import load_scorer

ASSETS = Path(str(resources.files("diffalign.assets")))
# (noise on the U-Net's weights as a share of each tensor's spread, guidance, steps): models from good to useless
MODELS = [(0.0, 3, 8), (0.0, 1, 8), (0.0, 3, 2), (0.4, 3, 8), (0.6, 3, 8), (0.8, 3, 8), (1.0, 3, 8)]
PROMPTS = 40


def measure() -> dict[str, np.ndarray]:
    """Scores (models, prompts) of each scorer, same prompts and seeds for every model."""
    asked = (heldout_prompts()[::4] + training_prompts()[24::12])[:PROMPTS]
    judges = {name: load_scorer(name, device="cpu") for name in ("oracle", "tiny-pickscore", "tiny-hps", "tiny-clip")}
    found: dict[str, list[np.ndarray]] = {name: [] for name in judges}
    for noise, guidance, steps in MODELS:
        pipe = load_pipeline(ASSETS / "tiny-sd")
        draw = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for weight in pipe.unet.parameters():
                spread = weight.float().std() if weight.numel() > 1 else torch.zeros(())
                weight.add_(noise * spread * torch.randn(weight.shape, generator=draw))
        images = sample(pipe, asked, range(len(asked)), steps=steps, guidance=guidance)
        for name, judge in judges.items():
            found[name].append(judge(images, asked).numpy())
    return {name: np.stack(values) for name, values in found.items()}


def agreement(scores: dict[str, np.ndarray], name: str) -> dict[str, float]:
    """Of model means with the oracle's: Pearson, Spearman. Of pictures of one prompt: how often the right one leads."""
    right, value = scores["oracle"] > 0.5, scores[name]
    gaps = [
        value[right[:, p], p][:, None] - value[~right[:, p], p][None]
        for p in range(right.shape[1])
        if right[:, p].any() and not right[:, p].all()
    ]
    wins = np.concatenate([g.ravel() for g in gaps])
    means = scores["oracle"].mean(1), value.mean(1)
    return {
        "pearson": float(pearsonr(*means).statistic),
        "spearman": float(spearmanr(*means).statistic),
        "pictures": float((wins > 0).mean()),
        "pairs": float(len(wins)),
    }


@pytest.mark.slow
def test_scorers_rank_models_as_the_oracle_does() -> None:
    scores = measure()
    spread = scores["oracle"].mean(1)
    assert spread.max() - spread.min() > 0.5
    found = {name: agreement(scores, name) for name in scores if name != "oracle"}
    # seen: Spearman 0.99, 0.96 and 0.96, Pearson 0.86 to 0.88 (the oracle ends at 0, scores go on), pictures 0.97
    for name, values in found.items():
        assert values["spearman"] > 0.85 and values["pearson"] > 0.75 and values["pictures"] > 0.9, (name, values)


if __name__ == "__main__":
    table = measure()
    print("oracle", table["oracle"].mean(1).round(3).tolist())
    for key in table:
        if key != "oracle":
            print(key, table[key].mean(1).round(2).tolist(), {k: round(v, 3) for k, v in agreement(table, key).items()})
