"""The oracle of the tiny world as a scorer: 1 when layout, colours and shapes are all as the caption says, else 0."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np
import torch
from PIL import Image

from ...errors import UserError
from . import list_scorers
from ._base import CODE_VERSION, Scored, Scorer, model_files, resolve_device, resolve_weights, weights_sha256

if TYPE_CHECKING:
    from ..oracle import Oracle

SCORERS: dict[str, dict[str, object]] = {
    "oracle": {
        "about": "tiny world: 1 when layout, colours and shapes are all right, else 0 (it judges only)",
        "weights": "asset:tiny-oracle",
    },
}


class OracleScorer(Scorer):
    """Value 0 or 1; parts ``layout``, ``colours``, ``shapes``. Runs on the CPU in fp32 whatever is asked."""

    preprocess_id = "oracle-32"
    oracle: Oracle

    @classmethod
    def from_pretrained(
        cls, path: str | Path | None = None, device: str = "auto", dtype: str = "auto", name: str | None = None
    ) -> Self:
        from ..oracle import Oracle

        resolve_device(device)
        scorer = cls()
        scorer.name = name or "oracle"
        scorer.path, scorer.weights_note = str(path or list_scorers()[scorer.name].weights), "the project's own"
        folder = resolve_weights(scorer.path, scorer.name)
        try:
            scorer.oracle = Oracle.from_pretrained(folder)
        except (KeyError, FileNotFoundError, RuntimeError) as error:
            raise UserError(
                f"'{folder}' holds no oracle ({type(error).__name__}); give the folder tiny-oracle"
            ) from error
        scorer.fingerprint = {
            "scorer": "oracle",
            "formula": "all right",
            "scale": "1",
            "weights": weights_sha256(model_files(folder)),
            "preprocess": cls.preprocess_id,
            "dtype": "fp32",
            "code": CODE_VERSION,
        }
        return scorer

    def prepare(self, image: Image.Image) -> np.ndarray:
        return np.array(image)

    def score_prepared(self, prepared: Sequence[np.ndarray], prompts: Sequence[str]) -> Scored:
        if len({pixels.shape for pixels in prepared}) == 1:
            right = self.oracle.judge(np.stack(list(prepared)), prompts)
        else:
            singles = [self.oracle.judge(pixels[None], [p]) for pixels, p in zip(prepared, prompts, strict=True)]
            right = {key: np.concatenate([one[key] for one in singles]) for key in singles[0]}
        parts = {key: torch.from_numpy(value.astype(np.float32)) for key, value in right.items()}
        return Scored(parts.pop("all"), parts)

    def check_prompts(self, prompts: Sequence[str]) -> None:
        from diffalign.assets.scenes import parse

        strange = next((p for p in prompts if parse(p) is None), None)
        if strange is not None:
            raise UserError(
                f"scorer 'oracle' judges captions of the tiny world only, and '{strange[:60]}' is none; "
                "leave it out of the scorers"
            )
