"""The panel of any action, made from its record alone: a control for each argument, a button, progress, and the report."""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import Any

import ipywidgets as widgets

from everydream_kit.actions.action import Argument
from everydream_kit.actions.background_task import BackgroundTask
from everydream_kit.actions.project import Project
from everydream_kit.actions.table import find_action
from everydream_kit.errors import ConfigError
from everydream_kit.panels import style
from everydream_kit.panels.action_controls import is_lines, make_action_control, make_text_control
from everydream_kit.panels.clock import make_clock
from everydream_kit.panels.labels import label_of
from everydream_kit.panels.login import token_environment
from everydream_kit.panels.panel import Panel, set_html

NUMBERS = {"int": (int, "a whole number"), "float": (float, "a number")}


class ActionPanel(Panel):
    """`edk.panels.action(project, "merge")`: the form of a command, or of a step of `tidy`, such as "resize".

    Attributes:
        project: the project folder.
        action: the action's record.
        controls: of its arguments, by name.
        task: the background task that does it, whichever panel started it.
    """

    def __init__(self, folder: str | Path, name: str, *, environment: dict[str, str] | None = None) -> None:
        """Build the form of an action.

        Raises:
            ConfigError: there is no action of this name.
        """
        super().__init__()
        self.project, self.name, self.action = Project.open(folder), name, find_action(name)
        work = self.project.folder / "actions" / name
        self.task = BackgroundTask(work, {**token_environment(), **(environment or {})})
        self.controls = {argument.name: _control(argument) for argument in self.action.arguments.values()}
        self.start_button = self.button("Start", self.start, tone="primary", icon="play", hint=self.action.summary)
        self.stop_button = self.button("Stop", self.stop, icon="stop", hint="Stop; files that are written stay")
        self.refresh_button = self.make_refresh_button()
        self.bar, self.result = style.progress_bar(), widgets.HTML()
        self.box = style.panel_box(
            [
                widgets.HTML(style.heading(label_of(name.replace("-", "_")), self.project.name)),
                *(self._row(argument) for argument in self.action.arguments.values()),
                style.actions(self.start_button, self.stop_button, self.refresh_button, message=self.message),
                self.bar,
                self.result,
                make_clock(self.on_beat),
            ]
        )
        self.say(f"{self.action.summary[:1].upper()}{self.action.summary[1:]}.")
        self._render()

    def start(self) -> None:
        """Do it, in a process of its own.

        Raises:
            ConfigError: a value is missing or cannot be read.
        """
        self.task.begin("action", self.name, json.dumps(self.given()))
        set_html(self.result, "")
        self.say_progress("Starting …")
        self._render()

    def stop(self) -> None:
        """Stop; files that are written stay."""
        self.task.stop()
        self.refresh()

    def given(self) -> dict[str, Any]:
        """The arguments that were given, by name; what is empty is left to the function.

        Raises:
            ConfigError: a value is missing or cannot be read.
        """
        read = {name: _read(self.action.arguments[name], control.value) for name, control in self.controls.items()}
        return {name: value for name, value in read.items() if value is not None}

    def refresh(self) -> None:
        """Show the progress of the task, whichever panel started it."""
        self.task.attach()
        status = self.task.poll()
        if status is not None:
            style.show_progress(self.bar, status)
            message = status.get("message") or status["state"]
            first, _, rest = message.partition("\n")
            self.say_status({**status, "message": first})
            set_html(self.result, f'<pre class="edk-report">{html.escape(message)}</pre>' if rest else "")
        self._render()

    def _render(self) -> None:
        is_running = self.task.job is not None
        self.start_button.disabled, self.stop_button.disabled = is_running, not is_running

    def _row(self, argument: Argument) -> widgets.Widget:
        hint = f'<span class="edk-hint">{html.escape(argument.help.replace("`", ""))}</span>'
        return style.with_hint(self.controls[argument.name], widgets.HTML(hint))


def _control(argument: Argument) -> widgets.ValueWidget:
    """A control that can also be empty, where the function has a default of its own. Numbers are typed."""
    of_all: dict[str, Any] = {"description": label_of(argument.name), "width": "470px", "label": "150px"}
    if argument.kind == "bool":
        return make_action_control(argument, **of_all, indent=True)
    if argument.choices and not argument.many:
        words = [(word, word) for word in argument.choices]
        options = words if argument.default in argument.choices else [("by default", None), *words]
        return make_action_control(argument, **of_all, options=options, value=argument.default)
    return make_text_control(argument, **of_all)


def _read(argument: Argument, value: Any) -> Any:
    """A control's value as the function takes it; None where nothing was given."""
    if not isinstance(value, str):
        return None if value == argument.default else value
    if not value.strip():
        if argument.required:
            raise ConfigError(f"{label_of(argument.name)}: is needed: {argument.help}.")
        return None
    if not argument.many:
        return _number(argument, value.strip())
    parts = value.splitlines() if is_lines(argument) else value.split(",")
    return [_number(argument, part.strip()) for part in parts if part.strip()]


def _number(argument: Argument, text: str) -> Any:
    if argument.kind not in NUMBERS:
        return text
    kind, words = NUMBERS[argument.kind]
    try:
        return kind(text)
    except ValueError as error:
        raise ConfigError(f"{label_of(argument.name)}: must be {words} (got {text!r}).") from error
