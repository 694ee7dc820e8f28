"""Line and bar charts as SVG text, for an `HTML` widget: no script, no library, about a millisecond each.

Colours and fonts come from the panel's style sheet (classes `edk-line-N`, `edk-axis`), so charts follow the theme.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence

Point = tuple[float, float]


def line_chart(
    curves: Mapping[str, Sequence[Point]],
    *,
    title: str,
    width: int = 900,
    height: int = 240,
    faint: str | None = None,
) -> str:
    """Curves over a common axis of steps.

    Args:
        curves: name to points (x ascending). Empty curves are left out of the drawing and of the legend.
        title: what the values are; read aloud by screen readers with the last values.
        faint: name of a curve that is drawn pale and left out of the legend.
    """
    drawn = {name: points for name, points in curves.items() if points}
    if not drawn:
        return (
            f'<div class="edk-empty" style="height:{height}px">{html.escape(title)}: '
            "the curve begins with the first logged step</div>"
        )
    left, right, top, bottom = 62, width - 14, 30, height - 28
    xs = [x for points in drawn.values() for x, _ in points]
    ys = [y for points in drawn.values() for _, y in points if math.isfinite(y)]
    x_low, x_high = min(xs), max(*xs, min(xs) + 1)
    x_ticks = [tick for tick in nice_ticks(x_low, x_high, 6) if tick == int(tick)]  # there is no half step
    y_ticks = nice_ticks(min(ys, default=0), max(ys, default=1), 4)
    y_low, y_high = y_ticks[0], y_ticks[-1]

    def place(x: float, y: float) -> str:
        across = left + (right - left) * (x - x_low) / (x_high - x_low)
        up = bottom - (bottom - top) * (y - y_low) / (y_high - y_low)
        return f"{across:.1f},{up:.1f}"

    parts = [_frame(title, drawn, width, height, faint)]
    for tick in y_ticks:
        up = bottom - (bottom - top) * (tick - y_low) / (y_high - y_low)
        parts.append(f'<line class="edk-grid" x1="{left}" x2="{right}" y1="{up:.1f}" y2="{up:.1f}"/>')
        parts.append(f'<text class="edk-axis" x="{left - 8}" y="{up + 4:.1f}" text-anchor="end">{tick:.3g}</text>')
    for tick in x_ticks:
        if x_low <= tick <= x_high:
            across = left + (right - left) * (tick - x_low) / (x_high - x_low)
            parts.append(
                f'<text class="edk-axis" x="{across:.1f}" y="{height - 10}" text-anchor="middle">{tick:g}</text>'
            )
    for name, points in drawn.items():
        style = _style_of(name, drawn, faint)
        if len(points) == 1:
            across, up = place(*points[0]).split(",")
            parts.append(f'<circle class="edk-dot {style}" cx="{across}" cy="{up}" r="2.5"/>')
        else:
            path = " ".join(place(x, y) for x, y in points if math.isfinite(y))
            parts.append(f'<polyline class="edk-line {style}" points="{path}"/>')
    return "".join(parts) + "</svg>"


def _frame(title: str, drawn: Mapping[str, Sequence[Point]], width: int, height: int, faint: str | None) -> str:
    """Opening of the SVG with title and legend."""
    spoken = ", ".join(f"{name} {points[-1][1]:.4g} at step {points[-1][0]:g}" for name, points in drawn.items())
    parts = [
        f'<svg class="edk-chart" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{html.escape(f"{title}: {spoken}", quote=True)}">',
        f'<text class="edk-chart-title" x="0" y="14">{html.escape(title)}</text>',
    ]
    across = width - 14
    for name in reversed([name for name in drawn if name != faint]):
        label = f"{name} {drawn[name][-1][1]:.4g}"
        across -= 7 * len(label) + 26
        parts.append(
            f'<rect class="edk-key {_style_of(name, drawn, faint)}" x="{across}" y="7" width="14" height="4" rx="2"/>'
        )
        parts.append(f'<text class="edk-axis" x="{across + 19}" y="14">{html.escape(label)}</text>')
    return "".join(parts)


def _style_of(name: str, drawn: Mapping[str, Sequence[Point]], faint: str | None) -> str:
    """Class of a curve: colours go to the curves of the legend, in order."""
    if name == faint:
        return "edk-faint"
    return f"edk-line-{[other for other in drawn if other != faint].index(name) % 4}"


def bar_chart(
    bars: Sequence[tuple[str, float, str]],
    *,
    title: str,
    width: int = 900,
    row_height: int = 22,
    label_width: int = 110,
) -> str:
    """Horizontal bars in the given order: (name, length, words beside it)."""
    if not bars:
        return f'<div class="edk-empty">{html.escape(title)}: nothing to show yet</div>'
    most = max(value for _, value, _ in bars) or 1
    height = 26 + row_height * len(bars)
    parts = [
        f'<svg class="edk-chart" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{html.escape(title, quote=True)}">',
        f'<text class="edk-chart-title" x="0" y="14">{html.escape(title)}</text>',
    ]
    for number, (name, value, words) in enumerate(bars):
        y = 26 + row_height * number
        length = (width - label_width - 130) * value / most
        label = html.escape(_cut(name, label_width // 7))
        parts.append(f'<text class="edk-axis" x="{label_width - 8}" y="{y + 14}" text-anchor="end">{label}</text>')
        shape = f'x="{label_width}" y="{y + 4}" width="{max(2, length):.1f}" height="{row_height - 8}"'
        parts.append(f'<rect class="edk-bar" {shape} rx="3"/>')
        parts.append(
            f'<text class="edk-axis" x="{label_width + 8 + length:.1f}" y="{y + 14}">{html.escape(words)}</text>'
        )
    return "".join(parts) + "</svg>"


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def nice_ticks(low: float, high: float, count: int) -> list[float]:
    """Round numbers from at or below `low` to at or above `high`, about `count` of them, at least two."""
    if high <= low:
        high = low + (abs(low) or 1.0) * 0.1
    raw = (high - low) / max(1, count - 1)
    magnitude = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * magnitude for factor in (1, 2, 2.5, 5, 10) if factor * magnitude >= raw * 0.999)
    first = math.floor(low / step)
    last = math.ceil(high / step)
    return [round(i * step, 12 - math.floor(math.log10(step))) for i in range(first, last + 1)]
