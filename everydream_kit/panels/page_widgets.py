"""Widgets of our own on the page, by anywidget: a script and perhaps a style sheet in `assets/`, and traits of both sides.

Without anywidget there are none, and whoever asks has another way.
"""

from __future__ import annotations

from typing import Any

import ipywidgets as widgets
import traitlets

from everydream_kit.panels.asset_files import ASSETS, read_asset

_classes: dict[str, Any] = {}
"""One for all panels: anywidget registers every new one with the page."""


def has_page_widgets() -> bool:
    """Whether anywidget is here."""
    try:
        import anywidget  # noqa: F401
    except ImportError:
        return False
    return True


def make_page_widget(name: str, /, **values: Any) -> widgets.Widget | None:
    """The widget whose script is `assets/<name>.js`; None without anywidget.

    Args:
        name: of the assets.
        **values: its traits, each of the type of its value here.
    """
    if not has_page_widgets():
        return None
    import anywidget

    if name not in _classes:
        kinds = {bool: traitlets.Bool, int: traitlets.Int, str: traitlets.Unicode, bytes: traitlets.Bytes}
        body: dict[str, Any] = {trait: kinds[type(value)](value).tag(sync=True) for trait, value in values.items()}
        body["__module__"], body["_esm"] = __name__, read_asset(f"{name}.js")
        if (ASSETS / f"{name}.css").is_file():
            body["_css"] = read_asset(f"{name}.css")
        _classes[name] = type(name.title().replace("_", ""), (anywidget.AnyWidget,), body)
    widget: widgets.Widget = _classes[name](**values)
    return widget
