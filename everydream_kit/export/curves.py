"""Training curves as a small PNG, drawn from a run's events with Pillow alone.

Two panels, one above the other: the loss (each logged point faint, a running mean over it, the validation loss where
there is one) and the learning rate. For a model card; the panels and TensorBoard have charts of their own.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from everydream_kit.runs import RunFolder
from everydream_kit.runs.history import RunHistory

if TYPE_CHECKING:
    from PIL.ImageDraw import ImageDraw

WIDTH, PANEL_HEIGHT, LEFT, MARGIN = 720, 220, 70, 28
INK, GRID, FAINT, BLUE, ORANGE = "#24292f", "#d8dee4", "#b6cdf5", "#1f5fbf", "#c2571a"
Points = list[tuple[float, float]]


def draw_curves(run: RunFolder) -> bytes | None:
    """The curves as a PNG, or None where fewer than two losses were logged."""
    from PIL import Image, ImageDraw

    history = RunHistory(run)
    history.update()
    rates = next(iter(history.learning_rates.values()), [])
    loss, validation, rate = (
        [(float(step), value) for step, value in points if math.isfinite(value)]
        for points in (history.loss, history.validation, rates)
    )
    if len(loss) < 2:
        return None
    panels = [
        [("loss", loss, FAINT), ("running mean", running_mean(loss), BLUE), ("validation loss", validation, ORANGE)]
    ]
    if len(rate) > 1:
        panels.append([("learning rate", rate, BLUE)])
    image = Image.new("RGB", (WIDTH, PANEL_HEIGHT * len(panels)), "white")
    draw = ImageDraw.Draw(image)
    for number, lines in enumerate(panels):
        _draw_panel(draw, number * PANEL_HEIGHT, [line for line in lines if line[1]])
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return file.getvalue()


def running_mean(points: Points, share: float = 0.05) -> Points:
    """Mean over a window of the last `share` of all points (at least 5), so that a noisy loss shows its course."""
    window = max(5, round(len(points) * share))
    means, total = [], 0.0
    for index, (step, value) in enumerate(points):
        total += value - (points[index - window][1] if index >= window else 0.0)
        means.append((step, total / min(index + 1, window)))
    return means


def _draw_panel(draw: ImageDraw, top: int, lines: Sequence[tuple[str, Points, str]]) -> None:
    from PIL import ImageFont

    font = ImageFont.load_default(13)
    steps = [step for _, points, _ in lines for step, _ in points]
    values = [value for _, points, _ in lines for _, value in points]
    low, high = min(*values, 0.0), max(values) or 1.0
    first, last = min(steps), max(*steps, min(steps) + 1)
    bottom, height = top + PANEL_HEIGHT - MARGIN, PANEL_HEIGHT - 2 * MARGIN

    def place(step: float, value: float) -> tuple[float, float]:
        across = (step - first) / (last - first)
        return LEFT + across * (WIDTH - LEFT - MARGIN), bottom - (value - low) / (high - low) * height

    for quarter in range(5):
        value = low + (high - low) * quarter / 4
        y = place(first, value)[1]
        draw.line([(LEFT, y), (WIDTH - MARGIN, y)], fill=GRID)
        draw.text((LEFT - 8, y), f"{value:.3g}", fill=INK, font=font, anchor="rm")
    draw.text((LEFT, bottom + 6), f"step {first:.0f}", fill=INK, font=font)
    draw.text((WIDTH - MARGIN, bottom + 6), f"{last:.0f}", fill=INK, font=font, anchor="ra")
    across = LEFT
    for label, points, color in lines:
        draw.line([place(*point) for point in points], fill=color, width=1 if color == FAINT else 2, joint="curve")
        draw.text((across, top + 6), label, fill=INK if color == FAINT else color, font=font)
        across += int(draw.textlength(label, font=font)) + 24
