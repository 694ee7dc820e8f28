"""The row of the settings form where a run starts from: presets that replace each other, the kit's defaults, saved ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import ipywidgets as widgets

from everydream_kit.actions.presets import PRESETS, TOUCHED, SavedPresets, with_preset
from everydream_kit.errors import ConfigError
from everydream_kit.panels import style
from everydream_kit.panels.labels import label_of
from everydream_kit.panels.panel import attempt, set_html
from everydream_kit.params import format_value

OWN, DEFAULTS = "", "defaults"
SAVED = "saved: "
"""Stands before the names of saved presets, so that they are no other option."""
MAX_SHOWN = 8


class PresetRow:
    """Chooses a starting point, and saves one.

    Attributes:
        chooser: the list.
        name: name of a preset to save.
        save_button, delete_button: save these settings by name; delete the chosen saved preset.
        box: the widget to show.
    """

    def __init__(
        self,
        saved: SavedPresets,
        values: Callable[[], dict[str, Any]],
        changed: Callable[[], dict[str, Any]],
        apply: Callable[[dict[str, Any]], object],
    ) -> None:
        """Show the starting points.

        Args:
            saved: the project's own presets.
            values: gives the form's values.
            changed: gives those that are worth saving.
            apply: called with values that replace the form's.
        """
        self._saved, self._values, self._changed, self._apply = saved, values, changed, apply
        self._own: dict[str, Any] | None = None
        self._set: dict[str, Any] = {}
        self.chooser = style.control(widgets.Dropdown, "Start from", "340px", label="90px")
        self.name = style.control(widgets.Text, "Save as", "220px", label="60px", placeholder="name")
        self.save_button = style.button("Save", icon="save", hint="Save these settings as a preset of this project")
        self.delete_button = style.button("Delete", icon="trash", hint="Delete the chosen preset of this project")
        self.report = widgets.HTML(layout=widgets.Layout(width="100%"))
        self._list()
        self.chooser.observe(lambda change: self._choose(change["new"]), "value")
        self.save_button.on_click(lambda _: self._try(self.save))
        self.delete_button.on_click(lambda _: self._try(self.delete))
        row = style.row(self.chooser, self.delete_button, self.name, self.save_button)
        self.box = style.column(row, self.report)

    def save(self) -> None:
        """Save the form's settings by the typed name. Raises: ConfigError."""
        name = self.name.value.strip()
        self._saved.save(name, self._changed())
        self._own = self._own or dict(self._values())
        self._list(SAVED + name)
        self.name.value = ""
        set_html(self.report, style.note(f"Saved as {name}, for every notebook of this project.", "good"))

    def delete(self) -> None:
        """Delete the chosen saved preset; the form keeps its values. Raises: ConfigError."""
        name = self.chooser.value.removeprefix(SAVED)
        self._saved.remove(name)
        self._own, self._set = None, {}
        self._list(OWN)
        set_html(self.report, style.note(f"{name} is deleted. The settings stay as they are.", "good"))

    def _list(self, chosen: str = OWN) -> None:
        options = [("your own settings", OWN), ("the kit's defaults", DEFAULTS)]
        options += [(preset.title, name) for name, preset in PRESETS.items()]
        try:
            options += [(name, SAVED + name) for name in self._saved.read()]
        except ConfigError as error:
            set_html(self.report, style.note(str(error), "bad"))
        self._is_listing = True
        self.chooser.options = options
        self.chooser.value = chosen
        self._is_listing = False
        self.delete_button.layout.display = "" if chosen.startswith(SAVED) else "none"

    def _choose(self, chosen: str) -> None:
        self.delete_button.layout.display = "" if chosen.startswith(SAVED) else "none"
        if not self._is_listing:
            self._try(lambda: self._take(chosen))

    def _take(self, chosen: str) -> None:
        before = dict(self._values())
        if self._own is None:
            self._own = before
        own = {**self._own, **self._edited(before)}
        if chosen == OWN:
            values, why, self._own, self._set = own, "Your own settings are back.", None, {}
        else:
            settings, why = self._settings_of(chosen, own)
            touched = TOUCHED if chosen in PRESETS else None
            values = with_preset(own, settings, touched)
            self._set = values
        self._apply(values)
        set_html(self.report, _report(why, before, dict(self._values())))

    def _edited(self, now: Mapping[str, Any]) -> dict[str, Any]:
        """What was set by hand while a preset was chosen: it stays the person's own."""
        return {name: value for name, value in now.items() if self._set and value != self._set.get(name)}

    def _settings_of(self, chosen: str, own: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
        if chosen == DEFAULTS:
            return {}, "Every setting but base model, dataset and folders is at its default."
        if chosen in PRESETS:
            return PRESETS[chosen].settings_on(own), PRESETS[chosen].why
        return self._saved.read().get(chosen.removeprefix(SAVED), {}), "A preset of this project."

    def _try(self, action: Callable[[], object]) -> None:
        attempt(action, lambda text, tone: set_html(self.report, style.note(text, tone)))


def _report(why: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What a starting point is for, and what it changed, as HTML."""
    changes = [
        f"{label_of(name)} {format_value(before.get(name))} → {format_value(value)}"
        for name, value in now.items()
        if value != before.get(name)
    ]
    more = [f"{len(changes) - MAX_SHOWN} more"] if len(changes) > MAX_SHOWN else []
    words = f"Changed: {', '.join([*changes[:MAX_SHOWN], *more])}." if changes else "Nothing changed."
    return f'<div class="edk-hint" role="status">{style.name_html(why)}<br>{style.name_html(words)}</div>'
