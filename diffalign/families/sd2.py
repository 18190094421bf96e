"""Stable Diffusion 2.x: SD1.x with OpenCLIP-H as text encoder; the base model predicts noise, the 768 model v.

Which of the two a model is stands in its scheduler's config (``prediction_type``). The text encoder's penultimate
layer is read because the folder's encoder has no last one (23 layers of 24), so nothing differs in code."""

from __future__ import annotations

from .sd1 import SD1


class SD2(SD1):
    """SD2.0, SD2.1, and every model of their make."""

    family = "sd2"


FAMILY = SD2
