"""A question with buttons for its answers, shown in a panel before something that cannot be taken back."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import ipywidgets as widgets

from everydream_kit.panels import style
from everydream_kit.panels.panel import set_html


class Question:
    """Hidden until something is asked, and again when it is answered. Nothing happens before.

    Attributes:
        box: the widget to show.
        buttons: the answers, *Cancel* last.
    """

    def __init__(self, press: Callable[[Callable[[], object]], object]) -> None:
        """Ask nothing yet.

        Args:
            press: runs an answer and shows what goes wrong, as `Panel._press`.
        """
        self._press = press
        self._text = widgets.HTML(layout=widgets.Layout(flex="1 1 320px", width="auto"))
        self._row = style.row()
        self.buttons: list[widgets.Button] = []
        self.box = style.row(self._text, self._row)
        self._row.layout.width = "auto"
        self.close()

    @property
    def is_open(self) -> bool:
        return bool(self.box.layout.display != "none")

    def ask(self, text: str, answers: Mapping[str, Callable[[], object]]) -> None:
        """Show a question.

        Args:
            text: what is about to happen.
            answers: constant words of each button, and what it does.
        """
        self.buttons = [self._button(words, action) for words, action in answers.items()]
        self.buttons.append(self._button("Cancel", lambda: None))
        self._row.children = tuple(self.buttons)
        set_html(self._text, style.note(text, "warn"))
        self.box.layout.display = ""

    def close(self) -> None:
        """Take the question back."""
        self.box.layout.display = "none"
        set_html(self._text, "")

    def _button(self, words: str, action: Callable[[], object]) -> widgets.Button:
        def answer(_: widgets.Button) -> None:
            self.close()
            self._press(action)

        button = style.button(words)
        button.on_click(answer)
        return button
