"""The set-up panel: where am I, what fits here, what is wrong and how to fix it; log in to the Hub."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path

import ipywidgets as widgets

from everydream_kit.actions.project import Project, locate_project
from everydream_kit.doctor import Check, Diagnosis, diagnose
from everydream_kit.hosts import Host, detect_host
from everydream_kit.panels import style
from everydream_kit.panels.login import has_token, log_in, make_token_field
from everydream_kit.panels.panel import Panel, attempt, set_html

MARKS = {"ok": ("✓", "good"), "warning": ("!", "warn"), "error": ("✗", "bad")}


class SetupPanel(Panel):
    """`edk.panels.setup(project)`: where am I, what fits here, what is wrong; log in to the Hub.

    Attributes:
        project: the project folder; it is made here.
        host: the machine.
        diagnosis: what was found.
    """

    def __init__(self, folder: str | Path, *, mount_drive: bool = False, diagnosis: Diagnosis | None = None) -> None:
        """Look at the machine.

        Args:
            folder: a project's name, or its folder.
            mount_drive: on Colab, keep projects on Google Drive.
            diagnosis: shown instead of looking.
        """
        super().__init__()
        self.host: Host = detect_host()
        self.project = Project.open(locate_project(folder, mount_drive=mount_drive and self.host.name == "colab"))
        self.diagnosis = diagnosis or diagnose(self.project.folder)
        self.head, self.checks, self.hub = widgets.HTML(), widgets.HTML(), widgets.HTML()
        self.again_button = self.button("Refresh", self.refresh, icon="refresh")
        self.token_field = make_token_field(self._take_token)
        self.box = style.panel_box(
            [
                self.head,
                self.checks,
                style.row(self.again_button),
                style.section("Hugging Face Hub"),
                self.hub,
                self.token_field,
                self.message,
            ]
        )
        self._render()

    def refresh(self) -> None:
        """Check the machine again."""
        self.diagnosis = diagnose(self.project.folder)
        self._render()

    def _take_token(self, token: str) -> None:
        self.say("Checking the token with the Hub …", "busy")
        attempt(lambda: self.say(f"Logged in as {log_in(token)}.", "good"), self.say)
        self._render()

    def _render(self) -> None:
        tone: style.Tone = {"ok": "good", "warning": "warn", "error": "bad"}[self.diagnosis.status]  # type: ignore[assignment]
        words = {"ok": "ready", "warning": "ready, with notes", "error": "something is missing"}
        mark = style.badge(words[self.diagnosis.status], tone)
        lead = f"The project lives in {self.project.folder}; every notebook finds it there again."
        set_html(self.head, style.heading("Set-up", f"{self.project.name} on {self.host.title}", lead, badge=mark))
        set_html(self.checks, checks_html(self.diagnosis.checks))
        text = "A token is there: pushing and private models work." if has_token() else (
            "No token yet. You need one only for private models and for pushing; training works without."
        )  # fmt: skip
        set_html(self.hub, f'<div class="edk-hint">{html.escape(text)}</div>')


def checks_html(checks: Sequence[Check]) -> str:
    """Checks that need attention, and a fold with all that are fine."""
    well = [check for check in checks if check.status == "ok"]
    worse = [check for check in checks if check.status != "ok"]
    shown = f'<table class="edk-table edk-checks">{"".join(map(_row, worse))}</table>' if worse else ""
    if not well:
        return shown
    mark = '<span class="edk-mark good" aria-hidden="true">✓</span>'
    words = f"{len(well)} check{'s' if len(well) != 1 else ''} passed: {', '.join(check.name for check in well)}"
    rows = "".join(map(_row, well))
    table = f'<table class="edk-table edk-checks">{rows}</table>'
    return f"{shown}<details><summary>{mark} {html.escape(words)}</summary>{table}</details>"


def _row(check: Check) -> str:
    mark, tone = MARKS[check.status]
    cure = f'<div class="edk-hint">→ {html.escape(check.cure)}</div>' if check.cure else ""
    return (
        f'<tr><td class="edk-mark {tone}" aria-label="{check.status}">{mark}</td><td>{html.escape(check.name)}</td>'
        f"<td>{html.escape(check.text)}{cure}</td></tr>"
    )
