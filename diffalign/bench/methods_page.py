"""The page of ``diffalign bench methods``: table, plots and pictures, all in one file, in the suite's own frame."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from html import escape
from importlib import resources
from pathlib import Path

from ..eval.curves import panels, read_log, series
from ..eval.page import environment, evenly, picture_uri
from ..eval.plots import INK, LINE, WARN, A, B, Figure, number, ticks
from ..eval.rows import read_rows
from .judge import HELD_OUT, IN_LOOP, PRIMARY
from .methods_report import EXPLAINED, HEADS, MethodsReport, cells, ranked
from .verdict import Row

ROUNDS = ("reward", "kl", "base_distance", "apart", "kept")
SHOWN = 12  # prompts in the grid
LINE_HEIGHT = 19


def page(report: MethodsReport) -> str:
    """The page as text: no network, no scripts."""
    rows = ranked(report.rows)
    plots = [forest("Share all right: gain over the base", rows)] if rows else []
    if rows:
        plots += [
            scatter(f"Win rate: {IN_LOOP} (in-loop) and {name}", rows, lambda r: r.wins[IN_LOOP].value, wins(name))
            for name in HELD_OUT
        ]
        plots.append(scatter("Gain over the base against processor seconds of training", rows, cpu, gain))
    template = resources.files("diffalign.bench").joinpath("methods.html.j2").read_text(encoding="utf-8")
    return (
        environment()
        .from_string(template)
        .render(
            data={"title": "Methods on the tiny world", "subtitle": report.title()},
            heads=HEADS,
            lines=[(row, cells(row)) for row in report.rows],
            explained=EXPLAINED,
            plots=plots,
            rounds=rounds(report),
            grid=grid(report),
            over_steps=report.over_steps.page(),
            guided=report.guided.page(),
            settings=report.settings,
            date=datetime.now(UTC).strftime("%d %B %Y, %H:%M UTC"),
        )
    )


def wins(name: str) -> Callable[[Row], float]:
    """The win rate by one judge."""
    return lambda row: row.wins[name].value


def cpu(row: Row) -> float:
    """Processor seconds of training."""
    return row.cpu or 0.0


def gain(row: Row) -> float:
    """Over the base, by the oracle."""
    return row.gain.value if row.gain else 0.0


def colour(row: Row) -> str:
    """By verdict."""
    if row.kind == "control":
        return B
    return {"learning": A, "not learning": WARN, "learning, at a cost": A}.get(row.verdict, INK)


def forest(title: str, rows: Sequence[Row]) -> str:
    """Gains with their intervals, a line each; seeds as small dots."""
    gains = [(row, row.gain) for row in rows if row.gain]
    points = [v for row, g in gains for v in (g.low, g.high, *(e.value for e in row.by_seed))]
    low, high = min(0.0, *points), max(0.0, *points)
    pad = 0.04 * (high - low or 1.0)
    low, high, left, right = low - pad, high + pad, 120, 392
    bottom = 34 + LINE_HEIGHT * len(gains)

    def at(value: float) -> float:
        return left + (value - low) / (high - low) * (right - left)

    parts = [f'<text x="8" y="16" class="title">{escape(title)}</text>']
    for value in ticks(low, high):
        parts.append(f'<path d="M{at(value):.1f} 26V{bottom}" stroke="{INK if value == 0 else LINE}"/>')
        parts.append(f'<text x="{at(value):.1f}" y="{bottom + 14}" text-anchor="middle">{number(value, True)}</text>')
    for i, (row, g) in enumerate(gains):
        y, ink = 34 + LINE_HEIGHT * (i + 0.5), colour(row)
        parts.append(f'<text x="{left - 8}" y="{y + 3.5:.1f}" text-anchor="end">{escape(row.name)}</text>')
        parts.append(f'<path d="M{at(g.low):.1f} {y:.1f}H{at(g.high):.1f}" stroke="{ink}" stroke-width="2.4"/>')
        parts += [
            f'<circle cx="{at(e.value):.1f}" cy="{y:.1f}" r="1.8" fill="{INK}" opacity=".6"/>' for e in row.by_seed
        ]
        parts.append(f'<circle cx="{at(g.value):.1f}" cy="{y:.1f}" r="4" fill="{ink}"/>')
    label = escape(title, quote=True)
    return f'<svg viewBox="0 0 400 {bottom + 24}" role="img" aria-label="{label}">{"".join(parts)}</svg>'


def scatter(title: str, rows: Sequence[Row], x: Callable[[Row], float], y: Callable[[Row], float]) -> str:
    """A named dot a row."""
    xs, ys = [x(row) for row in rows], [y(row) for row in rows]
    figure = Figure(title, (min(xs), max(xs)), (min(ys), max(ys)))
    taken: list[tuple[float, float]] = []
    for row, a, b in zip(rows, xs, ys, strict=True):
        figure.dots([a], [b], colour(row))
        left, top = figure.to_x(a), figure.to_y(b) + 3.5
        while any(abs(top - other) < 10 and abs(left - beside) < 60 for beside, other in taken):
            top += 10  # names do not lie on one another
        taken.append((left, top))
        shift, anchor = (-5, ' text-anchor="end"') if left > 330 else (5, "")
        figure.parts.append(f'<text x="{left + shift:.1f}" y="{top:.1f}"{anchor}>{escape(row.name)}</text>')
    return figure.svg()


def grid(report: MethodsReport) -> dict[str, object]:
    """The same prompts by every row, the base first: names, and for each prompt (text, [(picture, right)])."""
    folders = {row.name: report.pictures[row.name] for row in report.rows if row.name in report.pictures}
    found = {name: judged_pictures(folder) for name, folder in folders.items()}
    found = {name: pictures for name, pictures in found.items() if pictures}
    if not found:
        return {}
    first = next(iter(found.values()))
    prompts = [list(first)[i] for i in evenly(list(first), SHOWN)]
    lines = []
    for prompt in prompts:
        tiles = [pictures.get(prompt) for pictures in found.values()]
        lines.append((prompt, [(picture_uri(tile[0]), tile[1]) if tile else (None, False) for tile in tiles]))
    return {"names": list(found), "lines": lines}


def rounds(report: MethodsReport) -> list[str]:
    """What methods that sample while they train saw on the way, first seed: reward, pairs kept, distance from the
    base. Empty for those whose runs are gone."""
    drawn = []
    for name, pictures in report.pictures.items():
        run = pictures.parent / "run"
        log = read_log(run) if (run / "log.jsonl").is_file() else []
        if series(log, "reward")[0]:
            drawn += panels(log, ROUNDS, f"{name}: ")
    return drawn


def judged_pictures(folder: Path) -> dict[str, tuple[Path, bool]]:
    """By prompt: the picture, and whether the oracle finds it right. Empty where the pictures are gone."""
    scores = folder / "scores.jsonl"
    if not scores.is_file():
        return {}
    rows = [row for row in read_rows(scores) if row.scorer == PRIMARY]
    return {row.prompt: (folder / row.image, bool(row.value)) for row in rows}
