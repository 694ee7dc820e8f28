"""The list of findings in the dataset panel: each with its pictures, what to do, and a button that sets it aside."""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from pathlib import Path

import ipywidgets as widgets

from everydream_kit.panels import look
from everydream_kit.panels.findings import Finding
from everydream_kit.panels.panel import set_html
from everydream_kit.panels.shots import picture_tag

SHOWN_LINES = 8
"""Findings of a kind that are listed; its button takes them all."""
SHOWN_PICTURES = 4


class ProblemsBox:
    """Findings by kind.

    Attributes:
        box: the widget to show.
        findings: what is listed.
        lines: a box for each kind.
    """

    def __init__(self, root: Callable[[], Path], set_aside: Callable[[Sequence[str]], object]) -> None:
        """Show nothing yet.

        Args:
            root: gives the dataset folder; names are shown relative to it.
            set_aside: called with the files that a person wants out of the dataset.
        """
        self._root, self._set_aside = root, set_aside
        self.findings: list[Finding] | None = None
        self.state, self.lines = widgets.HTML(), widgets.VBox()
        self.box = look.column(self.state, self.lines)

    def tell(self, text: str) -> None:
        """Say how the search stands."""
        set_html(self.state, f'<p class="edk-lead">{html.escape(text)}</p>' if text else "")

    def show(self, findings: list[Finding]) -> None:
        """List findings; nothing is drawn anew where they are the same."""
        if findings == self.findings:
            return
        self.findings = findings
        kinds = list(dict.fromkeys(finding.kind for finding in findings))
        self.lines.children = tuple(self._kind([f for f in findings if f.kind == kind]) for kind in kinds) or (
            widgets.HTML(look.note("No problems: every file can be used.", "good")),
        )

    def _kind(self, findings: Sequence[Finding]) -> widgets.Widget:
        kind = findings[0].kind
        head = f'<div class="edk-section">{html.escape(kind.title)} ({len(findings):,})</div>'
        head += f'<p class="edk-lead">{html.escape(kind.advice)}</p>'
        parts: list[widgets.Widget] = [widgets.HTML(head)]
        parts += [self._line(finding) for finding in findings[:SHOWN_LINES]]
        if len(findings) > SHOWN_LINES:
            parts.append(widgets.HTML(f'<div class="edk-hint">and {len(findings) - SHOWN_LINES:,} more</div>'))
        files = [path for finding in findings for path in finding.aside]
        if kind.button and len(findings) > 1:
            words = f"{kind.button} ({len(files):,} files)"
            parts.append(look.row(self._aside_button(words, files, kind.title)))
        return look.column(*parts)

    def _line(self, finding: Finding) -> widgets.Widget:
        names = [self._short(path) for path in finding.shown or finding.aside]
        if len(names) > SHOWN_PICTURES:
            names = [*names[:SHOWN_PICTURES], f"and {len(finding.shown) - SHOWN_PICTURES:,} more"]
        pictures = "".join(picture_tag(Path(path), 96, height=56) for path in finding.shown[:SHOWN_PICTURES])
        text = f"<b>{html.escape(', '.join(names))}</b><br>{html.escape(finding.text)}"
        text += f'<div class="edk-hint">{html.escape(finding.cure)}</div>' if finding.cure else ""
        shots = f'<div class="edk-few">{pictures}</div>' if pictures else ""
        words = widgets.HTML(layout=widgets.Layout(flex="1 1 420px", width="auto"))
        set_html(words, f'<div class="edk-found">{shots}<div>{text}</div></div>')
        controls: list[widgets.Widget] = [words]
        if finding.aside:
            some = "Set the others aside" if len(finding.shown) > 1 else "Set aside"
            controls.append(self._aside_button(some, finding.aside, ", ".join(map(self._short, finding.aside[:3]))))
        line = look.row(*controls)
        line.add_class("edk-line")
        return line

    def _aside_button(self, words: str, files: Sequence[str], what: str) -> widgets.Button:
        control = look.button(words, icon="archive", hint=f"{words}: {what}. Undo brings back")
        control.on_click(lambda _: self._set_aside(files))
        return control

    def _short(self, path: str) -> str:
        return path.removeprefix(f"{self._root()}/")
