"""Pages of which one is shown, and folds that open: made of buttons, so that both work from the keyboard everywhere.

ipywidgets' own Tab takes no keys in version 7 (Colab), and its Accordion takes none in any version.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import ipywidgets as widgets

from everydream_kit.panels import style


class Pages:
    """A row of titles and the page that belongs to the chosen one.

    Attributes:
        box: the widget to show.
        titles: the buttons, in order.
        on_choose: called with the number of a page that was brought to the front.
    """

    def __init__(self, pages: Mapping[str, widgets.Widget]) -> None:
        self.titles = [style.button(title, hint=f"Show {title}") for title in pages]
        self._pages = list(pages.values())
        for index, title in enumerate(self.titles):
            title.add_class("edk-tab")
            title.on_click(lambda _, index=index: self._choose(index))
        row = widgets.HBox(self.titles, layout=widgets.Layout(flex_flow="row wrap", width="100%"))
        row.add_class("edk-tabs")
        self.box = style.column(row, *self._pages)
        self.on_choose: Callable[[int], object] = lambda index: None
        self._choose(0)

    @property
    def selected_index(self) -> int:
        """Number of the shown page, from 0."""
        return self._selected

    @selected_index.setter
    def selected_index(self, index: int) -> None:
        self._choose(index)

    def set_title(self, index: int, text: str) -> None:
        """Change a page's title."""
        self.titles[index].description, self.titles[index].tooltip = text, f"Show {text}"

    def _choose(self, index: int) -> None:
        self._selected = index
        for number, (title, page) in enumerate(zip(self.titles, self._pages, strict=True)):
            (title.add_class if number == index else title.remove_class)("edk-current")
            page.layout.display = "" if number == index else "none"
        self.on_choose(index)


class Fold:
    """A title that shows and hides what belongs to it; its content is made when it is opened first.

    Attributes:
        box: the widget to show.
        title: the button.
    """

    def __init__(self, title: str, make: Callable[[], Sequence[widgets.Widget]]) -> None:
        self._make = make
        self.title = style.button(title, icon="caret-right", hint=f"Open {title}", width="100%")
        self.title.add_class("edk-fold")
        self.title.on_click(lambda _: self.set_open(not self.is_open))
        self.content = widgets.VBox(layout=widgets.Layout(display="none", width="100%", padding="0 0 8px 18px"))
        self.box = style.column(self.title, self.content)

    @property
    def is_open(self) -> bool:
        return bool(self.content.layout.display != "none")

    def set_title(self, text: str) -> None:
        """Change the title."""
        self.title.description, self.title.tooltip = text, f"Open {text}"

    def set_open(self, wanted: bool) -> None:
        """Show the content, or hide it."""
        if wanted and not self.content.children:
            self.content.children = tuple(self._make())
        self.content.layout.display = "" if wanted else "none"
        self.title.icon = "caret-down" if wanted else "caret-right"
