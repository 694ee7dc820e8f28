"""Line and bar charts as SVG text, for an `HTML` widget: no script, no library, about a millisecond each.

Colors and fonts come from the panel's style sheet (classes `edk-line-N`, `edk-axis`), so charts follow the theme.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Point = tuple[float, float]


@dataclass(frozen=True)
class Axis:
    """A scale from values to pixels.

    Attributes:
        ticks: where a value is written; the first and the last are the ends of the scale.
        start, end: pixels of these ends.
        is_log: pixels go by the logarithm.
    """

    ticks: Sequence[float]
    start: float
    end: float
    is_log: bool = False

    @classmethod
    def around(cls, values: Sequence[float], start: float, end: float, *, is_log: bool = False) -> Axis:
        """A scale with round numbers at its ends; logarithmic only where all values are above zero."""
        finite = [value for value in values if math.isfinite(value)]
        if is_log and finite and min(finite) > 0:
            return cls(log_ticks(min(finite), max(finite)), start, end, is_log=True)
        return cls(nice_ticks(min(finite, default=0), max(finite, default=1), 4), start, end)

    def place(self, value: float) -> float:
        """The pixel of a value."""
        scale = math.log if self.is_log else float
        low, high = scale(self.ticks[0]), scale(self.ticks[-1])
        return self.start + (self.end - self.start) * (scale(value) - low) / (high - low)

    def can_place(self, value: float) -> bool:
        return math.isfinite(value) and (value > 0 or not self.is_log)


def line_chart(
    curves: Mapping[str, Sequence[Point]],
    *,
    title: str,
    width: int = 900,
    height: int = 240,
    faint: str | None = None,
    second: Mapping[str, Sequence[Point]] | None = None,
    is_log: bool = False,
) -> str:
    """Curves over a common axis of steps.

    Args:
        curves: name to points (x ascending). Empty curves are left off the chart and the legend.
        title: what the values are; read aloud by screen readers with the last values.
        faint: name of a curve that is pale and off the legend.
        second: curves of another unit, dashed, with an axis of their own on the right.
        is_log: the left axis is logarithmic.
    """
    drawn = {name: points for name, points in curves.items() if points}
    if not drawn:
        return (
            f'<div class="edk-empty" style="height:{height}px">{html.escape(title)}: '
            "the curve begins with the first logged step</div>"
        )
    others = {name: points for name, points in (second or {}).items() if points}
    styles = {name: _style_of(name, drawn, faint) for name in drawn}
    styles |= {name: f"edk-dashed edk-line-{(len(drawn) + number) % 4}" for number, name in enumerate(others)}
    named = {name: (styles[name], points) for name, points in {**drawn, **others}.items() if name != faint}
    legend, top = _legend(named, width, title)
    height += top - 30
    right, bottom = width - (62 if others else 14), height - 44
    xs = [x for points in drawn.values() for x, _ in points]
    across = _steps_axis(min(xs), max(xs), 62, right)
    left = Axis.around(_values(drawn), bottom, top, is_log=is_log)
    spoken = ", ".join(f"{name} {points[-1][1]:.4g} at step {points[-1][0]:g}" for name, (_, points) in named.items())
    parts = [
        f'<svg class="edk-chart" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{html.escape(f"{title}: {spoken}", quote=True)}">',
        legend,
        _grid(left, across, height, right),
    ]
    parts += [_curve(points, across, left, styles[name]) for name, points in drawn.items()]
    if others:
        other = Axis.around(_values(others), bottom, top)
        for tick in other.ticks:
            up = other.place(tick) + 4
            parts.append(f'<text class="edk-axis" x="{right + 8}" y="{up:.1f}" text-anchor="start">{tick:.3g}</text>')
        parts += [_curve(points, across, other, styles[name]) for name, points in others.items()]
    return "".join(parts) + "</svg>"


def _values(curves: Mapping[str, Sequence[Point]]) -> list[float]:
    return [y for points in curves.values() for _, y in points]


def _steps_axis(low: float, high: float, start: float, end: float) -> Axis:
    """The axis of steps: it ends where the curves end, and names whole steps only, since there is no half step."""
    high = max(high, low + 1)
    inner = [tick for tick in nice_ticks(low, high, 6) if tick == int(tick) and low <= tick <= high]
    return Axis([low, *inner, high], start, end)


def _grid(left: Axis, across: Axis, height: int, right: float) -> str:
    parts = []
    for tick in left.ticks:
        up = left.place(tick)
        parts.append(f'<line class="edk-grid" x1="62" x2="{right}" y1="{up:.1f}" y2="{up:.1f}"/>')
        parts.append(f'<text class="edk-axis" x="54" y="{up + 4:.1f}" text-anchor="end">{tick:.3g}</text>')
    for tick in across.ticks[1:-1]:
        x, y = across.place(tick), height - 26
        parts.append(f'<text class="edk-axis" x="{x:.1f}" y="{y}" text-anchor="middle">{tick:g}</text>')
    parts.append(f'<text class="edk-axis" x="{right}" y="{height - 8}" text-anchor="end">step</text>')
    return "".join(parts)


def _curve(points: Sequence[Point], across: Axis, up: Axis, style: str) -> str:
    shown = [(across.place(x), up.place(y)) for x, y in points if up.can_place(y)]
    if len(shown) == 1:
        return f'<circle class="edk-dot {style}" cx="{shown[0][0]:.1f}" cy="{shown[0][1]:.1f}" r="2.5"/>'
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in shown)
    return f'<polyline class="edk-line {style}" points="{path}"/>'


def _legend(curves: Mapping[str, tuple[str, Sequence[Point]]], width: int, title: str) -> tuple[str, int]:
    """Names with their last values behind the title, in as many lines as they need. Returns them and the pixels below."""
    parts = [f'<text class="edk-chart-title" x="0" y="14">{html.escape(title)}</text>']
    across, line = 8 * len(title) + 24, 0
    for name, (style, points) in curves.items():
        label = f"{name} {points[-1][1]:.4g}"
        needed = 6 * len(label) + 40
        if across + needed > width and across > 0:
            across, line = 0, line + 1
        up = 14 + 17 * line
        parts.append(f'<rect class="edk-key {style}" x="{across}" y="{up - 7}" width="14" height="4" rx="2"/>')
        parts.append(f'<text class="edk-axis" x="{across + 19}" y="{up}">{html.escape(label)}</text>')
        across += needed
    return "".join(parts), 30 + 17 * line


def _style_of(name: str, drawn: Mapping[str, Sequence[Point]], faint: str | None) -> str:
    """Class of a curve: colors go to the curves of the legend, in order."""
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
    """Horizontal bars in the given order: (name, length, words next to it)."""
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


def sparkline(points: Sequence[Point], title: str, *, width: int = 110, height: int = 34) -> str:
    """A curve without axes, for a table; its first and last value are read aloud."""
    shown = [(x, y) for x, y in points if math.isfinite(y)]
    if len(shown) < 2:
        return f'<svg class="edk-spark" width="{width}" height="{height}" aria-hidden="true"></svg>'
    across = Axis([shown[0][0], shown[-1][0]], 3, width - 3)
    low, high = min(y for _, y in shown), max(y for _, y in shown)
    up = Axis([low, high if high > low else low + 1], height - 4, 4)
    path = " ".join(f"{across.place(x):.1f},{up.place(y):.1f}" for x, y in shown)
    words = html.escape(f"{title}: from {shown[0][1]:.3g} to {shown[-1][1]:.3g}", quote=True)
    return (
        f'<svg class="edk-spark" width="{width}" height="{height}" role="img" aria-label="{words}"><title>{words}</title>'
        f'<polyline class="edk-line edk-line-0" points="{path}"/></svg>'
    )


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten, from at or below `low` to at or above `high`; powers of ten alone over a wide range."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    factors = (1.0, 2.0, 5.0) if last - first <= 3 else (1.0,)
    ticks = [factor * 10.0**power for power in range(first, last + 1) for factor in factors]
    below = [tick for tick in ticks if tick <= low * 1.0000001]
    above = [tick for tick in ticks if tick >= high * 0.9999999]
    chosen = [tick for tick in ticks if max(below) <= tick <= min(above)]
    return chosen if len(chosen) > 1 else [chosen[0], chosen[0] * 10]


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


def smooth(points: Sequence[Point], weight: float = 0.9) -> list[Point]:
    """Exponential moving average with bias correction, as TensorBoard draws it."""
    result: list[Point] = []
    average = scale = 0.0
    for step, value in points:
        average = weight * average + (1 - weight) * value
        scale = weight * scale + (1 - weight)
        result.append((step, average / scale))
    return result
