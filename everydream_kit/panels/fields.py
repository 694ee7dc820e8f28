"""One control for one parameter, made from its record: the fitting widget, help and range next to it, its error below.

The control is chosen from the record alone (`make_control`); a value that a slider or list cannot show turns the
control into a text field, so every value that a settings file may hold can be shown. A field checks its own value at
every key stroke by the same rules as the trainer.
"""

from __future__ import annotations

import html
from collections.abc import Callable
from typing import Any

import ipywidgets as widgets

from everydream_kit.errors import ConfigError
from everydream_kit.panels import style
from everydream_kit.panels.labels import label_of
from everydream_kit.params import Parameter, check_value, format_value, parse_text

LABEL_WIDTH = "190px"
CONTROL_WIDTH = "470px"
LARGEST_SLIDER = 128
"""A slider with more steps than this cannot be set by hand; such numbers are typed."""


class Field:
    """A parameter's control. `value` is the parsed value; `error` says what is wrong with it, or is None.

    Attributes:
        record: the parameter.
        box: the widget to show.
    """

    def __init__(self, record: Parameter, value: Any, on_change: Callable[[Field], object]) -> None:
        self.record = record
        self.error: str | None = None
        self._outside_error: str | None = None
        self._on_change = on_change
        self._quiet = False
        self._hint = widgets.HTML()
        self._value = value
        self.control = make_control(record, value)
        self.control.observe(self._take_input, "value")
        self.box = style.with_hint(self.control, self._hint)
        self._check()

    @property
    def value(self) -> Any:
        """The value as it is in a settings file. Only meaningful while `error` is None."""
        return self._value

    def set_value(self, value: Any) -> None:
        """Show a value that came from a preset or a file."""
        self._quiet = True
        self._value = value
        if can_show(self.control, value):
            self.control.value = show_value(self.record, self.control, value)
        else:
            self._replace_control(value)
        self._quiet = False
        self._check()

    def set_outside_error(self, message: str | None) -> None:
        """Show a problem that this field has together with another one."""
        if message != self._outside_error:
            self._outside_error = message
            self._render_hint()

    def _replace_control(self, value: Any) -> None:
        self.control.unobserve(self._take_input, "value")
        self.control = _text_control(self.record, value)
        self.control.observe(self._take_input, "value")
        self.box.children = (self.control, self._hint)

    def _take_input(self, change: dict[str, Any]) -> None:
        if self._quiet:
            return
        try:
            self._value = read_control(self.record, self.control)
            parse_error = None
        except ConfigError as error:
            parse_error = str(error).removeprefix(f"{self.record.name}: ")
        self._check(parse_error)
        self._on_change(self)

    def _check(self, parse_error: str | None = None) -> None:
        self.error = parse_error or check_value(self.record.name, self._value)
        (self.control.add_class if self.error else self.control.remove_class)("edk-wrong")
        self._render_hint()

    def _render_hint(self) -> None:
        text = hint_html(self.record, self.error or self._outside_error)
        if self._hint.value != text:
            self._hint.value = text


def hint_html(record: Parameter, error: str | None) -> str:
    """Help and range of a parameter, with its error above them."""
    facts = [record.range_text, record.knob.unit, "" if record.required else f"default {format_value(record.default)}"]
    parts = ['<div class="edk-hint">']
    if error:
        parts.append(f'<span class="edk-error" role="alert">{html.escape(error)}</span>')
    parts.append(f'<code class="edk-key-name">{html.escape(record.name)}</code>')
    parts.append(f'<span class="edk-help">{_inline_code(record.help)}</span>')
    parts.append(f'<span class="edk-range">{html.escape(" · ".join(fact for fact in facts if fact))}</span></div>')
    return "".join(parts)


def _inline_code(text: str) -> str:
    """Backquoted words as code."""
    pieces = html.escape(text).split("`")
    return "".join(f"<code>{piece}</code>" if i % 2 else piece for i, piece in enumerate(pieces))


def make_control(record: Parameter, value: Any) -> widgets.Widget:
    """The widget that suits a parameter and can show this value."""
    control = _natural_control(record)
    if control is None or not can_show(control, value):
        return _text_control(record, value)
    control.value = show_value(record, control, value)
    return control


def _natural_control(record: Parameter) -> widgets.Widget | None:
    """Check box, list or slider, where one fits; None where the value is typed."""
    if record.kind == "bool":
        return _labeled(widgets.Checkbox, record, indent=True)
    if record.kind == "choice":
        choices = [(choice, choice) for choice in record.choices]
        return _labeled(widgets.Dropdown, record, options=[("none", None), *choices] if record.optional else choices)
    if record.many or record.optional or record.minimum is None or record.maximum is None or record.exclusive_minimum:
        return None
    if record.kind == "int" and not (record.choices and not record.many):
        step = int(record.knob.step or record.multiple_of or 1)
        if (record.maximum - record.minimum) / step <= LARGEST_SLIDER and not record.exclusive_maximum:
            scale = {"min": int(record.minimum), "max": int(record.maximum), "step": step}
            return _labeled(widgets.IntSlider, record, **scale, continuous_update=False)
    if record.kind == "float" and (record.minimum, record.maximum) == (0.0, 1.0):
        shares = {"min": 0.0, "max": 1.0, "step": record.knob.step or 0.01, "readout_format": ".2f"}
        return _labeled(widgets.FloatSlider, record, **shares, continuous_update=False)
    return None


def _text_control(record: Parameter, value: Any) -> widgets.Text:
    shown = "" if value is None else _as_typed(record, value)
    return _labeled(widgets.Text, record, value=shown, placeholder="none" if record.optional else "")


def _labeled(kind: Any, record: Parameter, **options: Any) -> Any:
    return style.control(kind, label_of(record.name), CONTROL_WIDTH, label=LABEL_WIDTH, **options)


def _as_typed(record: Parameter, value: Any) -> str:
    """A value as a person types it: `512, 768` for a list of numbers."""
    several = isinstance(value, list) and len(value) > 1 and record.kind in ("int", "float")
    return ", ".join(map(format_value, value)) if several else format_value(value)


def can_show(control: widgets.Widget, value: Any) -> bool:
    """Whether a control can show a value without changing it."""
    if isinstance(control, widgets.Checkbox):
        return isinstance(value, bool)
    if isinstance(control, widgets.Dropdown):
        return any(value == option for _, option in control.options)
    if isinstance(control, widgets.IntSlider | widgets.FloatSlider):
        if isinstance(value, bool) or not isinstance(value, int | float) or not control.min <= value <= control.max:
            return False
        steps = (value - control.min) / control.step
        return bool(abs(steps - round(steps)) < 1e-6)
    return True


def show_value(record: Parameter, control: widgets.Widget, value: Any) -> Any:
    """A value in the form that a control takes."""
    if isinstance(control, widgets.Text):
        return "" if value is None else _as_typed(record, value)
    return float(value) if isinstance(control, widgets.FloatSlider) else value


def read_control(record: Parameter, control: widgets.Widget) -> Any:
    """A control's value as it is in a settings file.

    Raises:
        ConfigError: what was typed cannot be read.
    """
    if isinstance(control, widgets.Text):
        typed = control.value.strip()
        if record.many and record.kind in ("int", "float") and "," in typed and typed[:1] != "[":
            return parse_text(record.name, [part.strip() for part in typed.split(",") if part.strip()])
        return parse_text(record.name, control.value)
    return round(control.value, 6) if isinstance(control, widgets.FloatSlider) else control.value
