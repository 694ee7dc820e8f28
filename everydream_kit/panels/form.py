"""The settings form, made from the declaration in `config`: the first six settings open, the rest folded by group and
found by a search.

The form keeps the values; a folded group's controls are made when it is opened first, so that a hundred parameters
cost nothing until somebody wants them. Rules about two settings are shown at both.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ipywidgets as widgets

from everydream_kit.actions.bases import FOLLOWED, recognize_family, settings_of_other_families, suggested_settings
from everydream_kit.actions.presets import OF_PROJECT, SavedPresets
from everydream_kit.atomic import write_atomic
from everydream_kit.config import TrainConfig, config_warnings
from everydream_kit.errors import ConfigError
from everydream_kit.panels import style
from everydream_kit.panels.base_choice import BaseChoice
from everydream_kit.panels.fields import Field
from everydream_kit.panels.labels import label_of
from everydream_kit.panels.pages import Fold
from everydream_kit.panels.panel import attempt
from everydream_kit.panels.preset_row import PresetRow
from everydream_kit.params import Parameter, check_value, parameter, parameters
from everydream_kit.settings import load_config

SHORT = ("resume_ckpt", "data_root", "training_kind", "resolution", "max_epochs", "lr")
"""What a run needs from a person; everything else is folded."""
MOST_FOUND = 8


class SettingsForm:
    """Controls for every parameter. `values` are the settings, `errors` what is wrong with them by name.

    Attributes:
        box: the widget to show.
        values: all settings that differ from nothing, as a settings file holds them.
        folds: the folded groups, in order.
    """

    def __init__(
        self,
        values: dict[str, Any],
        on_change: Callable[[], object] = lambda: None,
        *,
        presets_path: Path | None = None,
    ) -> None:
        """Show settings.

        Args:
            values: that are set; the others are at their default.
            on_change: called after every change.
            presets_path: the project's own presets.
        """
        self.values: dict[str, Any] = {r.name: r.default for r in parameters() if not r.required}
        self.values.update(values)
        self._on_change = on_change
        self._fields: dict[str, Field] = {}
        self._unreadable: dict[str, str] = {}
        self._refusal = ""
        self._family_of: tuple[Any, str | None] = (None, None)
        self._notes = widgets.HTML(layout=widgets.Layout(min_height="6px"))
        self.presets = PresetRow(SavedPresets(presets_path), lambda: self.values, self.changed_values, self.set_values)
        self.base = BaseChoice(self.field("resume_ckpt"), self._choose_base)
        self._groups = _group_records()
        self.folds = [self._make_fold(title, records) for title, records in self._groups.items()]
        self.box = widgets.VBox(
            [
                self.presets.box,
                self._notes,
                self.base.box,
                *(self.field(name).box for name in SHORT[1:]),
                style.section("All other settings"),
                self._search_box(),
                *(fold.box for fold in self.folds),
                style.section("Settings file"),
                self._file_row(),
            ]
        )
        self._check_together()

    @property
    def preset(self) -> widgets.Dropdown:
        """The list of starting points."""
        return self.presets.chooser

    @property
    def errors(self) -> dict[str, str]:
        """What is wrong, by parameter name; empty if a run could start."""
        alone = dict(self._unreadable)
        for name, value in self.values.items():
            if name not in alone:
                field = self._fields.get(name)
                message = field.error if field is not None else check_value(name, value)
                if message:
                    alone[name] = message
        return alone or self._combined_errors()

    def config(self) -> TrainConfig:
        """The settings as a config.

        Raises:
            ConfigError: something is wrong; one line for each.
        """
        if self._unreadable:
            raise ConfigError("\n".join(f"{name}: {message}" for name, message in self._unreadable.items()))
        return load_config(None, self.changed_values())[0]

    def changed_values(self) -> dict[str, Any]:
        """Settings that are not at their default: what is worth writing into a file."""
        defaults = {record.name: record.default for record in parameters()}
        return {name: value for name, value in self.values.items() if name not in defaults or value != defaults[name]}

    def set_values(self, values: dict[str, Any]) -> None:
        """Take over settings from a preset or a file; others keep their values."""
        for name, value in values.items():
            self.values[name] = value
            self._unreadable.pop(name, None)
            if name in self._fields:
                self._fields[name].set_value(value)
        self.base.show(self.values.get("resume_ckpt"))
        self._check_together()
        self._on_change()

    def show_refusal(self, text: str) -> None:
        """Show what training would refuse, at the settings that it names; an empty text takes it back."""
        if text != self._refusal:
            self._refusal = text
            self._check_together()

    def field(self, name: str) -> Field:
        """The control of a parameter, made now if its group was never opened."""
        return self._field(parameter(name))

    def load_file(self, path: str | Path) -> list[str]:
        """Take over a settings file (also EveryDream 2's); what it does not name goes back to its default.

        What belongs to the project (base model, dataset, folders, prompts) stays as it is where the file does not name it.

        Returns:
            Warnings about names that have gone out of use.

        Raises:
            ConfigError: the file cannot be used; nothing was changed.
        """
        kept = {name: self.values[name] for name in OF_PROJECT}
        names_base = '"resume_ckpt"' in Path(path).read_text("utf-8", "replace") if Path(path).is_file() else True
        config, warnings = load_config(path, None if names_base else {"resume_ckpt": kept["resume_ckpt"]})
        chosen = {name: getattr(config, name) for name in config.model_fields_set}
        defaults = {record.name: record.default for record in parameters() if not record.required}
        self.set_values({**defaults, **{k: v for k, v in kept.items() if k not in chosen}, **chosen})
        return warnings

    def save_file(self, path: str | Path) -> Path:
        """Write the settings that differ from the defaults as a settings file."""
        path = Path(path).expanduser()
        write_atomic(path, json.dumps(self.changed_values(), indent=2, ensure_ascii=False), make_folder=True)
        return path

    def _field(self, record: Parameter) -> Field:
        if record.name not in self._fields:
            self._fields[record.name] = Field(record, self.values.get(record.name), self._take_field)
        return self._fields[record.name]

    def _take_field(self, field: Field) -> None:
        name = field.record.name
        if field.error:
            self._unreadable[name] = field.error
        else:
            self._unreadable.pop(name, None)
            before, self.values[name] = dict(self.values), field.value
            if name in FOLLOWED:
                self._follow_base(before)
        self._check_together()
        self._on_change()

    def _choose_base(self, source: str) -> None:
        before = dict(self.values)
        self.set_values({"resume_ckpt": source})
        self._follow_base(before)
        self._check_together()
        self._on_change()

    def _follow_base(self, before: dict[str, Any]) -> None:
        """Resolution, epochs and rate follow the base and what is trained, unless somebody has set them."""
        old, new = suggested_settings(before), suggested_settings(self.values)
        for name, value in new.items():
            if self.values.get(name) == old[name] and name not in self._unreadable:
                self.values[name] = value
                if name in self._fields:
                    self._fields[name].set_value(value)

    def _make_fold(self, title: str, records: Sequence[Parameter]) -> Fold:
        def make() -> list[widgets.Widget]:
            fields = [self._field(record) for record in records]
            self._check_together()
            return [field.box for field in fields]

        return Fold(title, make)

    def _combined_errors(self) -> dict[str, str]:
        try:
            TrainConfig(**self.values)
        except ConfigError as error:
            return _by_setting(str(error))
        return {}

    def _meaningless(self) -> frozenset[str]:
        """Settings that the base's family does not have, but for those that are set: starting says why they cannot be."""
        base = (self.values.get("resume_ckpt"), self.values.get("family"))
        if self._family_of[0] != base:
            self._family_of = (base, recognize_family(*base))
        return settings_of_other_families(self._family_of[1]) - self.changed_values().keys()

    def _check_together(self) -> None:
        hidden = self._meaningless()
        for name, field in self._fields.items():
            if name not in SHORT:
                field.box.layout.display = "none" if name in hidden else ""
        for fold, (title, records) in zip(self.folds, self._groups.items(), strict=True):
            count = sum(record.name not in hidden for record in records)
            fold.set_title(f"{title} ({count})")
            fold.box.layout.display = "" if count else "none"
        combined = {} if self._unreadable else self._combined_errors()
        said = _by_setting(self._refusal) | combined
        for name, field in self._fields.items():
            field.set_outside_error(said.get(name))
        warnings = [] if self._unreadable or combined else config_warnings(self.config())
        self._notes.value = style.note("\n".join(warnings), "warn")

    def _search_box(self) -> widgets.Widget:
        hint = "such as ema, memory, save, tokens"
        self.search = style.control(widgets.Text, "Find a setting", "420px", label="90px", placeholder=hint)
        self.found = widgets.VBox(layout=widgets.Layout(width="100%"))
        self.search.observe(lambda change: self._find(change["new"]), "value")
        return style.column(self.search, self.found)

    def _find(self, words: str) -> None:
        """Show the settings whose name, label or help holds every word; those that are open already as well."""
        wanted = words.lower().split()
        hidden = self._meaningless()
        records = [
            record
            for record in parameters()
            if wanted and record.name not in hidden and all(word in _words_of(record) for word in wanted)
        ]
        records.sort(key=lambda record: not all(word in _name_words(record) for word in wanted))  # stable
        shown: list[widgets.Widget] = [self._field(record).box for record in records[:MOST_FOUND]]
        if wanted and len(records) != len(shown):
            shown.append(widgets.HTML(f'<div class="edk-hint">and {len(records) - len(shown)} more; add a word</div>'))
        if wanted and not records:
            shown.append(widgets.HTML('<div class="edk-hint">No setting has these words.</div>'))
        self.found.children = tuple(shown)
        self._check_together()

    def _file_row(self) -> widgets.Widget:
        self.file_path = style.control(widgets.Text, "File", "420px", label="90px", placeholder="train.json")
        self.load_button, self.save_button = style.button("Load"), style.button("Save")
        report = widgets.HTML()

        def say(text: str, tone: style.Tone) -> None:
            report.value = style.note(text, tone)

        def load() -> None:
            warnings = self.load_file(self.file_path.value or "train.json")
            say("\n".join(["Loaded.", *warnings]), "warn" if warnings else "good")

        def save() -> None:
            say(f"Saved as {self.save_file(self.file_path.value or 'train.json')}.", "good")

        self.load_button.on_click(lambda _: attempt(load, say))
        self.save_button.on_click(lambda _: attempt(save, lambda text, tone: say(f"Not saved: {text}", tone)))
        return style.column(style.row(self.file_path, self.load_button, self.save_button), report)


def _group_records() -> dict[str, list[Parameter]]:
    """Parameters that are not in the short form, by the title of their group, in order."""
    groups: dict[str, list[Parameter]] = {}
    for record in parameters():
        if record.name not in SHORT:
            groups.setdefault(record.group, []).append(record)
    return groups


def _by_setting(errors: str) -> dict[str, str]:
    """Lines such as `lr, optimizer: message`, by the names that they begin with."""
    found = {}
    for line in errors.splitlines():
        names, _, message = line.partition(": ")
        found.update(dict.fromkeys(names.split(", "), message))
    return found


def _name_words(record: Parameter) -> str:
    return f"{record.name} {record.name.replace('_', ' ')} {label_of(record.name)} {record.group}".lower()


def _words_of(record: Parameter) -> str:
    return f"{_name_words(record)} {record.help} {record.knob.when} {record.knob.memory}".lower()
