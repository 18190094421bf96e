"""One self-contained HTML page: verdict, tables, pictures side by side, curves, and every convention behind them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from ..errors import UserError
from .compare import Comparison, Pair, ScorerComparison, span
from .page import Sheet, environment, evenly, is_small, picture_uri
from .plots import gains_svg, histograms_svg
from .stats import Interval, Paired
from .training_report import Training, read_training, training_view

GRID, EXTREMES = 16, 6


@dataclass(frozen=True)
class Mean:
    """A mean over prompts with its bootstrap interval, and how many prompts had a score."""

    value: float
    interval: Interval
    prompts: int


@dataclass
class ReportData:
    """What a page shows; empty parts are left out.

    ``comparisons``: each of one model (A) against the first (B); the first comparison is the headline, by ``primary``
    (a scorer; None: the first one that no training looked at). ``training``: a run's curves and samples. ``facts``:
    further conventions in words. ``means``: by model and scorer. ``gallery``: pictures with captions."""

    title: str
    subtitle: str = ""
    comparisons: Sequence[Comparison] = ()
    means: dict[str, dict[str, Mean]] = field(default_factory=dict)
    gallery: Sequence[Sheet] = ()
    primary: str | None = None
    training: Training | None = None
    facts: dict[str, str] = field(default_factory=dict)
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Tile:
    """Two pictures of one prompt, base first."""

    prompt: str
    base: str | None
    tuned: str | None
    scores: str


@dataclass(frozen=True)
class Section:
    """One comparison, ready for the template."""

    a: str
    b: str
    scorer: str
    rate: str
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
    pixelated: bool


def render_report(data: ReportData) -> str:
    """The page as text: no network, no scripts, all pictures inside. Raises UserError when there is nothing to show."""
    training = data.training
    if not (data.comparisons or data.means or (training and (training.log or training.sheets))):
        raise UserError("there is nothing to report: no comparison, no training log, no samples")
    sections = [_section(c, data.primary) for c in data.comparisons]
    return (
        environment()
        .get_template("report.html.j2")
        .render(
            data=data,
            sections=sections,
            training=training_view(training) if training else None,
            means=[(label, [found.get(name) for name in _columns(data.means)]) for label, found in data.means.items()],
            mean_names=_columns(data.means),
            pixelated=bool(data.gallery) and is_small(data.gallery[0].path),
            gallery=[(sheet.caption, picture_uri(sheet.path)) for sheet in data.gallery],
            facts=_facts(data),
            fingerprints=_fingerprints(data.comparisons),
            date=datetime.now(UTC).strftime("%d %B %Y, %H:%M UTC"),
        )
    )


def write_report(data: ReportData, path: str | Path) -> Path:
    """Render into a file. Raises UserError when it cannot be written."""
    target = Path(path)
    text = render_report(data)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"report '{path}' cannot be written ({error.strerror}); choose another place") from error
    return target


def write_run_report(run_dir: str | Path, comparisons: Sequence[Comparison] = ()) -> Path:
    """``report.html`` of a training run's folder, from ``log.jsonl``, ``samples/*.png`` and ``recipe.yaml``.

    Raises UserError when the folder holds neither a log nor samples."""
    training = read_training(run_dir)
    data = ReportData(
        title=Path(run_dir).resolve().name,
        subtitle=f"training run, {training.steps} steps" if training.steps is not None else "training run",
        comparisons=comparisons,
        training=training,
    )
    return write_report(data, Path(run_dir) / "report.html")


def headline(comparison: Comparison, primary: str | None = None) -> int:
    """Place of the scorer that speaks first: ``primary``, else the first that was not used in training.

    Raises UserError for a primary scorer that is not there."""
    names = [s.scorer for s in comparison.scorers]
    if primary is not None:
        if primary not in names:
            raise UserError(f"the primary scorer '{primary}' is not among {', '.join(names)}")
        return names.index(primary)
    return next((i for i, s in enumerate(comparison.scorers) if not s.in_loop), 0)


def _section(c: Comparison, primary: str | None) -> Section:
    first = headline(c, primary)
    lead = c.scorers[first]
    r = lead.overall
    low, high = r.win_interval.low, r.win_interval.high
    order = [first, *(i for i in range(len(c.scorers)) if i != first)]
    figures = []
    for i in order:
        s = c.scorers[i]
        if not s.judges:  # a judge's 0 and 1 stand in the table already
            figures.append(
                histograms_svg(
                    f"{s.scorer}: scores", [p.a for p in s.pairs], [p.b for p in s.pairs], (c.a.label, c.b.label)
                )
            )
            if any(p.gain for p in s.pairs):
                figures.append(gains_svg(f"{s.scorer}: gain a pair", [p.gain for p in s.pairs]))
    best, worst = _extremes(lead)
    tiles = _evenly(lead.pairs, GRID)
    return Section(
        a=c.a.label,
        b=c.b.label,
        scorer=lead.scorer,
        rate=f"{100 * r.win_rate:.1f}",
        interval=f"{100 * low:.1f} to {100 * high:.1f} %",
        bar={"low": 100 * low, "high": 100 * high, "at": 100 * r.win_rate},
        verdict="better" if low > 0.5 else "worse" if high < 0.5 else "open",
        sentences=[c.sentence(i) for i in order],
        prompts=r.prompts,
        rows=[row for i in order for row in _rows(c.scorers[i])],
        categories=[
            _row(f"{c.scorers[i].scorer}, {name}", part, "main", False, "")
            for i in order
            for name, part in c.scorers[i].categories.items()
        ],
        figures=figures,
        grid=_tiles(c, tiles),
        best=_tiles(c, best),
        worst=_tiles(c, worst),
        notes=c.notes,
        pixelated=is_small(c.b.images / lead.pairs[0].image_b),
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
        "a": f"{r.mean_a:.4g}",
        "b": f"{r.mean_b:.4g}",
        "gain": f"{r.gain:+.3g}",
        "gain_interval": span(r.gain_interval, "+.3g"),
        "rate": f"{r.win_rate:.1%}",
        "rate_interval": f"({100 * low:.1f}, {100 * high:.1f})",
        "low": 100 * low,
        "width": max(0.8, 100 * (high - low)),
        "at": 100 * r.win_rate,
        "counts": f"{r.won} / {r.tied} / {r.lost}",
        "p": f"{r.sign_p:.2g}",
        "holm": holm_p,
        "n": r.prompts,
        "verdict": "better" if low > 0.5 else "worse" if high < 0.5 else "open",
    }


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
    return ("✓" if value else "✗") if judge else f"{value:.3g}".replace("-", "−")


def _columns(means: dict[str, dict[str, Mean]]) -> list[str]:
    return list(dict.fromkeys(name for found in means.values() for name in found))


def _facts(data: ReportData) -> dict[str, str]:
    """The conventions in words: what was sampled how, and how the numbers were made."""
    facts: dict[str, str] = {}
    if data.comparisons:
        c = data.comparisons[0]
        facts["prompts"] = f"{c.prompts} prompts, list sha256 {c.prompts_sha256[:16]}…"
        for side in [c.b, *(x.a for x in data.comparisons)]:
            settings = side.sampling.get("settings")
            if isinstance(settings, dict):
                shown = {k: v for k, v in settings.items() if v is not None and k != "hashes"}
                hashes = settings.get("hashes")
                if isinstance(hashes, dict):
                    shown["weights"] = " ".join(f"{part}:{str(value)[:10]}" for part, value in hashes.items())
                source = " + ".join(str(side.sampling[k]) for k in ("model", "lora") if side.sampling.get(k))
                facts[f"sampling of {side.label}"] = f"{source}: {_words(shown)}"
        facts["win rate"] = (
            "share of prompts where the image scores higher for the same prompt and noise; seeds are averaged within a "
            "prompt, ties count one half"
        )
        facts["intervals"] = (
            f"{c.level:.0%}; bootstrap over prompts (BCa, {c.draws} draws, seed {c.seed}, within categories); Wilson's "
            "where every prompt is a plain win or loss"
        )
        facts["tests"] = "exact two-sided sign test over prompts without ties; Holm's correction over the scorers"
        facts["pictures"] = (
            "grids are taken evenly through the prompt list, not chosen; extremes are by the headline's scorer"
        )
    return facts | data.facts


def _words(values: dict[str, object]) -> str:
    return ", ".join(
        f"{k} {json.dumps(v) if isinstance(v, dict | list) else v}" for k, v in values.items() if v is not None
    )


def _fingerprints(comparisons: Sequence[Comparison]) -> list[tuple[str, dict[str, str]]]:
    found = {s.scorer: s.fingerprint for c in comparisons for s in c.scorers}
    return [(name, {k: v[:16] + "…" if k == "weights" else v for k, v in f.items()}) for name, f in found.items()]
