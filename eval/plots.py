"""Figures of the report as inline SVG, drawn here: small, instant, and coloured by CSS variables for light and dark."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

A, B, WARN, INK, LINE = "var(--a)", "var(--b)", "var(--warn)", "var(--ink-2)", "var(--line)"
WIDTH, HEIGHT = 400, 236
LEFT, RIGHT, TOP, BOTTOM = 50, 392, 48, 212  # the plotting area; title and legend stand above it
MAX_NAMED = 12  # rows of a heat map that each have a name
MAX_RAW = 120  # points of a curve above which a running mean is drawn over it


@dataclass(frozen=True)
class Curve:
    """One line of a panel; ``dashed`` for held-out numbers. ``base``: the value at step 0, drawn as a thin line."""

    label: str
    steps: Sequence[float]
    values: Sequence[float]
    colour: str = A
    dashed: bool = False
    base: float | None = None


def ticks(low: float, high: float, count: int = 6) -> list[float]:
    """About ``count`` round numbers from ``low`` to ``high``, both inside or on the rim."""
    raw = (high - low) / max(1, count - 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten between two positive numbers; powers alone over more than three decades."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1,) if math.log10(high / low) > 3 else (1, 2, 5)
    return [m * 10.0**p for p in powers for m in factors if low <= m * 10.0**p <= high]


class Figure:
    """A plot in the making: axes from the data's range, then marks on top of them."""

    def __init__(self, title: str, x: tuple[float, float], y: tuple[float, float], log: bool = False) -> None:
        self.title, self.parts, self.legend = title, [], []  # type: str, list[str], list[tuple[str, str, bool]]
        self.x = _widen(*x, 0.02)
        self.log = log
        self.y = (y[0] / 1.15, y[1] * 1.15) if log else _widen(*y, 0.06)
        self.to_x = _scale(*self.x, LEFT, RIGHT)
        low, high = (math.log(self.y[0]), math.log(self.y[1])) if log else self.y
        scale = _scale(low, high, BOTTOM, TOP)
        self.to_y: Callable[[float], float] = (lambda v: scale(math.log(v))) if log else scale
        for value in log_ticks(*self.y) if log else ticks(*self.y):
            at = self.to_y(value)
            self.parts.append(f'<path d="M{LEFT} {at:.1f}H{RIGHT}" stroke="{LINE}"/>')
            self.parts.append(f'<text x="{LEFT - 6}" y="{at + 3.5:.1f}" text-anchor="end">{number(value)}</text>')
        for value in ticks(*self.x, 6):
            at = self.to_x(value)
            self.parts.append(f'<path d="M{at:.1f} {BOTTOM}v4" stroke="{INK}"/>')
            self.parts.append(f'<text x="{at:.1f}" y="{BOTTOM + 16}" text-anchor="middle">{number(value)}</text>')
        self.parts.append(f'<path d="M{LEFT} {BOTTOM}H{RIGHT}" stroke="{INK}" opacity=".5"/>')

    def line(self, x: Sequence[float], y: Sequence[float], style: str) -> None:
        """A line through points; ``style``: further SVG attributes."""
        points = " ".join(f"{self.to_x(a):.1f},{self.to_y(b):.1f}" for a, b in zip(x, y, strict=True))
        self.parts.append(f'<polyline points="{points}" fill="none" stroke-linejoin="round" {style}/>')

    def dots(self, x: Sequence[float], y: Sequence[float], colour: str) -> None:
        """A dot a point."""
        for a, b in zip(x, y, strict=True):
            self.parts.append(f'<circle cx="{self.to_x(a):.1f}" cy="{self.to_y(b):.1f}" r="2.2" fill="{colour}"/>')

    def bars(self, edges: np.ndarray, counts: np.ndarray, colour: str, opacity: float) -> None:
        """A histogram."""
        floor = self.to_y(0)
        for low, high, count in zip(edges[:-1], edges[1:], counts, strict=True):
            if count:
                left, top = self.to_x(low), self.to_y(count)
                size = f'width="{self.to_x(high) - left:.1f}" height="{floor - top:.1f}"'
                self.parts.append(
                    f'<rect x="{left:.1f}" y="{top:.1f}" {size} fill="{colour}" fill-opacity="{opacity}" '
                    f'stroke="{colour}" stroke-width=".8"/>'
                )

    def rule(self, colour: str, x: float | None = None, y: float | None = None, dash: str = "4 3") -> None:
        """A thin line across the whole plot at one x or one y."""
        path = f"M{self.to_x(x):.1f} {TOP}V{BOTTOM}" if x is not None else f"M{LEFT} {self.to_y(y or 0):.1f}H{RIGHT}"
        self.parts.append(f'<path d="{path}" stroke="{colour}" stroke-width="1.2" stroke-dasharray="{dash}"/>')

    def svg(self) -> str:
        """The finished <svg> element."""
        head = [f'<text x="8" y="16" class="title">{escape(self.title)}</text>']
        at = 8.0
        for label, colour, dashed in self.legend:
            dash = ' stroke-dasharray="4 2.5"' if dashed else ""
            head.append(f'<path d="M{at:.0f} 31h14" stroke="{colour}" stroke-width="2.4"{dash}/>')
            head.append(f'<text x="{at + 18:.0f}" y="34.5">{escape(label)}</text>')
            at += 32 + 5.7 * len(label)
        label = escape(self.title, quote=True)
        return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(head + self.parts)}</svg>'


def curves_svg(
    title: str, curves: Sequence[Curve], level: float | None = None, log: bool = False, marks: Sequence[float] = ()
) -> str:
    """A panel of training curves over steps. ``level``: a thin line at a value that means something. ``marks``: steps
    at which a guard fired."""
    flat = [v for c in curves for v in c.values] + ([] if level is None else [level])
    steps = [s for c in curves for s in c.steps]
    figure = Figure(title, (min(steps), max(steps)), (min(flat), max(flat)), log and min(flat) > 0)
    if level is not None:
        figure.rule(INK, y=level, dash="2 3")
    for mark in marks:
        figure.rule(WARN, x=mark, dash="1 3")
    for curve in curves:
        if curve.base is not None:
            figure.rule(curve.colour, y=curve.base, dash="1 4")
        x, y = np.asarray(curve.steps, float), np.asarray(curve.values, float)
        if len(x) > MAX_RAW and not curve.dashed:
            figure.line(x.tolist(), y.tolist(), f'stroke="{curve.colour}" stroke-width=".7" opacity=".28"')
            window = max(3, len(x) // 30)
            x, y = _running(x, window), _running(y, window)
        dash = 'stroke-dasharray="5 3"' if curve.dashed else ""
        figure.line(x.tolist(), y.tolist(), f'stroke="{curve.colour}" stroke-width="1.8" {dash}')
        if len(x) < 15:
            figure.dots(x.tolist(), y.tolist(), curve.colour)
        if not curve.dashed or not any(c.label == curve.label and not c.dashed for c in curves):
            figure.legend.append((curve.label, curve.colour, curve.dashed))
    if any(curve.dashed for curve in curves):
        figure.legend.append(("held out", INK, True))
    if any(curve.base is not None for curve in curves):
        figure.legend.append(("··· base", INK, False))
    return figure.svg()


def heat_svg(title: str, rows: Sequence[tuple[str, Sequence[float], Sequence[float]]]) -> str:
    """A number of several places over steps: a row a place, (name, steps, values), darker for more. At least one value
    in all."""
    flat = [v for _, _, values in rows for v in values]
    low, high = min(flat), max(flat)
    every = sorted({s for _, steps, _ in rows for s in steps})
    gap = float(np.median(np.diff(every))) if len(every) > 1 else 1.0
    figure = Figure(title, (every[0] - gap / 2, every[-1] + gap / 2), (0.0, float(len(rows))))
    figure.parts = [part for part in figure.parts if 'text-anchor="end"' not in part and f'd="M{LEFT} ' not in part]
    for at, (name, steps, values) in enumerate(rows):
        top, bottom = figure.to_y(len(rows) - at), figure.to_y(len(rows) - at - 1)
        if len(rows) <= MAX_NAMED or at % (len(rows) // MAX_NAMED + 1) == 0:
            label = f'<text x="{LEFT - 6}" y="{(top + bottom) / 2 + 3.5:.1f}" text-anchor="end">{escape(name)}</text>'
            figure.parts.append(label)
        for step, value in zip(steps, values, strict=True):
            left, width = figure.to_x(step - gap / 2), figure.to_x(step + gap / 2) - figure.to_x(step - gap / 2)
            share = 1.0 if high == low else (value - low) / (high - low)
            figure.parts.append(
                f'<rect x="{left:.1f}" y="{top:.1f}" width="{width + 0.3:.1f}" height="{bottom - top + 0.3:.1f}" '
                f'fill="{A}" fill-opacity="{0.06 + 0.9 * share:.2f}"/>'
            )
    said = f"always {number(low)}" if high == low else f"{number(low)} (light) to {number(high)} (dark)"
    figure.legend.append((said, A, False))
    return figure.svg()


def histograms_svg(title: str, a: Sequence[float], b: Sequence[float], labels: tuple[str, str]) -> str:
    """Scores of both sides over one axis, with their means."""
    low, high = min(*a, *b), max(*a, *b)
    edges = np.linspace(low, high if high > low else low + 1, int(np.clip(len(a) ** 0.5, 8, 40)) + 1)
    counts_a, counts_b = np.histogram(a, edges)[0], np.histogram(b, edges)[0]
    figure = Figure(title, (float(edges[0]), float(edges[-1])), (0, float(max(counts_a.max(), counts_b.max()))))
    for values, counts, colour, label in ((b, counts_b, B, labels[1]), (a, counts_a, A, labels[0])):
        figure.bars(edges, counts, colour, 0.3)
        figure.rule(colour, x=float(np.mean(values)))
        figure.legend.append((f"{label}, mean {number(float(np.mean(values)))}", colour, False))
    return figure.svg()


def gains_svg(title: str, gains: Sequence[float]) -> str:
    """Gains a pair: left of zero lost, right of it won."""
    values = np.asarray(gains, float)
    reach = max(1e-9, float(np.abs(values).max()))
    half = np.linspace(0, reach, int(np.clip(len(values) ** 0.5 / 2, 5, 20)) + 1)
    edges = np.concatenate([-half[:0:-1], half])
    won, lost = np.histogram(values[values > 0], edges)[0], np.histogram(values[values < 0], edges)[0]
    figure = Figure(title, (-reach, reach), (0, float(max(1, won.max(), lost.max()))))
    figure.bars(edges, lost, WARN, 0.55)
    figure.bars(edges, won, A, 0.55)
    figure.rule(INK, x=0.0, dash="none")
    figure.rule(INK, x=float(values.mean()))
    tied = int((values == 0).sum())
    figure.legend = [(f"lost {int(lost.sum())}", WARN, False), (f"won {int(won.sum())}", A, False)]
    figure.legend += [(f"mean {number(float(values.mean()), sign=True)}" + f", tied {tied}" * (tied > 0), INK, True)]
    return figure.svg()


def number(value: float, sign: bool = False) -> str:
    """A short number with a true minus."""
    return f"{value:{'+' if sign else ''}.4g}".replace("-", "−").replace("e−0", "e−").replace("e+0", "e")


def _widen(low: float, high: float, share: float) -> tuple[float, float]:
    if high == low == 0:
        return 0.0, 1.0
    if high <= low:
        pad = abs(low) * 0.1 or 1.0
        return low - pad, high + pad
    pad = share * (high - low)
    return (low - pad if low != 0 or share < 0.05 else low), high + pad


def _scale(low: float, high: float, start: float, stop: float) -> Callable[[float], float]:
    return lambda value: start + (value - low) / (high - low) * (stop - start)


def _running(values: np.ndarray, window: int) -> np.ndarray:
    return np.convolve(values, np.ones(window) / window, mode="valid")
