"""The panels' clock: the browser asks for news twice a second while the panel is in view, and a quarter as often elsewhere.

A widget change made from a thread is not shown on Colab, and a timer in the kernel continues after the tab is closed;
so the tick comes from the page (`assets/clock.js`, by anywidget) and its callback runs where all callbacks run. Without
anywidget there is no clock: the panel then has a Refresh button, and its `watch()` is the live form.
"""

from __future__ import annotations

from collections.abc import Callable

import ipywidgets as widgets

from everydream_kit.panels.page_widgets import make_page_widget

INTERVAL_MILLISECONDS = 500


def make_clock(on_beat: Callable[[], object], *, interval_milliseconds: int = INTERVAL_MILLISECONDS) -> widgets.Widget:
    """A widget that calls `on_beat` while it is shown and its trait `on` is true; an empty one without anywidget."""
    clock = make_page_widget("clock", beats=0, interval=interval_milliseconds, on=True, reveal=0)
    if clock is None:
        return widgets.HTML("")
    clock.observe(lambda change: on_beat(), "beats")
    return clock


def reveal(clock: widgets.Widget) -> None:
    """Bring the clock's panel into view, unless somebody has touched the page since it was shown."""
    if clock.has_trait("reveal"):
        clock.reveal += 1
