"""The curves of a run: loss, validation and learning rate in one chart, memory in another, with smoothing, log scale and zoom."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ipywidgets as widgets

from everydream_kit.panels import style
from everydream_kit.panels.panel import set_html
from everydream_kit.panels.svg_charts import Point, line_chart, smooth
from everydream_kit.runs.history import RunHistory, thin

SMOOTHING = 0.9
"""As TensorBoard begins."""
GIB = 2**30


class CurveBox:
    """Charts of a run and their controls.

    Attributes:
        box: the widget to show.
        smoothing, is_log, zoom: the controls; `zoom` is the first and the last step that are shown.
    """

    def __init__(self) -> None:
        self._view: RunHistory | None = None
        scale: dict[str, Any] = {"value": SMOOTHING, "min": 0.0, "max": 0.99, "step": 0.01, "continuous_update": False}
        self.smoothing = style.control(widgets.FloatSlider, "Smoothing", "300px", label="80px", **scale)
        self.is_log = style.control(widgets.Checkbox, "log scale", "auto", value=False, indent=False)
        scale = {"value": (0, 1), "min": 0, "max": 1, "continuous_update": False}
        self.zoom = style.control(widgets.IntRangeSlider, "Steps", "340px", label="44px", **scale)
        self.chart, self.memory_chart, self.notes = widgets.HTML(), widgets.HTML(), widgets.HTML()
        for control in (self.smoothing, self.is_log, self.zoom):
            control.observe(lambda _: self._render(), "value")
        self.controls = style.row(self.smoothing, self.zoom, self.is_log, gap="4px 18px")
        self.box = style.column(self.chart, self.controls, self.memory_chart, self.notes)

    def reset(self) -> None:
        """Show all steps, also those to come."""
        self._view = None
        self.zoom.min, self.zoom.max = 0, 1
        self.zoom.value = (0, 1)

    def show(self, view: RunHistory) -> None:
        """Show what a run has said by now."""
        self._view = view
        last = max([1, *(points[-1][0] for points in (view.loss, view.validation) if points)])
        first, end = self.zoom.value
        follows = end == self.zoom.max
        self.zoom.max = last
        if follows and last != end:
            self.zoom.value = (first, last)  # it draws
        else:
            self._render()
        self.controls.layout.display = "" if len(view.loss) > 1 else "none"
        set_html(self.notes, style.note("\n".join(view.messages[-5:]), "warn"))

    def _render(self) -> None:
        if self._view is None:
            return
        view = self._view
        smoothed = smooth(view.loss, self.smoothing.value)  # of all steps, so that zooming changes no value
        curves = {
            "raw": thin(self._zoomed(view.loss)),
            "loss, smoothed" if self.smoothing.value else "loss": thin(self._zoomed(smoothed)),
            "validation": thin(self._zoomed(view.validation)),
            "validation, EMA": thin(self._zoomed(view.averaged_validation)),
        }
        rates = {f"learning rate, {part.replace('_', ' ')}": points for part, points in view.learning_rates.items()}
        if len({tuple(points) for points in rates.values()}) == 1:
            rates = {"learning rate": next(iter(rates.values()))}
        second = {name: thin(self._zoomed(points)) for name, points in rates.items()}
        options: dict[str, Any] = {"faint": "raw", "second": second, "is_log": self.is_log.value}
        set_html(self.chart, both_widths(curves, title="Loss", **options))
        memory = [(step, value / GIB) for step, value in self._zoomed(view.memory)] if view.has_gpu else []
        chart = both_widths({"GPU memory, peak": thin(memory)}, title="GiB", height=120) if memory else ""
        set_html(self.memory_chart, chart)

    def _zoomed(self, points: Sequence[Point]) -> list[Point]:
        first, last = self.zoom.value
        return [(step, value) for step, value in points if first <= step <= last]


def both_widths(curves: dict[str, list[Point]], **options: Any) -> str:
    """A chart for wide panels and one for narrow ones, of which one is shown: scaled down, its text could not be read."""
    wide, narrow = line_chart(curves, **options), line_chart(curves, width=520, **options)
    return (
        f'<div class="edk-charted"><div class="edk-if-wide">{wide}</div><div class="edk-if-narrow">{narrow}</div></div>'
    )
