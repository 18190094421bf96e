"""GenEval's rules (Ghosh et al. 2023, arXiv 2310.11513) on found objects: presence, counts, colours, positions.

The judge needs no network and no weights: it reads what a detector found, from a file or from a plug-in
(:mod:`.detectors`). Published numbers come from one detector (mmdet's Mask2Former Swin-S, CLIP ViT-L/14 for colours);
results carry the detector's name, and those of different detectors are not comparable."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ..errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from .detectors import Detector
    from .items import Item

OFFICIAL = "mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco + CLIP ViT-L/14"
CONFIDENCE, COUNTING_CONFIDENCE, MOST = 0.3, 0.9, 16
RELATIONS = ("left of", "right of", "above", "below")
SHRINK, SIDE = 0.1, 0.5  # share of both sizes that an offset has to exceed; component that makes a relation
Answer = Mapping[str, object]


class Box(NamedTuple):
    """An object in pixels (y grows downwards), the detector's confidence 0..1, and its colour where it was asked."""

    x0: float
    y0: float
    x1: float
    y1: float
    confidence: float = 1.0
    colour: str | None = None


Detections = dict[str, list[Box]]  # class name -> boxes


@dataclass(frozen=True)
class Verdict:
    """Of one picture: is all right, and what is not."""

    correct: bool
    reasons: tuple[str, ...] = ()


def keep(found: Mapping[str, Sequence[Box]], tag: str) -> Detections:
    """The boxes that count: confidence above 0.3 (0.9 where the task is counting), the 16 surest of a class, sorted."""
    least = COUNTING_CONFIDENCE if tag == "counting" else CONFIDENCE
    kept = {
        name: sorted((b for b in boxes if b.confidence > least), key=lambda b: -b.confidence)[:MOST]
        for name, boxes in found.items()
    }
    return {name: boxes for name, boxes in kept.items() if boxes}


def relations(a: Box, b: Box) -> set[str]:
    """Where ``a`` lies from ``b``: none, one, or (on a diagonal) two of :data:`RELATIONS`.

    The offset of the centres is shortened on each axis by a tenth of both sizes and divided by its full length."""
    offset = ((a.x0 + a.x1 - b.x0 - b.x1) / 2, (a.y0 + a.y1 - b.y0 - b.y1) / 2)
    sizes = (abs(a.x1 - a.x0) + abs(b.x1 - b.x0), abs(a.y1 - a.y0) + abs(b.y1 - b.y0))
    moved = [math.copysign(max(abs(d) - SHRINK * s, 0.0), d) for d, s in zip(offset, sizes, strict=True)]
    if max(map(abs, moved)) < 1e-3:
        return set()
    u, v = (m / math.hypot(*offset) for m in moved)
    holds = (u < -SIDE, u > SIDE, v < -SIDE, v > SIDE)
    return {name for name, true in zip(RELATIONS, holds, strict=True) if true}


def judge(found: Mapping[str, Sequence[Box]], answer: Answer) -> Verdict:
    """Do the found objects satisfy the answer of a prompt?

    ``answer``: ``tag``; ``include``: clauses {class, count, color?, position?: [relation, index of an earlier clause]},
    all of which must hold for the ``count`` surest objects of the class; ``exclude``: clauses {class, count} of which
    none may be reached. Raises UserError for an answer that is malformed, or colours that the detector did not give."""
    objects = keep(found, str(answer.get("tag", "")))
    reasons: list[str] = []
    groups: list[list[Box] | None] = []
    for clause in _clauses(answer, "include"):
        name, count = str(clause["class"]), int(clause["count"])  # type: ignore[call-overload]
        group = objects.get(name, [])[:count]
        wrong = _lacks(group, clause, name, count, groups)
        groups.append(None if wrong else group)
        reasons += wrong
    for clause in _clauses(answer, "exclude"):
        name, count = str(clause["class"]), int(clause["count"])  # type: ignore[call-overload]
        if len(objects.get(name, [])) >= count:
            reasons.append(f"{len(objects[name])} x {name}, want fewer than {count}")
    return Verdict(not reasons, tuple(reasons))


def _lacks(group: list[Box], clause: Answer, name: str, count: int, groups: Sequence[list[Box] | None]) -> list[str]:
    if len(group) < count:
        return [f"{len(group)} x {name}, want {count}"]
    if (colour := clause.get("color")) is not None:
        if any(box.colour is None for box in group):
            raise UserError(f"a prompt asks for a {colour} {name}, but the detections have no colours; add them")
        same = sum(box.colour == colour for box in group)
        if same < count:
            return [f"{same} x {colour} {name}, want {count} (found {', '.join(str(b.colour) for b in group)})"]
    if clause.get("position") is None:
        return []
    relation, target = _position(clause["position"], name, groups)
    if target is None:
        return [f"nothing that {name} could be {relation}"]
    for box in group:
        for other in target:
            if relation not in (have := relations(box, other)):
                return [f"{name} is {' and '.join(sorted(have)) or 'at the same place'}, want {relation}"]
    return []


def _position(stated: object, name: str, groups: Sequence[list[Box] | None]) -> tuple[str, list[Box] | None]:
    """The relation of a clause, and the group that it speaks of (None where that clause failed)."""
    if isinstance(stated, Sequence) and len(stated) == 2 and stated[1] in range(len(groups)):
        if stated[0] in RELATIONS:
            return str(stated[0]), groups[stated[1]]
        raise UserError(f"unknown relation '{stated[0]}' of '{name}'; choose from {', '.join(RELATIONS)}")
    raise UserError(f"position {stated} of '{name}' is no [relation, index of an earlier clause]")


def _clauses(answer: Answer, key: str) -> list[Answer]:
    clauses = answer.get(key) or []
    if not isinstance(clauses, list) or not all(
        isinstance(c, Mapping) and {"class", "count"} <= set(c) for c in clauses
    ):
        raise UserError(f"'{key}' of a prompt's answer is no list of {{class, count}}; see GenEval's metadata")
    return list(clauses)


@dataclass(frozen=True)
class Judged:
    """One picture's row."""

    id: str
    k: int
    image: str
    prompt: str
    tag: str
    verdict: Verdict


@dataclass
class GenEvalResult:
    """``overall`` is the plain mean of the tasks' accuracies, as GenEval reports it; ``images`` the mean over pictures,
    ``prompts`` the share of prompts with at least one right picture. ``skipped``: (picture, reason)."""

    detector: str
    rows: list[Judged]
    skipped: list[tuple[str, str]] = field(default_factory=list)

    @property
    def by_tag(self) -> dict[str, float]:
        tags: dict[str, list[bool]] = {}
        for row in self.rows:
            tags.setdefault(row.tag, []).append(row.verdict.correct)
        return {tag: sum(right) / len(right) for tag, right in tags.items()}

    @property
    def overall(self) -> float:
        return sum(self.by_tag.values()) / len(self.by_tag)

    @property
    def images(self) -> float:
        return sum(row.verdict.correct for row in self.rows) / len(self.rows)

    @property
    def prompts(self) -> float:
        right: dict[str, bool] = {}
        for row in self.rows:
            right[row.id] = right.get(row.id, False) or row.verdict.correct
        return sum(right.values()) / len(right)

    def render(self, console: Console) -> None:
        """A short table for a person."""
        from rich.table import Table

        table = Table("task", "right", "pictures")
        for tag, share in self.by_tag.items():
            table.add_row(tag, f"{share:.3f}", str(sum(row.tag == tag for row in self.rows)))
        console.print(table)
        console.print(
            f"overall {self.overall:.4f} (mean of tasks), of pictures {self.images:.4f}, of prompts with one "
            f"right picture {self.prompts:.4f}",
            highlight=False,
        )
        official = "" if self.detector == OFFICIAL else "; not the published one, so numbers of papers do not compare"
        console.print(f"detector: {self.detector}{official}", highlight=False)
        for image, reason in self.skipped[:5]:
            console.print(f"skipped {image}: {reason}", highlight=False)


def judge_images(
    images: str | Path,
    prompts: str | Path | None = None,
    detections: str | Path | None = None,
    detector: Detector | None = None,
) -> GenEvalResult:
    """Judge the pictures that `diffalign score` would score, by a detections file or a detector.

    Args:
        detections: JSONL, one row a picture: ``image`` (as in the manifest), ``detections`` {class: [[x0, y0, x1, y1,
            confidence, colour], ...]}, ``detector``.

    Raises UserError: neither or both ways given, no prompt with an answer, a broken file, not one picture judged."""
    from .items import read_items

    if (detections is None) == (detector is None):
        raise UserError("give either a detections file or a detector")
    source = read_items(images, prompts)
    answers = {p.id: p.answer for p in source.prompts if p.answer is not None}
    items = [i for i in source.items if i.id in answers]
    if not items:
        raise UserError(f"no prompt of '{prompts or images}' has an answer (tag, include); give a set such as everyday")
    skipped: list[tuple[str, str]] = []
    if detections is not None:
        name, table = read_detections(detections)
        found = {i.image: table[i.image] for i in items if i.image in table}
        skipped += [(i.image, "no row in the detections file") for i in items if i.image not in table]
    else:
        assert detector is not None
        name, found = detector.name, _detect(items, detector, answers, skipped)
    rows = [
        Judged(i.id, i.k, i.image, i.prompt, str(answers[i.id].get("tag", "")), judge(found[i.image], answers[i.id]))
        for i in items
        if i.image in found
    ]
    if not rows:
        raise UserError(f"none of the {len(items)} pictures could be judged (first: {': '.join(skipped[0])})")
    return GenEvalResult(name, rows, skipped)


def _detect(
    items: Sequence[Item], detector: Detector, answers: Mapping[str, Answer], skipped: list[tuple[str, str]]
) -> dict[str, Detections]:
    from .preprocess import decode

    found: dict[str, Detections] = {}
    for item in items:
        try:
            picture = decode(item.read()).image
        except (OSError, ValueError, SyntaxError) as error:  # PIL raises SyntaxError for some broken PNGs
            skipped.append((item.image, f"cannot be read: {type(error).__name__}"))
            continue
        found[item.image] = detector(picture, answers[item.id])
    return found


def _box(x0: float, y0: float, x1: float, y1: float, confidence: float, colour: str | None = None) -> Box:
    return Box(float(x0), float(y0), float(x1), float(y1), float(confidence), colour)


def read_detections(path: str | Path) -> tuple[str, dict[str, Detections]]:
    """(detector's name, picture -> detections). Raises UserError naming the line that is broken."""
    file = Path(path)
    if not file.is_file():
        raise UserError(f"detections '{path}' are not there; give a .jsonl file")
    names: set[str] = set()
    table: dict[str, Detections] = {}
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            names.add(str(row.get("detector", "unknown")))
            table[str(row["image"])] = {
                str(name): [_box(*box) for box in boxes] for name, boxes in row["detections"].items()
            }
        except (json.JSONDecodeError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"line {number} of '{path}' is no row of detections ({type(error).__name__}: {error}); it needs image, "
                "detections {class: [[x0, y0, x1, y1, confidence, colour], ...]}"
            ) from error
    if len(names) > 1:
        raise UserError(f"'{path}' mixes detectors ({', '.join(sorted(names))}); judge one at a time")
    if not table:
        raise UserError(f"'{path}' is empty")
    return names.pop(), table


def write_detections(path: str | Path, detector: str, found: Mapping[str, Mapping[str, Sequence[Box]]]) -> None:
    """What :func:`read_detections` reads, written whole or not at all."""
    file = Path(path)
    partial = file.with_name(f"{file.name}.partial")
    rows = [{"image": image, "detector": detector, "detections": boxes} for image, boxes in found.items()]
    partial.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    partial.replace(file)
