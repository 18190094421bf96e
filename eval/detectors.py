"""Detectors for GenEval's judge: a small protocol, plug-ins through the entry-point group ``diffalign.detectors``, and
one for the tiny world."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Protocol

from PIL import Image

from ..errors import UserError, nearest
from .geneval import Answer, Box, Detections

GROUP = "diffalign.detectors"


class Detector(Protocol):
    """Finds objects in one RGB picture. ``answer`` says what was asked, so that colours need be told for these classes
    only; a detector must not look at it to decide what is there."""

    name: str

    def __call__(self, picture: Image.Image, answer: Answer) -> Detections: ...


def list_detectors() -> list[str]:
    """Names: ``tiny-oracle``, and the entry points of installed packages."""
    return ["tiny-oracle", *sorted(point.name for point in entry_points(group=GROUP))]


def load_detector(name: str) -> Detector:
    """A detector by name; an entry point is a callable without arguments that returns one.

    Raises UserError for an unknown name, or a plug-in that cannot be loaded."""
    if name == "tiny-oracle":
        return TinyDetector()
    for point in entry_points(group=GROUP):
        if point.name == name:
            try:
                make: Callable[[], Detector] = point.load()
            except (ImportError, AttributeError) as error:
                raise UserError(f"detector '{name}' cannot be loaded ({error}); check the package it is in") from error
            return make()
    raise UserError(
        f"unknown detector '{name}'{nearest(name, list_detectors())}; install one with the entry point {GROUP}, "
        "or give a file of detections"
    )


class TinyDetector:
    """The tiny world by its oracle: shapes are classes, boxes say no more than the layout does."""

    name = "tiny-oracle"

    def __init__(self) -> None:
        from importlib import resources
        from pathlib import Path

        from .oracle import Oracle

        self.oracle = Oracle.from_pretrained(Path(str(resources.files("diffalign.assets") / "tiny-oracle")))

    def __call__(self, picture: Image.Image, answer: Answer) -> Detections:
        from diffalign.assets.scenes import COLOURS, LAYOUTS, SHAPES

        (seen,) = self.oracle.read([picture]).tolist()
        width, height = picture.size
        x, y, layout = float(width), float(height), LAYOUTS[seen[0]]
        places: dict[str, list[tuple[float, float, float, float]]] = {
            "single": [(0, 0, x, y)],
            "vertical": [(0, 0, x, y / 2), (0, y / 2, x, y)],
            "horizontal": [(0, 0, x / 2, y), (x / 2, 0, x, y)],
        }
        found: Detections = {}
        for (x0, y0, x1, y1), colour, shape in zip(places[layout], seen[1::2], seen[2::2], strict=False):
            found.setdefault(SHAPES[shape], []).append(Box(x0, y0, x1, y1, 1.0, COLOURS[colour]))
        return found


def tiny_answer(prompt: str) -> dict[str, object]:
    """The answer of a caption of the tiny world. Raises UserError for other texts."""
    from diffalign.assets.scenes import PHRASES, parse

    scene = parse(prompt)
    if scene is None:
        raise UserError(f"'{prompt[:60]}' is no caption of the tiny world")
    (colour, shape), second = scene.first, scene.second
    include: list[dict[str, object]] = [{"class": shape, "count": 1, "color": colour}]
    if second is None:
        return {"tag": "single_object", "include": include}
    place = PHRASES[scene.axis][1]  # the second lies below, or right of, the first
    include.append({"class": second[1], "count": 1, "color": second[0], "position": [place, 0]})
    return {"tag": "position", "include": include}
