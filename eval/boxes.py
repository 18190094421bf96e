"""Scores of several models as boxes over one axis, as inline SVG."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import numpy as np

from .plots import INK, LINE, A, B, number, ticks

WIDTH, LEFT, RIGHT, TOP, ROW = 400, 12, 392, 30, 34


def boxes_svg(title: str, values: Sequence[Sequence[float]], labels: Sequence[str]) -> str:
    """A row a model: 5th to 95th percentile as a line, quartiles as a box, the median as a bar, the mean as a dot. The
    first model, the base, is grey."""
    every = np.concatenate([np.asarray(v, float) for v in values])
    low, high = np.quantile(every, [0.01, 0.99])
    low, high = (low, high) if high > low else (low - 1.0, high + 1.0)
    pad = 0.04 * (high - low)
    low, high = float(low - pad), float(high + pad)
    bottom = TOP + ROW * len(values)

    def x(value: float) -> float:
        return LEFT + (min(max(value, low), high) - low) / (high - low) * (RIGHT - LEFT)

    parts = [f'<text x="8" y="16" class="title">{escape(title)}</text>']
    for value in ticks(low, high):
        parts.append(f'<path d="M{x(value):.1f} {TOP}V{bottom}" stroke="{LINE}"/>')
        parts.append(f'<text x="{x(value):.1f}" y="{bottom + 14}" text-anchor="middle">{number(value)}</text>')
    for place, (found, label) in enumerate(zip(values, labels, strict=True)):
        colour, top = (B if place == 0 else A), TOP + ROW * place
        q5, q25, q50, q75, q95 = (x(float(q)) for q in np.quantile(found, [0.05, 0.25, 0.5, 0.75, 0.95]))
        middle = top + 24
        mean = x(float(np.mean(found)))
        parts += [
            f'<text x="{LEFT + 2}" y="{top + 12}">{escape(label)}, mean {number(float(np.mean(found)))}</text>',
            f'<path d="M{q5:.1f} {middle}H{q95:.1f}" stroke="{colour}" stroke-width="1.4"/>',
            f'<rect x="{q25:.1f}" y="{middle - 6}" width="{max(1.0, q75 - q25):.1f}" height="12" rx="2" '
            f'fill="{colour}" fill-opacity=".3" stroke="{colour}"/>',
            f'<path d="M{q50:.1f} {middle - 6}v12" stroke="{colour}" stroke-width="2.2"/>',
            f'<circle cx="{mean:.1f}" cy="{middle}" r="2.6" fill="{INK}"/>',
        ]
    label = escape(title, quote=True)
    return f'<svg viewBox="0 0 {WIDTH} {bottom + 24}" role="img" aria-label="{label}">{"".join(parts)}</svg>'
