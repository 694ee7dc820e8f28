"""The first line of the settings form: which base model, with what it needs here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ipywidgets as widgets

from everydream_kit.actions.bases import BASES, find_base, is_downloaded
from everydream_kit.config import EMBEDDED_MODEL
from everydream_kit.panels import style
from everydream_kit.panels.fields import CONTROL_WIDTH, LABEL_WIDTH, Field
from everydream_kit.panels.panel import set_html

OTHER = ""
OTHER_WORDS = "Give a folder, a .safetensors or .ckpt file, a Hub id, or findlast for this project's latest checkpoint."


class BaseChoice:
    """A list of known bases, and the setting's own field for every other one.

    Attributes:
        chooser: the list.
        field: the control of `resume_ckpt`, shown where the base is none of the list.
        box: the widget to show.
    """

    def __init__(self, field: Field, choose: Callable[[str], object]) -> None:
        """Show a base.

        Args:
            field: of `resume_ckpt`.
            choose: called with the source of a base that was chosen in the list.
        """
        self.field, self._choose = field, choose
        self._quiet = False
        options = [*((base.title, base.source) for base in BASES), ("another: path or Hub id", OTHER)]
        how: dict[str, Any] = {"label": LABEL_WIDTH, "options": options}
        self.chooser = style.control(widgets.Dropdown, "Base model", CONTROL_WIDTH, **how)
        self._needs = widgets.HTML()
        self.chooser.observe(self._take, "value")
        self.box = style.column(style.with_hint(self.chooser, self._needs), field.box)
        self.show(field.value)

    def show(self, source: Any) -> None:
        """Show the base that the form holds."""
        base = find_base(source)
        self._quiet = True
        if base is not None or self.chooser.value != OTHER:
            self.chooser.value = base.source if base is not None else OTHER
        self._quiet = False
        self.field.box.layout.display = "none" if base is not None else ""
        words = OTHER_WORDS
        if base is not None:
            here = base.source != EMBEDDED_MODEL and is_downloaded(base.source)
            words = f"{base.needs} Already on this machine." if here else base.needs
        set_html(self._needs, f'<div class="edk-hint">{style.name_html(words)}</div>')

    def _take(self, change: dict[str, Any]) -> None:
        if self._quiet:
            return
        if change["new"] == OTHER:
            self.field.box.layout.display = ""
            set_html(self._needs, f'<div class="edk-hint">{style.name_html(OTHER_WORDS)}</div>')
        else:
            self._choose(change["new"])
