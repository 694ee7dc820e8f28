"""Editing many captions at once in the dataset panel: what, with which words, and what it will change, before it does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import ipywidgets as widgets

from everydream_kit.data.album import Album
from everydream_kit.data.caption_edits import (
    add_trigger_word,
    put_after,
    put_before,
    remove_duplicate_tags,
    replace_text,
    sort_tags,
)
from everydream_kit.data.changes import PrepReport
from everydream_kit.errors import DataError
from everydream_kit.panels import style
from everydream_kit.panels.panel import set_html


@dataclass(frozen=True)
class CaptionEdit:
    """A way to edit captions.

    Attributes:
        title: as the list shows it, and the undo button.
        words: label of its text field; empty: it needs none.
        by: label of the second text field.
        edit: called with a caption file's text and the two fields.
    """

    title: str
    edit: Callable[[str, str, str], str]
    words: str = ""
    by: str = ""


CAPTION_EDITS = {
    "replace": CaptionEdit("Find and replace", replace_text, "Find", "with"),
    "replace_words": CaptionEdit(
        "Find and replace whole words", lambda t, find, by: replace_text(t, find, by, whole_words=True), "Find", "with"
    ),
    "trigger": CaptionEdit("Trigger word", lambda t, word, _: add_trigger_word(t, word), "Word"),
    "before": CaptionEdit("Put before", lambda t, words, _: put_before(t, words), "Words"),
    "after": CaptionEdit("Put after", lambda t, words, _: put_after(t, words), "Words"),
    "sort": CaptionEdit("Sort tags", lambda t, *_: sort_tags(t)),
    "duplicates": CaptionEdit("Remove duplicate tags", lambda t, *_: remove_duplicate_tags(t)),
}


class BulkEdit:
    """A row of controls, and a line that says what they would change.

    Attributes:
        action, words, by: what to do, and with which words.
        button: does it.
        preview: the line.
        box: the widget to show.
    """

    def __init__(self, album: Callable[[], Album], chosen: Callable[[], list[int]]) -> None:
        """Edit nothing yet.

        Args:
            album: gives the images as they are now.
            chosen: gives the indices of the selected images.
        """
        self._album, self._chosen = album, chosen
        titles = [(action.title, name) for name, action in CAPTION_EDITS.items()]
        self.action = style.control(widgets.Dropdown, "Edit", "270px", label="40px", options=titles)
        self.words = style.control(widgets.Text, "Find", "230px", label="40px")
        self.by = style.control(widgets.Text, "with", "230px", label="40px")
        self.button = style.button("Apply to selected", icon="pencil", hint="Edit the captions of the selected images")
        self.preview = widgets.HTML(layout=widgets.Layout(width="100%"))
        self.action.observe(lambda _: self._choose(), "value")
        for field in (self.words, self.by):
            field.observe(lambda _: self.show(), "value")
        self.box = style.column(style.row(self.action, self.words, self.by, self.button), self.preview)
        self._choose()

    def apply(self) -> PrepReport:
        """Edit the captions of the selected images, as one step.

        Raises:
            DataError: nothing is selected, or the words are missing.
        """
        if not self._chosen():
            raise DataError("Select images first: tick them, or press Select page.")
        if self._action.words and not self.words.value:
            raise DataError(f"{self._action.title}: type the words first.")
        return self._album().edit(self._chosen(), self._action.title.lower(), self._edit())

    def show(self) -> None:
        """Say what the action would change, with the first caption as an example."""
        chosen = self._chosen()
        self.button.description = f"Apply to selected ({len(chosen):,})" if chosen else "Apply to selected"
        if not chosen or (self._action.words and not self.words.value):
            set_html(self.preview, "")
            return
        edit, album = self._edit(), self._album()
        sources = [source for source in map(album.source, chosen) if not source.locked]
        changed = [(s.text, after) for s in sources if (after := edit(s.text)).strip() != s.text.strip()]
        words = f"{len(changed):,} of {len(chosen):,} captions would change"
        if changed:
            before, after = (" / ".join(text.split("\n"))[:160] for text in changed[0])
            words += f", such as: {before or '(none)'} → {after}"
        set_html(self.preview, f'<div class="edk-hint" role="status">{style.name_html(words)}</div>')

    @property
    def _action(self) -> CaptionEdit:
        return CAPTION_EDITS[self.action.value]

    def _edit(self) -> Callable[[str], str]:
        edit, words, by = self._action.edit, self.words.value, self.by.value
        return lambda text: edit(text, words, by)

    def _choose(self) -> None:
        for field, label in ((self.words, self._action.words), (self.by, self._action.by)):
            field.description = label or field.description
            field.layout.display = "" if label else "none"
        self.show()
