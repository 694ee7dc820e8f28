"""What all panels share: a box to show, a line for messages, and buttons whose errors become words."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import ipywidgets as widgets

from everydream_kit.errors import KitError
from everydream_kit.panels import style
from everydream_kit.panels.asset_files import read_asset
from everydream_kit.panels.page_widgets import has_page_widgets
from everydream_kit.runs import Status

AGAIN = "This panel is from an earlier session. Run this cell again."
logger = logging.getLogger(__name__)


class Panel:
    """Base of the panels. A panel as the last line of a cell shows itself.

    Attributes:
        box: the widget that is shown; made by the subclass.
        message: the line for what went well or wrong.
    """

    box: widgets.Widget

    def __init__(self) -> None:
        self.message = widgets.HTML(layout=widgets.Layout(min_height="40px"))  # its place is kept: nothing jumps
        self._progress = self._answer = ""  # of a task that runs, and to the button that was pressed last: as shown

    def show(self) -> None:
        """Show the panel below the cell."""
        display_widget(self.box)

    def _ipython_display_(self) -> None:
        self.show()

    def say(self, text: str, tone: style.Tone = "plain") -> None:
        """Show a message, or none with an empty text."""
        set_html(self.message, style.note(text, tone))

    def say_progress(self, text: str) -> None:
        """Say what a task reports, unless the line answers a button that was pressed while it runs."""
        if not self._answer or self.message.value != self._answer:
            self.say(text, "busy")
            self._progress = self.message.value

    def button(self, text: str, action: Callable[[], object], **look: Any) -> widgets.Button:
        """A button for an action, as `style.button` makes it; what goes wrong is shown in words (`on_press`)."""
        control = style.button(text, **look)
        self.on_press(control, action)
        return control

    def make_refresh_button(self) -> widgets.Button:
        """A button that refreshes, hidden where the clock does."""
        control = self.button("Refresh", self.refresh, icon="refresh")
        control.layout.display = "none" if has_page_widgets() else ""
        return control

    def say_status(self, status: Status, *, running: str = "", failed: str = "") -> bool:
        """Show what a background task says of itself. Returns whether it is under way or has ended well.

        Args:
            status: as `BackgroundTask.poll` gives it.
            running, failed: the words where it says none.
        """
        good = status["alive"] or status["state"] == "finished"
        words = status.get("message") or (running if status["alive"] else failed) or status["state"]
        if status["alive"]:
            self.say_progress(words)
        else:
            self.say(words, "good" if good else "bad")
        return good

    def on_press(self, control: widgets.Button, action: Callable[[], object]) -> None:
        """Run an action when a button is pressed; what goes wrong is shown in words, with its traceback in the log.

        The second click of a double click comes after the first has switched the button off, and does nothing.
        """
        control.on_click(lambda _: None if control.disabled else self._press(action))

    def on_beat(self) -> None:
        """What the clock calls: `refresh`, whose errors become words as well, and do not end the clock."""
        attempt(self.refresh, self.say)

    def refresh(self) -> None:
        """Show what is new. Panels that have something to look after say how."""

    def _press(self, action: Callable[[], object]) -> None:
        self.say("")
        attempt(action, self.say)
        self._answer = self.message.value if self.message.value != self._progress else ""


def attempt(action: Callable[[], object], say: Callable[[str, style.Tone], object]) -> None:
    """Run what a control asks for; what goes wrong is said in words, with its traceback in the log.

    Callbacks of controls have nobody to raise to.
    """
    try:
        action()
    except (KitError, OSError) as error:
        logger.debug("%s failed", action, exc_info=True)
        say(str(error), "bad")


def set_html(widget: widgets.HTML, text: str) -> None:
    """Change an HTML widget if the text is another one: an equal value would still cost the page a redraw."""
    if widget.value != text:
        widget.value = text


def display_widget(widget: widgets.Widget) -> None:
    """Show a widget below the cell.

    A notebook that is opened again has the output and not the widget behind it, of which Jupyter says "Error displaying
    widget: model not found". An output of HTML goes ahead, whose style sheet puts a sentence in the place of this error.
    """
    from IPython.display import display

    display({"text/html": read_asset("again.html"), "text/plain": AGAIN}, raw=True)
    view = {"version_major": 2, "version_minor": 0, "model_id": widget.model_id}
    display({"application/vnd.jupyter.widget-view+json": view, "text/plain": AGAIN}, raw=True)
