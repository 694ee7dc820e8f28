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
    argument: Argument, description: str, *, titles: Mapping[str, str] | None = None, **options: Any
) -> widgets.ValueWidget:
    """The widget that suits an argument of one value, or a text field for several.

    Args:
        argument: its record.
        description: the label; constant words.
        titles: how choices are listed, by the word of each.
        **options: of the widget, such as `value`, `layout`, or the bounds of a number.
    """
    if argument.kind == "bool":
        control: widgets.ValueWidget = widgets.Checkbox(
            description=description, **{"value": argument.default is not False, **options}
        )
    elif argument.choices and not argument.many:
        choices = [((titles or {}).get(word, word), word) for word in argument.choices]
        control = widgets.Dropdown(description=description, **{"options": choices, **options})
    elif argument.many or argument.kind == "text":
        return make_text_control(argument, description, **options)
    else:
        make = NUMBERS[argument.kind, "max" in options]
        control = make(description=description, **{"value": argument.default or 0, **options})
    style.set_hint(control, argument.help.replace("`", ""))
    return control


def make_text_control(argument: Argument, description: str, **options: Any) -> widgets.ValueWidget:
    """A field that any argument can be typed into: several texts one a line, several numbers with commas."""
    kind, between = (widgets.Textarea, "\n") if is_lines(argument) else (widgets.Text, ", ")
    default = argument.default
    several = between.join(map(str, default)) if isinstance(default, (list, tuple)) else ""
    shown = several or ("" if default in (None, ()) else str(default))
    control: widgets.ValueWidget = kind(
        description=description,
        **{"value": shown, "placeholder": "one a line" if is_lines(argument) else "", **options},
    )
    style.set_hint(control, argument.help.replace("`", ""))
    return control


def is_lines(argument: Argument) -> bool:
    """Whether several texts are typed, one a line."""
    return argument.many and argument.kind == "text" and not argument.choices
