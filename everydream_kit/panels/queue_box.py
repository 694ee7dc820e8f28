"""The queue of the training panel: settings that are trained one after the other, with their order and their state.

The queue itself is a file and a process (`jobs.Queue`); here it is shown and edited. A line is drawn anew only when an
entry has changed.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ipywidgets as widgets

from everydream_kit import jobs
from everydream_kit.actions.presets import OF_PROJECT
from everydream_kit.config import TrainConfig
from everydream_kit.panels import style
from everydream_kit.panels.monitor import STATE_TONES
from everydream_kit.panels.panel import attempt
from everydream_kit.params import format_value

HINT = (
    "Settings that are trained one after the other, also while this tab is closed. Set the form, add it, change the "
    "form, add it again; then start the queue. A run that fails does not hold up the next."
)
ALWAYS_SHOWN = ("lr", "max_epochs", "batch_size", "resolution")
NEVER_SHOWN = frozenset({"version", "given", *OF_PROJECT})
MAX_SHOWN = 8


class QueueBox:
    """A project's queue. `box` is what is shown.

    Attributes:
        queue: the file and process behind it.
        lines: the box that holds a line for each entry.
    """

    def __init__(
        self,
        queue: jobs.Queue,
        settings: Callable[[], TrainConfig],
        say: Callable[[str, style.Tone], None],
        *,
        command: Sequence[str] | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Show a queue.

        Args:
            queue: what is shown.
            settings: gives the config that is added; raises what is wrong with it.
            say: takes messages.
            command, environment: as `jobs.start`.
        """
        self.queue = queue
        self._settings, self._say = settings, say
        self._command, self._environment = command, environment
        self._shown: object = None
        hint = "Put the form's settings at the end"
        self.add_button = self._button("Add these settings", self.add, icon="plus", hint=hint)
        hint = "Train the queued settings in order"
        self.start_button = self._button("Start queue", self.start, tone="primary", icon="play", hint=hint)
        hint = "Stop the run in progress, which saves"
        self.stop_button = self._button("Stop queue", self.stop, icon="stop", hint=hint)
        hint = "Take out what has ended; its runs stay on disk"
        self.clear_button = self._button("Clear ended", self.clear, hint=hint)
        self.lines, self.hint = widgets.VBox(), widgets.HTML(f'<p class="edk-lead">{HINT}</p>')
        buttons = style.row(self.add_button, self.start_button, self.stop_button, self.clear_button)
        self.box = style.column(self.hint, buttons, self.lines)
        self.refresh()

    @property
    def num_queued(self) -> int:
        return self._num_queued

    def add(self) -> None:
        """Put the form's settings at the end of the queue."""
        self.queue.add(self._settings())
        self._say("Added to the queue.", "good")

    def start(self) -> None:
        """Train the queued settings."""
        self.queue.start(command=self._command, environment=self._environment)
        self._say("The queue is running. Closing this tab does not stop it.", "busy")

    def stop(self) -> None:
        """Stop the run in progress and start no further one."""
        self.queue.stop()
        self._say("The queue stops: the run in progress saves and stops, queued settings stay here.", "busy")

    def clear(self) -> None:
        """Take entries out that have ended."""
        for entry in self.queue.entries:
            if entry["state"] in jobs.FINAL_STATES:
                self.queue.remove(entry["id"])

    def running_job(self) -> jobs.Job | None:
        """The run that the queue works on."""
        runs = [entry["run"] for entry in self._entries if entry["state"] == "running" and entry["run"]]
        return jobs.Job(Path(runs[0])) if runs and self._alive else None

    def refresh(self) -> None:
        """Show the entries as they are now."""
        self._entries, self._alive = self.queue.entries, self.queue.is_alive()
        self._num_queued = len([entry for entry in self._entries if entry["state"] == "waiting"])
        self.start_button.disabled = self._alive or not self._num_queued
        self.stop_button.disabled = not self._alive
        self.clear_button.disabled = not any(entry["state"] in jobs.FINAL_STATES for entry in self._entries)
        state = [(entry["id"], entry["state"], entry["run"], entry["message"]) for entry in self._entries]
        if state != self._shown:
            self._shown = state
            self.lines.children = tuple(self._line(entry) for entry in self._entries) or (
                widgets.HTML('<div class="edk-empty">The queue is empty.</div>'),
            )

    def _line(self, entry: Mapping[str, Any]) -> widgets.Widget:
        state = entry["state"]
        text = (
            style.badge("queued" if state == "waiting" else state, STATE_TONES.get(state, "plain"))
            + f" {html.escape(describe_entry(entry, self._entries))}"
        )
        if entry["run"]:
            text += f'<div class="edk-hint">{html.escape(Path(entry["run"]).name)}</div>'
        if entry["message"] and state == "failed":
            text += f'<div class="edk-hint">{html.escape(entry["message"])}</div>'
        controls: list[widgets.Widget] = []
        if state == "waiting":
            queued = [other["id"] for other in self._entries if other["state"] == "waiting"]
            earlier = self._button("Earlier", lambda: self.queue.move(entry["id"], -1), icon="arrow-up")
            later = self._button("Later", lambda: self.queue.move(entry["id"], 1), icon="arrow-down")
            earlier.disabled, later.disabled = entry["id"] == queued[0], entry["id"] == queued[-1]
            controls += [earlier, later]
        if state not in ("starting", "running"):
            controls.append(self._button("Remove", lambda: self.queue.remove(entry["id"]), icon="times"))
        return style.line(text, *controls, basis="400px")

    def _button(self, text: str, action: Callable[[], object], **look: Any) -> widgets.Button:
        def press(_: widgets.Button) -> None:
            if not control.disabled:  # the second click of a double click
                attempt(action, self._say)
                self.refresh()

        control = style.button(text, **look)
        control.on_click(press)
        return control


def describe_entry(entry: Mapping[str, Any], entries: Sequence[Mapping[str, Any]]) -> str:
    """The settings of an entry in a line: first what differs from the others, then the usual ones and what was set."""
    given, settings = jobs.entry_settings(entry), entry["settings"]
    others = [other["settings"] for other in entries]
    differing = [name for name in settings if any(name in o and o[name] != settings[name] for o in others)]
    names = list(dict.fromkeys([*differing, *ALWAYS_SHOWN, *given]))
    names = [name for name in names if name in settings and name not in NEVER_SHOWN]
    reported = " · ".join(f"{name} {format_value(settings[name])}" for name in names[:MAX_SHOWN])
    return reported + (" …" if len(names) > MAX_SHOWN else "")
