"""Captions by a model in the dataset panel: suggested in a background task, reviewed here, written only when asked.

What was suggested is a file in the project folder, so a review can continue in another kernel.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ipywidgets as widgets

from everydream_kit.actions.background import CAPTIONS_FILE
from everydream_kit.actions.background_task import BackgroundTask
from everydream_kit.actions.table import TIDY_STEPS
from everydream_kit.data.album import Album
from everydream_kit.data.captioning import DEFAULT_MODEL
from everydream_kit.data.changes import PrepReport
from everydream_kit.errors import DataError
from everydream_kit.panels import style
from everydream_kit.panels.action_controls import make_action_control
from everydream_kit.panels.panel import set_html
from everydream_kit.panels.thumbnails import image_tag
from everydream_kit.runs import Status
from everydream_kit.strict_json import JsonLines, iterate_json_lines

PAGE = 6
MISSING, SELECTED = "missing", "selected"


class _Row:
    """One suggestion: thumbnail, what stands there now, and the text to write."""

    def __init__(self, keep: Callable[[Path, str, bool], None]) -> None:
        self.path: Path | None = None
        self._keep, self._quiet = keep, False
        self.image = widgets.HTML(layout=widgets.Layout(width="110px", flex="0 0 auto"))
        self.check = style.control(widgets.Checkbox, "Write", "80px", indent=False)
        how: dict[str, Any] = {"label": "130px", "continuous_update": False}
        self.text = style.control(widgets.Textarea, "Suggested caption", "auto", **how)
        self.text.layout.flex = "1 1 300px"
        self.now = widgets.HTML()
        words = style.column(self.text, self.now)
        words.layout.flex, words.layout.width = "1 1 320px", "auto"
        self.box = style.row(self.image, self.check, words)
        for control in (self.check, self.text):
            control.observe(self._take, "value")

    def show(self, path: Path | None, text: str, use: bool, now: str) -> None:
        """Show a suggestion, or nothing."""
        self._quiet, self.path = True, path
        self.box.layout.display = "" if path is not None else "none"
        if path is not None:
            set_html(self.image, image_tag(path, 104, height=72))
            self.text.value, self.check.value = text, use
            words = f"{path.name}: now {now!r}" if now else f"{path.name}: no caption now"
            set_html(self.now, f'<div class="edk-hint">{style.name_html(words)}</div>')
            for control in (self.check, self.text):
                style.set_hint(control, path.name)
        self._quiet = False

    def _take(self, _: Any) -> None:
        if not self._quiet and self.path is not None:
            self._keep(self.path, self.text.value, self.check.value)


class AutoCaption:
    """Starts the captioner, shows its progress, and lists what it suggests.

    Attributes:
        task: the background task.
        suggestions: text by image, and whether it is to be written.
        box: the widget to show.
    """

    def __init__(
        self, folder: Path, album: Callable[[], Album], chosen: Callable[[], list[int]], environment: dict[str, str]
    ) -> None:
        """Show what was suggested before, if there is something.

        Args:
            folder: of the task.
            album: gives the images as they are now.
            chosen: gives the indices of the selected images.
            environment: variables for the process, such as the token.
        """
        self._album, self._chosen = album, chosen
        self.task = BackgroundTask(folder, environment)
        self.suggestions: dict[Path, tuple[str, bool]] = {}
        which = [("images without a caption", MISSING), ("the selected images", SELECTED)]
        self.which = style.control(widgets.Dropdown, "For", "290px", label="60px", options=which)
        how = TIDY_STEPS["auto-caption"].arguments
        self.model = make_action_control(how["model"], "Model", "400px", label="60px")
        hint = "a photo of"
        self.prompt = make_action_control(how["prompt"], "Begin with", "260px", label="74px", placeholder=hint)
        self.start_button = style.button("Suggest captions", icon="magic", hint="Caption with the model, for review")
        self.stop_button = style.button("Stop", icon="stop", hint="End captioning; what is suggested stays")
        self.write_button = style.button("Write", tone="primary", icon="check")
        self.discard_button = style.button("Discard", icon="trash", hint="Forget all suggestions; nothing is written")
        self.page = style.control(widgets.BoundedIntText, "Page", "110px", label="36px", value=1, min=1, max=1)
        self.page.observe(lambda _: self._fill(), "value")
        self.count = widgets.HTML()
        self.rows = [_Row(self._keep) for _ in range(PAGE)]
        self.review = style.column(
            style.row(self.write_button, self.discard_button, self.page, self.count), *(row.box for row in self.rows)
        )
        self.box = style.column(
            style.row(self.which, self.start_button, self.stop_button), style.row(self.model, self.prompt), self.review
        )
        self._load()

    def start(self) -> None:
        """Caption the images in a process of its own.

        Raises:
            DataError: there is nothing to caption.
        """
        album = self._album()
        indices = self._chosen() if self.which.value == SELECTED else range(len(album))
        sources = {index: album.source(index) for index in indices}
        wanted = [
            index
            for index, source in sources.items()
            if not source.locked and (self.which.value == SELECTED or not source.is_own)
        ]
        if not wanted:
            raise DataError("Select images first." if self.which.value == SELECTED else "Every image has a caption.")
        options = {
            "paths": [str(album.path(index)) for index in wanted],
            "model": self.model.value.strip() or DEFAULT_MODEL,
            "prompt": self.prompt.value.strip() or None,
        }
        self.task.begin("caption", json.dumps(options))
        self._load()

    def stop(self) -> None:
        """End captioning; what is suggested stays."""
        self.task.stop()
        self.refresh()

    def refresh(self) -> Status | None:
        """The task's status, once more after its end; new suggestions are shown."""
        status = self.task.poll()
        if status is not None:
            self._load()
        return status

    def write(self) -> PrepReport:
        """Write the suggestions that are ticked, as one step, and forget all."""
        texts = {path: text for path, (text, use) in self.suggestions.items() if use and text.strip()}
        if not texts:
            raise DataError("No suggestion is ticked.")
        report = self._album().set_captions(texts, f"{len(texts)} suggested captions")
        self.discard()
        return report

    def discard(self) -> None:
        """Forget all suggestions."""
        self._file.unlink(missing_ok=True)
        self._load()

    @property
    def _file(self) -> Path:
        return self.task.folder / CAPTIONS_FILE

    def _load(self) -> None:
        """Read what was suggested; what was edited here stays."""
        lines: list[dict[str, Any]] = []
        if self._file.is_file():
            lines = list(iterate_json_lines(self._file, error=DataError, report=JsonLines()))
        known = self.suggestions
        self.suggestions = {}
        for line in lines:
            path = Path(str(line.get("path")))
            self.suggestions[path] = known.get(path, (str(line.get("caption") or ""), True))
        self.page.max = max(1, math.ceil(len(self.suggestions) / PAGE))
        self._fill()

    def _fill(self) -> None:
        album = self._album()
        now = {album.path(index): album.caption(index) for index in range(len(album))} if self.suggestions else {}
        start = (self.page.value - 1) * PAGE
        shown = [*list(self.suggestions.items())[start : start + PAGE], *([None] * PAGE)][:PAGE]
        for row, entry in zip(self.rows, shown, strict=True):
            path, (text, use) = entry if entry is not None else (None, ("", False))
            row.show(path, text, use, now.get(path, "") if path is not None else "")
        self._render()

    def _keep(self, path: Path, text: str, use: bool) -> None:
        self.suggestions[path] = text, use
        self._render()

    def _render(self) -> None:
        number = sum(use for _, use in self.suggestions.values())
        self.write_button.description = f"Write {number:,} caption{'' if number == 1 else 's'}"
        self.write_button.disabled = number == 0
        is_running = self.task.job is not None
        self.start_button.disabled, self.stop_button.disabled = is_running, not is_running
        self.review.layout.display = "" if self.suggestions else "none"
        words = f"of {self.page.max} · {len(self.suggestions):,} suggestions, none written yet"
        set_html(self.count, f'<span class="edk-hint">{words}</span>')
