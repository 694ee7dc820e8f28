"""The panels' clock: the browser asks for news twice a second while the panel is in view, and a quarter as often elsewhere.

A widget change made from a thread is not shown on Colab, and a timer in the kernel continues after the tab is closed;
so the tick comes from the page (`assets/clock.js`, by anywidget) and its callback runs where all callbacks run. Without
anywidget there is no clock: the panel then has a Refresh button, and its `watch()` is the live form.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ipywidgets as widgets
import traitlets

from everydream_kit.panels.asset_files import read_asset

INTERVAL_MILLISECONDS = 500


def make_clock(on_beat: Callable[[], object], *, interval_milliseconds: int = INTERVAL_MILLISECONDS) -> widgets.Widget:
    """A widget that calls `on_beat` while it is shown and its trait `on` is true; an empty one without anywidget."""
    kind = _clock_class()
    if kind is None:
        return widgets.HTML("")
    clock = kind(interval=interval_milliseconds)
    clock.observe(lambda change: on_beat(), "beats")
    return clock


def reveal(clock: widgets.Widget) -> None:
    """Bring the clock's panel into view, unless somebody has touched the page since it was shown."""
    if clock.has_trait("reveal"):
        clock.reveal += 1


def has_clock() -> bool:
    """Whether panels update by themselves here."""
    return _clock_class() is not None


def _clock_class() -> Any:
    try:
        import anywidget
    except ImportError:
        return None
    global _cached  # noqa: PLW0603  one class for all panels: anywidget registers every new one with the page
    if _cached is None:

        class Clock(anywidget.AnyWidget):
            _esm = read_asset("clock.js")
            beats = traitlets.Int(0).tag(sync=True)
            interval = traitlets.Int(INTERVAL_MILLISECONDS).tag(sync=True)
            on = traitlets.Bool(True).tag(sync=True)
            reveal = traitlets.Int(0).tag(sync=True)

        _cached = Clock
    return _cached


_cached: Any = None
