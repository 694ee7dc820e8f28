"""The list of issues in the dataset panel: each with its images, what to do, and a button that excludes it."""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from pathlib import Path

import ipywidgets as widgets

from everydream_kit.actions.dataset_issues import Issue
from everydream_kit.panels import style
from everydream_kit.panels.panel import set_html
from everydream_kit.panels.thumbnails import image_tag

SHOWN_LINES = 8
"""Findings of a kind that are listed; its button takes them all."""
SHOWN_IMAGES = 4


class IssuesBox:
    """Findings by kind.

    Attributes:
        box: the widget to show.
        issues: what is listed.
        lines: a box for each kind.
    """

    def __init__(self, root: Callable[[], Path], exclude: Callable[[Sequence[str]], object]) -> None:
        """Show nothing yet.

        Args:
            root: gives the dataset folder; names are shown relative to it.
            exclude: called with the files that a person wants out of the dataset.
        """
        self._root, self._exclude = root, exclude
        self.issues: list[Issue] | None = None
        self._is_complete = False
        self.state, self.lines = widgets.HTML(), widgets.VBox()
        self.box = style.column(self.state, self.lines)

    def report(self, text: str) -> None:
        """Show the progress of the search."""
        set_html(self.state, f'<p class="edk-lead">{html.escape(text)}</p>' if text else "")

    def show(self, issues: list[Issue], *, complete: bool) -> None:
        """List issues; nothing is rendered again where they are the same.

        Args:
            issues: in order.
            complete: every image was looked at, so that none is left to be found.
        """
        if (issues, complete) == (self.issues, self._is_complete):
            return
        self.issues, self._is_complete = issues, complete
        kinds = list(dict.fromkeys(issue.kind for issue in issues))
        self.lines.children = tuple(self._kind([f for f in issues if f.kind == kind]) for kind in kinds) or (
            widgets.HTML(
                style.note("No problems: every file can be used.", "good")
                if complete
                else style.note("No problems so far; still checking for duplicates and damaged images.")
            ),
        )

    def _kind(self, issues: Sequence[Issue]) -> widgets.Widget:
        kind = issues[0].kind
        head = f'<div class="edk-section">{html.escape(kind.title)} ({len(issues):,})</div>'
        head += f'<p class="edk-lead">{html.escape(kind.advice)}</p>'
        parts: list[widgets.Widget] = [widgets.HTML(head)]
        parts += [self._line(issue) for issue in issues[:SHOWN_LINES]]
        if len(issues) > SHOWN_LINES:
            parts.append(widgets.HTML(f'<div class="edk-hint">and {len(issues) - SHOWN_LINES:,} more</div>'))
        files = [path for issue in issues for path in issue.exclude]
        if kind.button and len(issues) > 1:
            words = f"{kind.button} ({len(files):,} files)"
            parts.append(style.row(self._exclude_button(words, files, kind.title)))
        return style.column(*parts)

    def _line(self, issue: Issue) -> widgets.Widget:
        names = [self._short(path) for path in issue.shown or issue.exclude]
        if len(names) > SHOWN_IMAGES:
            names = [*names[:SHOWN_IMAGES], f"and {len(issue.shown) - SHOWN_IMAGES:,} more"]
        images = "".join(image_tag(Path(path), 96, height=56) for path in issue.shown[:SHOWN_IMAGES])
        name = f"<b>{html.escape(', '.join(names))}</b><br>" if names else ""
        text = name + html.escape(issue.text)
        text += f'<div class="edk-hint">{html.escape(issue.cure)}</div>' if issue.cure else ""
        shots = f'<div class="edk-few">{images}</div>' if images else ""
        controls: list[widgets.Widget] = []
        if issue.exclude:
            some = "Exclude the others" if len(issue.shown) > 1 else "Exclude"
            controls.append(self._exclude_button(some, issue.exclude, ", ".join(map(self._short, issue.exclude[:3]))))
        return style.line(f'<div class="edk-found">{shots}<div>{text}</div></div>', *controls, basis="420px")

    def _exclude_button(self, words: str, files: Sequence[str], what: str) -> widgets.Button:
        control = style.button(words, icon="archive", hint=f"{words}: {what}. Undo brings back")
        control.on_click(lambda _: self._exclude(files))
        return control

    def _short(self, path: str) -> str:
        return path.removeprefix(f"{self._root()}/")
