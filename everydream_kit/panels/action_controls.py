"""Controls for the arguments of an action, made from its record: the fitting widget, the function's default, its choices,
and the docstring's words as a tooltip. Labels and room are the panel's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ipywidgets as widgets

from everydream_kit.actions.action import Argument
from everydream_kit.panels import style

NUMBERS = {
    ("int", False): widgets.IntText,
    ("int", True): widgets.BoundedIntText,
    ("float", False): widgets.FloatText,
    ("float", True): widgets.FloatSlider,
}
"""By the kind of a number, and whether it has bounds."""


def make_action_control(
    argument: Argument, description: str, width: str, *, titles: Mapping[str, str] | None = None, **options: Any
) -> widgets.ValueWidget:
    """The widget that suits an argument of one value, or a text field for several.

    Args:
        argument: its record.
        description, width: as `style.control` takes them.
        titles: how choices are listed, by the word of each.
        **options: of `style.control` and of the widget, such as `value`, or the bounds of a number.
    """
    start: dict[str, Any]
    if argument.kind == "bool":
        kind, start = widgets.Checkbox, {"value": argument.default is not False}
    elif argument.choices and not argument.many:
        kind, start = (
            widgets.Dropdown,
            {"options": [((titles or {}).get(word, word), word) for word in argument.choices]},
        )
    elif argument.many or argument.kind == "text":
        return make_text_control(argument, description, width, **options)
    else:
        kind, start = NUMBERS[argument.kind, "max" in options], {"value": argument.default or 0}
    return _make(kind, argument, description, width, **{**start, **options})


def make_text_control(argument: Argument, description: str, width: str, **options: Any) -> widgets.ValueWidget:
    """A field that any argument can be typed into: several texts one a line, several numbers with commas."""
    kind, between, hint = (widgets.Textarea, "\n", "one a line") if is_lines(argument) else (widgets.Text, ", ", "")
    default = argument.default
    several = between.join(map(str, default)) if isinstance(default, (list, tuple)) else ""
    shown = several or ("" if default in (None, ()) else str(default))
    return _make(kind, argument, description, width, **{"value": shown, "placeholder": hint, **options})


def _make(kind: Any, argument: Argument, description: str, width: str, **options: Any) -> widgets.ValueWidget:
    control: widgets.ValueWidget = style.control(kind, description, width, **options)
    style.set_hint(control, argument.help.replace("`", ""))
    return control


def is_lines(argument: Argument) -> bool:
    """Whether several texts are typed, one a line."""
    return argument.many and argument.kind == "text" and not argument.choices
