"""Training curves of a run's ``log.jsonl``: which numbers share a panel."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError
from .plots import WARN, A, B, Curve, curves_svg, heat_svg

FEW = 3  # lines of a panel; more times of one number are a heat map
LogRow = Mapping[str, object]
SKIP = {"step", "time", "kind", "epoch", "skipped", "held_out"}


@dataclass(frozen=True)
class Panel:
    """Numbers that are read together: (key, label, colour). ``guard``: whose alarms are marked in it. ``based``: the
    value at step 0, which is the base's, stays in sight. ``heat``: a heat map, of more lines than can be told apart."""

    title: str
    keys: tuple[tuple[str, str, str], ...]
    level: float | None = None
    log: bool = False
    guard: str = ""
    based: bool = False
    heat: bool = False


PANELS = (
    Panel(
        "Gain over the base (above 0: lower error)",
        (("chosen_gain", "winner", A), ("rejected_gain", "loser (raised)", WARN)),
        level=0.0,
        guard="winner",
    ),
    Panel("Denoising error", (("chosen_error", "winner", A), ("rejected_error", "loser", WARN)), based=True),
    Panel("Implicit accuracy", (("accuracy", "accuracy", A),), level=0.5),
    Panel("Margin", (("margin", "margin", A),), level=0.0),
    Panel("Loss", (("loss", "loss", A),)),
    Panel("Scale of the sigmoid's argument", (("logit_abs", "mean |logit|", A),)),
    Panel("Saturated: share of |logit| above 5", (("saturated", "share", A),), guard="sigmoid"),
    Panel("Samples: diversity within a prompt", (("diversity", "diversity", A),), guard="pictures", based=True),
    Panel(
        "Samples: brightness and saturation",
        (("brightness", "brightness", A), ("saturation", "saturation", B)),
        guard="pictures",
        based=True,
    ),
    Panel("Reward of its own samples", (("reward", "reward", A),)),
    Panel("A scorer that only looks on", (("guard_score", "score", B),), guard="hacking"),
    Panel("How far from the base", (("kl", "KL", A), ("base_distance", "prediction", B), ("apart", "prediction", B))),
    Panel("Pairs far enough apart to be kept", (("kept", "share", A),), guard="kept"),
    Panel("Learning rate", (("lr", "lr", A),)),
)
DRAWN = {"brightness", "saturation", "diversity"}  # of samples: neither trained on nor held out
QUIET = {"logit", "data_share"}  # in the log, but no panel of its own: the panels above say the same


def read_log(path: str | Path) -> list[LogRow]:
    """Rows of a ``log.jsonl`` (or of the one in a run's folder); a last line torn by a kill is left out.

    Raises UserError when there is no such file or a line in the middle is broken."""
    file = Path(path)
    file = file / "log.jsonl" if file.is_dir() else file
    if not file.is_file():
        raise UserError(f"'{path}' holds no log.jsonl; give the folder of a training run")
    rows: list[LogRow] = []
    lines = file.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise UserError(f"line {number} of '{file}' is not JSON; the log is damaged") from error
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows


def series(rows: Sequence[LogRow], key: str, kind: str = "train") -> tuple[list[float], list[float]]:
    """(steps, values) of one logged number; rows without it, and values that are not finite, are left out."""
    found = [
        (float(step), float(value))
        for row in rows
        if row.get("kind", "train") == kind
        and isinstance(step := row["step"], int)
        and isinstance(value := row.get(key), int | float)
        and math.isfinite(value)
    ]
    return [x for x, _ in found], [y for _, y in found]


def panels(rows: Sequence[LogRow], only: Collection[str] = (), head: str = "") -> list[str]:
    """SVGs of everything in a log: the known panels first, gradient norms, then whatever else a method logged.

    ``only``: numbers that are wanted, at all times where there are several; all where it is empty. ``head`` goes before
    the titles."""
    names = {key for row in rows for key, value in row.items() if isinstance(value, int | float)} - SKIP - QUIET
    norms = sorted(name for name in names if name.startswith("grad_norm"))
    colours = (A, WARN, B)
    groups = list(PANELS)
    if norms:
        keys = tuple((n, n.removeprefix("grad_norm").strip("/_") or "all", colours[i % 3]) for i, n in enumerate(norms))
        groups.append(Panel("Gradient norm", keys, log=True, guard="gradient"))
    known = {key for group in groups for key, _, _ in group.keys}
    kin = families(names - known)
    groups += [Panel(name.replace("_", " "), ((name, name, A),)) for name in sorted(names - known - kin.keys())]
    for name, lines in by_time(kin).items():
        groups.append(Panel(f"{name.replace('_', ' ')}, by time", tuple(lines), heat=len(lines) > FEW))
    drawn = []
    for group in groups:
        if only and not any(key in only or kin.get(key, ("", 0))[0] in only for key, _, _ in group.keys):
            continue
        curves, title = [], head + group.title
        if group.heat:
            for kind, told in (("train", ""), ("validate", ", held out")):
                places = [(label, *series(rows, key, kind)) for key, label, _ in group.keys]
                if any(len(steps) > 1 for _, steps, _ in places):
                    drawn.append(heat_svg(title + told, places))
            continue
        for key, label, colour in group.keys:
            for kind in ("train", "validate"):
                steps, values = series(rows, key, kind)
                if steps:
                    base = values[0] if group.based and kind == "validate" and steps[0] == 0 else None
                    curves.append(Curve(label, steps, values, colour, kind == "validate" and key not in DRAWN, base))
        if curves and any(len(curve.steps) > 1 for curve in curves):
            marks = [float(alarm.step) for alarm in alarms(rows) if alarm.guard == group.guard]
            drawn.append(curves_svg(title, curves, group.level, group.log, marks))
    return drawn


def families(names: Iterable[str]) -> dict[str, tuple[str, int]]:
    """The names that are one number at several times of the schedule: by name its stem and time."""
    found = {n: (m[1], int(m[2])) for n in names if (m := re.fullmatch(r"(.+?)(?:_t|/)(\d+)", n))}
    stems = [stem for stem, _ in found.values()]
    return {name: at for name, at in found.items() if stems.count(at[0]) > 1}


def by_time(kin: Mapping[str, tuple[str, int]]) -> dict[str, list[tuple[str, str, str]]]:
    """What `Panel` takes as keys, by stem; the noisiest time first."""
    lines: dict[str, list[tuple[str, str, str]]] = {}
    for name, (stem, time) in sorted(kin.items(), key=lambda item: (item[1][0], -item[1][1])):
        of = lines.setdefault(stem, [])
        of.append((name, f"t {time}", (A, WARN, B)[len(of) % FEW]))
    return lines


@dataclass(frozen=True)
class Alarm:
    """A guard that fired."""

    step: int
    guard: str
    text: str
    policy: str


def alarms(rows: Sequence[LogRow]) -> list[Alarm]:
    """The guards that fired, in order."""
    return [
        Alarm(step, str(row.get("guard", "")), str(row.get("text", "")), str(row.get("policy", "")))
        for row in rows
        if row.get("kind") == "guard" and isinstance(step := row["step"], int)
    ]
