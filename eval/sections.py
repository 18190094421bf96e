"""What the report shows of studies and comparisons: numbers as texts, figures, pictures; ready for the template."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import UserError
from .boxes import boxes_svg
from .compare import Comparison, Pair, ScorerComparison, span
from .looks import Looks, measure
from .page import evenly, is_small, picture_uri
from .plots import gains_svg, histograms_svg
from .stats import Paired
from .study import Board, Study, prompt_values

GRID, EXTREMES, ROWS = 16, 6, 8


@dataclass(frozen=True)
class Tile:
    """Two pictures of one prompt, base first."""

    prompt: str
    base: str | None
    tuned: str | None
    scores: str


@dataclass(frozen=True)
class Section:
    """One comparison."""

    a: str
    b: str
    scorer: str
    in_loop: bool
    rate: str
    level: str
    interval: str
    bar: dict[str, float]
    verdict: str
    sentences: list[str]
    prompts: int
    rows: list[dict[str, object]]
    categories: list[dict[str, object]]
    figures: list[str]
    grid: list[Tile]
    best: list[Tile]
    worst: list[Tile]
    notes: list[str]


@dataclass(frozen=True)
class Matrix:
    """Win rates of one scorer, row against column; ``rows``: (model, cells), a cell is (text, interval, tint, starred)
    or None on the diagonal, tint from -1 (lost all) to 1."""

    scorer: str
    in_loop: bool
    rows: list[tuple[str, list[tuple[str, str, float, bool] | None]]]


@dataclass(frozen=True)
class StudyView:
    """One study: an overview of its models, then each comparison with the first.

    ``leaders``: (model, mean by scorer, rating by the headline's scorer); ``strips``: (prompt, pictures by model);
    ``looks``: (model, cells), a cell is (value, change, alarming)."""

    anchor: str
    title: str
    prompts: int
    models: list[str]
    scorers: list[str]
    lead: str
    leaders: list[tuple[str, list[str], str]]
    matrices: list[Matrix]
    boxes: list[str]
    strips: list[tuple[str, list[str | None]]]
    measures: list[str]
    looks: list[tuple[str, list[tuple[str, str, bool]]]]
    looked: int
    sections: list[Section]
    notes: list[str]
    pixelated: bool


def headline(comparison: Comparison, primary: str | None = None) -> int:
    """Place of the scorer that speaks first: ``primary``, else the first that was not used in training.

    Raises UserError for a primary scorer that is not there."""
    names = [s.scorer for s in comparison.scorers]
    if primary is not None:
        if primary not in names:
            raise UserError(f"the primary scorer '{primary}' is not among {', '.join(names)}")
        return names.index(primary)
    return next((i for i, s in enumerate(comparison.scorers) if not s.in_loop), 0)


def study_view(study: Study, primary: str | None, number: int) -> StudyView:
    """Everything the page shows of a study; many models get an overview, two only their comparison."""
    many = len(study.sides) > 2
    first = headline(study.comparisons[0], primary)
    order = [study.boards[first], *(b for i, b in enumerate(study.boards) if i != first)]
    looks = measure(study)
    pairs = study.comparisons[0].scorers[first].pairs
    comparison = study.comparisons[0]
    return StudyView(
        anchor=f"set-{number}",
        title=study.prompt_set or f"set {number}",
        prompts=study.prompts,
        models=[side.label for side in study.sides],
        scorers=[b.scorer + (" (in-loop)" if b.in_loop else "") for b in order],
        lead=order[0].scorer,
        leaders=_leaders(study, order) if many else [],
        matrices=[_matrix(study, board) for board in order] if many else [],
        boxes=_boxes(study, order) if many else [],
        strips=_strips(study, _evenly(pairs, ROWS)) if many else [],
        measures=list(looks.shifts[0]) if looks else [],
        looks=_looks(study, looks),
        looked=looks.prompts if looks else 0,
        sections=[_section(c, primary, grid=not many) for c in study.comparisons],
        notes=[note for note in study.notes if not any(note in c.notes for c in study.comparisons)],
        pixelated=is_small(comparison.b.images / pairs[0].image_b),
    )


def _leaders(study: Study, order: Sequence[Board]) -> list[tuple[str, list[str], str]]:
    rows = []
    for i, side in enumerate(study.sides):
        means = [f"{b.means[i].value:.4g} {span(b.means[i].interval, '.4g')}" for b in order]
        rating = f"{order[0].ratings[i][0]:+.0f} {span(order[0].ratings[i][1], '+.0f')}" if order[0].ratings else ""
        rows.append((side.label, means, _minus(rating)))
    if not order[0].ratings:
        return rows
    best = sorted(range(len(rows)), key=lambda i: -order[0].ratings[i][0])
    return [rows[i] for i in best]


def _matrix(study: Study, board: Board) -> Matrix:
    rows = []
    for i, side in enumerate(study.sides):
        cells: list[tuple[str, str, float, bool] | None] = []
        for j in range(len(study.sides)):
            cell = board.cells.get((i, j))
            if cell is None:
                cells.append(None)
                continue
            r = cell.paired
            interval = f"({100 * r.win_interval.low:.1f}, {100 * r.win_interval.high:.1f})"
            cells.append((f"{r.win_rate:.1%}", interval, 2 * r.win_rate - 1, cell.holm_p < 0.05))
        rows.append((side.label, cells))
    return Matrix(board.scorer, board.in_loop, rows)


def _boxes(study: Study, order: Sequence[Board]) -> list[str]:
    drawn = []
    for board in order:
        values = [[v for by_k in prompt_values(f, board.scorer).values() for v in by_k.values()] for f in study.files]
        if not all(v in (0.0, 1.0) for side in values for v in side):  # a judge's 0 and 1 stand in the table already
            drawn.append(boxes_svg(f"{board.scorer}: scores", values, [side.label for side in study.sides]))
    return drawn


def _strips(study: Study, pairs: Sequence[Pair]) -> list[tuple[str, list[str | None]]]:
    images = [{(row.id, row.k): row.image for row in file.rows} for file in study.files]
    rows = []
    for pair in pairs:
        found = [
            picture_uri(side.images / by[pair.id, pair.k]) if (pair.id, pair.k) in by else None
            for side, by in zip(study.sides, images, strict=True)
        ]
        rows.append((pair.prompt, found))
    return rows


def _looks(study: Study, looks: Looks | None) -> list[tuple[str, list[tuple[str, str, bool]]]]:
    rows = []
    for side, shifts in zip(study.sides, looks.shifts if looks else [], strict=False):
        cells = []
        for shift in shifts.values():
            change = ""
            if shift.change is not None and shift.interval is not None:
                change = _minus(f"{shift.change:+.3f} {span(shift.interval, '+.3f')}")
            cells.append((f"{shift.mean.value:.3f}", change, shift.alarming))
        rows.append((side.label, cells))
    return rows


def _section(c: Comparison, primary: str | None, grid: bool) -> Section:
    first = headline(c, primary)
    lead = c.scorers[first]
    r = lead.overall
    low, high = r.win_interval.low, r.win_interval.high
    order = [first, *(i for i in range(len(c.scorers)) if i != first)]
    figures = []
    for i in order:
        s = c.scorers[i]
        if not s.judges:  # a judge's 0 and 1 stand in the table already
            if grid:
                figures.append(
                    histograms_svg(
                        f"{s.scorer}: scores", [p.a for p in s.pairs], [p.b for p in s.pairs], (c.a.label, c.b.label)
                    )
                )
            if any(p.gain for p in s.pairs):
                figures.append(gains_svg(f"{s.scorer}: gain a pair", [p.gain for p in s.pairs]))
    best, worst = _extremes(lead)
    return Section(
        a=c.a.label,
        b=c.b.label,
        scorer=lead.scorer,
        in_loop=lead.in_loop,
        rate=f"{100 * r.win_rate:.1f}",
        level=f"{100 * c.level:g}",
        interval=f"{100 * low:.1f} to {100 * high:.1f} %",
        bar={"low": 100 * low, "high": 100 * high, "at": 100 * r.win_rate},
        verdict=_verdict(r),
        sentences=[c.sentence(i) for i in order],
        prompts=r.prompts,
        rows=[row for i in order for row in _rows(c.scorers[i])],
        categories=[
            _row(f"{c.scorers[i].scorer}, {name}", part, "main", False, "")
            for i in order
            for name, part in c.scorers[i].categories.items()
        ],
        figures=figures,
        grid=_tiles(c, _evenly(lead.pairs, GRID)) if grid else [],
        best=_tiles(c, best),
        worst=_tiles(c, worst),
        notes=c.notes,
    )


def _rows(s: ScorerComparison) -> list[dict[str, object]]:
    """Table rows of a scorer: overall, then its parts."""
    rows = [_row(s.scorer, s.overall, "main", s.in_loop, f"{s.holm_p:.2g}")]
    return rows + [_row(name, part, "part", False, "") for name, part in s.parts.items()]


def _row(name: str, r: Paired, kind: str, in_loop: bool, holm_p: str) -> dict[str, object]:
    low, high = r.win_interval.low, r.win_interval.high
    return {
        "name": name,
        "kind": kind,
        "in_loop": in_loop,
        "a": _minus(f"{r.mean_a:.4g}"),
        "b": _minus(f"{r.mean_b:.4g}"),
        "gain": _minus(f"{r.gain:+.3g}"),
        "gain_interval": _minus(span(r.gain_interval, "+.3g")),
        "rate": f"{r.win_rate:.1%}",
        "rate_interval": f"({100 * low:.1f}, {100 * high:.1f})",
        "low": 100 * low,
        "width": max(0.8, 100 * (high - low)),
        "at": 100 * r.win_rate,
        "counts": f"{r.won} / {r.tied} / {r.lost}",
        "p": f"{r.sign_p:.2g}",
        "holm": holm_p,
        "n": r.prompts,
        "verdict": _verdict(r),
    }


def _verdict(r: Paired) -> str:
    return "better" if r.win_interval.low > 0.5 else "worse" if r.win_interval.high < 0.5 else "open"


def _extremes(s: ScorerComparison) -> tuple[list[Pair], list[Pair]]:
    """Largest gains and largest losses; pairs without a difference are in neither. Equal ones are spread evenly."""
    won = sorted((p for p in s.pairs if p.gain > 0), key=lambda p: -p.gain)
    lost = sorted((p for p in s.pairs if p.gain < 0), key=lambda p: p.gain)
    return tuple(  # type: ignore[return-value]
        _evenly(found, EXTREMES) if len({p.gain for p in found}) == 1 else found[:EXTREMES] for found in (won, lost)
    )


def _evenly(pairs: Sequence[Pair], count: int) -> list[Pair]:
    """``count`` pairs, evenly through the list: nobody picked them."""
    return [pairs[i] for i in evenly(pairs, count)]


def _tiles(c: Comparison, pairs: Sequence[Pair]) -> list[Tile]:
    scores = [{(p.id, p.k): p for p in s.pairs} for s in c.scorers]
    judges = {s.scorer for s in c.scorers if s.judges}
    tiles = []
    for pair in pairs:
        found = [
            (s.scorer, by[pair.id, pair.k]) for s, by in zip(c.scorers, scores, strict=True) if (pair.id, pair.k) in by
        ]
        words = " · ".join(f"{name} {_mark(p.b, name in judges)} → {_mark(p.a, name in judges)}" for name, p in found)
        base, tuned = picture_uri(c.b.images / pair.image_b), picture_uri(c.a.images / pair.image_a)
        tiles.append(Tile(pair.prompt, base, tuned, words))
    return tiles


def _mark(value: float, judge: bool) -> str:
    """A score as text; a judge's 1 and 0 as right and wrong."""
    return ("✓" if value else "✗") if judge else _minus(f"{value:.3g}")


def _minus(text: str) -> str:
    """A true minus."""
    return text.replace("-", "−")
