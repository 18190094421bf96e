"""Figures of the report as inline SVG whose colours are CSS variables, so that they follow light and dark."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Stand-ins that matplotlib draws with, and the CSS variables that take their place.
INK, FAINT, A, B, WARN = "#010101", "#020202", "#030303", "#040404", "#050505"
VARIABLES = {INK: "var(--ink-2)", FAINT: "var(--line)", A: "var(--a)", B: "var(--b)", WARN: "var(--warn)"}
MAX_RAW = 120  # points of a curve above which a running mean is drawn over it


@dataclass(frozen=True)
class Curve:
    """One line of a panel; ``dashed`` for held-out numbers."""

    label: str
    steps: Sequence[float]
    values: Sequence[float]
    colour: str = A
    dashed: bool = False


def figure(width: float, height: float) -> tuple[Figure, Axes]:
    """An empty figure in the report's style; inches at 72 dots."""
    from matplotlib.figure import Figure

    fig = Figure(figsize=(width, height), layout="constrained")
    ax = fig.add_subplot()
    ax.spines[["top", "right"]].set_visible(False)
    for spine in ax.spines.values():
        spine.set_color(FAINT)
    ax.tick_params(which="both", colors=INK, labelsize=8.5, length=3, color=FAINT)
    ax.grid(axis="y", color=FAINT, linewidth=0.6)
    ax.set_axisbelow(True)
    return fig, ax


def to_svg(fig: Figure, name: str, alt: str) -> str:
    """An <svg> element. ``name`` keeps its inner ids apart from those of other figures; equal data give equal text."""
    import matplotlib

    stream = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        fig.savefig(stream, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Type": None})
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"""font: (\S+) [^;"]*""", r"font: \1 system-ui, sans-serif", text)
    text = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{name}-", text)
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, variable)
    text = re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', "", text, count=1)
    return text.replace("<svg", f'<svg role="img" aria-label="{alt}"', 1)


def curves_svg(name: str, title: str, curves: Sequence[Curve], level: float | None = None, log: bool = False) -> str:
    """A panel of training curves over steps. ``level``: a thin line at a value that means something."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    fig, ax = figure(4, 2.3)
    if level is not None:
        ax.axhline(level, color=INK, linewidth=0.8, linestyle=(0, (2, 3)))
    for curve in curves:
        x, y = np.asarray(curve.steps, float), np.asarray(curve.values, float)
        style = (0, (4, 2)) if curve.dashed else "-"
        if len(x) > MAX_RAW and not curve.dashed:
            ax.plot(x, y, color=curve.colour, linewidth=0.6, alpha=0.25)
            window = max(3, len(x) // 30)
            x, y = _running(x, window), _running(y, window)
        marker = "o" if len(x) < 15 else None
        ax.plot(
            x, y, color=curve.colour, linewidth=1.6, linestyle=style, label=curve.label, marker=marker, markersize=2.5
        )
    if log and all(v > 0 for c in curves for v in c.values):
        ax.set_yscale("log")
        for axis in (ax.yaxis.set_major_formatter, ax.yaxis.set_minor_formatter):
            axis(FuncFormatter(lambda value, _: f"{value:g}"))
        ax.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
    else:
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.6g}".replace("-", "−")))
    ax.set_title(title, fontsize=10.5, color=INK, loc="left")
    if len(curves) > 1:
        if not log:
            low, high = ax.get_ylim()
            ax.set_ylim(top=high + (0.14 + 0.1 * (len(curves) > 2)) * (high - low))  # room for the legend
        ax.legend(fontsize=8, frameon=False, labelcolor=INK, ncols=min(2, len(curves)), loc="upper left")
    return to_svg(fig, name, title)


def histograms_svg(name: str, title: str, a: Sequence[float], b: Sequence[float], labels: tuple[str, str]) -> str:
    """Scores of both sides over one axis, as steps."""
    fig, ax = figure(4, 2.3)
    low, high = min(*a, *b), max(*a, *b)
    bins = np.linspace(low, high if high > low else low + 1, int(np.clip(len(a) ** 0.5, 8, 40)) + 1).tolist()
    for values, colour, label, fill in ((b, B, labels[1], 0.25), (a, A, labels[0], 0.25)):
        ax.hist(values, bins, color=colour, alpha=fill)
        ax.hist(
            values, bins, histtype="step", color=colour, linewidth=1.4, label=f"{label}, mean {np.mean(values):.4g}"
        )
        ax.axvline(float(np.mean(values)), color=colour, linewidth=1.2, linestyle=(0, (3, 2)))
    ax.set_title(title, fontsize=10.5, color=INK, loc="left")
    ax.set_ylim(top=ax.get_ylim()[1] * 1.3)  # room for the legend
    ax.legend(fontsize=8, frameon=False, labelcolor=INK, loc="upper left", ncols=2)
    return to_svg(fig, name, title)


def gains_svg(name: str, title: str, gains: Sequence[float]) -> str:
    """Gains a prompt: left of zero lost, right of it won."""
    fig, ax = figure(4, 2.3)
    reach = max(1e-9, float(np.abs(gains).max()))
    half = np.linspace(0, reach, int(np.clip(len(gains) ** 0.5 / 2, 5, 20)) + 1)
    bins = np.concatenate([-half[:0:-1], half]).tolist()
    values = np.asarray(gains)
    ax.hist(values[values < 0], bins, color=WARN, alpha=0.7, label=f"lost {int((values < 0).sum())}")
    ax.hist(values[values > 0], bins, color=A, alpha=0.7, label=f"won {int((values > 0).sum())}")
    ax.axvline(0, color=INK, linewidth=0.8)
    ax.axvline(
        float(values.mean()), color=INK, linewidth=1.2, linestyle=(0, (3, 2)), label=f"mean {values.mean():+.3g}"
    )
    ax.set_title(title, fontsize=10.5, color=INK, loc="left")
    ax.set_ylim(top=ax.get_ylim()[1] * 1.3)
    ax.legend(fontsize=8, frameon=False, labelcolor=INK, loc="upper left", ncols=3)
    return to_svg(fig, name, title)


def _running(values: np.ndarray, window: int) -> np.ndarray:
    return np.convolve(values, np.ones(window) / window, mode="valid")
