"""A page of images with captions that are edited in place. Twelve cards are made once and filled again for each page.

So a dataset of five thousand images costs the page no more than one of twelve. A caption is written to its file when
the field is left.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ipywidgets as widgets

from everydream_kit.data.album import Album
from everydream_kit.data.tagging import CaptionSource
from everydream_kit.panels import style
from everydream_kit.panels.panel import attempt, set_html
from everydream_kit.panels.thumbnails import blank, image_key, thumbnail

PAGE = 12
THUMBNAIL_SIDE = 260


class Card:
    """One image: thumbnail, check box, name, caption. Names are HTML and tooltips, never descriptions."""

    def __init__(self, on_caption: Callable[[int, str], None], on_choose: Callable[[int, bool], None]) -> None:
        self.index: int | None = None
        self._on_caption, self._on_choose = on_caption, on_choose
        self._quiet = False
        self.image = widgets.Image(format="jpeg", value=blank())  # never a broken-image icon, also where it is hidden
        self.image.add_class("edk-thumb")
        self._key = ""
        self.check = style.control(widgets.Checkbox, "Select", "auto", indent=False)
        self.title = widgets.HTML(layout=widgets.Layout(flex="1 1 0", width="auto", min_width="0"))
        self.text = widgets.Textarea(
            description="Caption", continuous_update=False, layout=widgets.Layout(width="auto", height="76px")
        )
        self.note = widgets.HTML()
        self.text.observe(self._take_text, "value")
        self.check.observe(self._take_check, "value")
        line = widgets.HBox([self.check, self.title], layout=widgets.Layout(margin="0 8px", align_items="center"))
        self.box = widgets.VBox([self.image, line, self.text, self.note])
        self.box.add_class("edk-card")

    def show(self, album: Album, index: int | None, *, chosen: bool = False) -> None:
        """Fill the card with an image, or hide it."""
        self._quiet = True
        self.index = index
        self.box.layout.display = "" if index is not None else "none"
        self.check.value = chosen
        if index is not None:
            name, source = album.name(index), album.source(index)
            self._offer_large(album.path(index))
            self.image.value = thumbnail(album.path(index), THUMBNAIL_SIDE)
            set_html(self.title, f'<div class="edk-name">{style.name_html(name)}</div>')
            for control in (self.check, self.text):
                style.set_hint(control, name)
            self.text.value = album.caption(index)
            self.text.disabled = bool(source.locked)
            set_html(self.note, _note_on(album, index, source))
        self._mark()
        self._quiet = False

    def _offer_large(self, path: Path) -> None:
        """Let a click open this image: the page knows it by a class."""
        name = f"edk-image-{image_key(path)}"
        if name != self._key:
            self.image.remove_class(self._key)
            self.image.add_class(name)
            self._key = name

    def _mark(self) -> None:
        (self.box.add_class if self.check.value else self.box.remove_class)("edk-chosen")

    def _take_text(self, change: dict[str, Any]) -> None:
        if not self._quiet and self.index is not None:
            self._on_caption(self.index, change["new"])

    def _take_check(self, change: dict[str, Any]) -> None:
        if not self._quiet and self.index is not None:
            self._mark()
            self._on_choose(self.index, change["new"])


class Gallery:
    """Search, pages, selection.

    Attributes:
        chosen: names of the selected images, on whatever page. Names, since positions change with every scan.
        found: indices that the search found, in order.
        tools: place for what is done with the selection.
        on_select: called when another selection is shown.
    """

    def __init__(self, album: Album, say: Callable[[str, style.Tone], None], on_edit: Callable[[], None]) -> None:
        self.album, self._say, self._on_edit = album, say, on_edit
        self.on_select: Callable[[], None] = lambda: None
        self.chosen: set[str] = set()
        self.found: list[int] = []
        how = {"placeholder": "words in captions and names; -word excludes", "continuous_update": False}
        self.search = style.control(widgets.Text, "Search", "380px", label="56px", **how)
        self.page = style.control(widgets.BoundedIntText, "Page", "110px", label="36px", value=1, min=1, max=1)
        self.previous, self.next = style.button("‹ Back"), style.button("Next ›")
        self.count, self.selection = widgets.HTML(), widgets.HTML()
        self.choose_page, self.choose_found = style.button("Select page"), style.button("Select all found")
        self.choose_none = style.button("Select none")
        self.cards = [Card(self._write_caption, self._choose) for _ in range(PAGE)]
        self.grid = widgets.GridBox([card.box for card in self.cards])
        self.grid.add_class("edk-cards")
        self.tools = widgets.VBox()
        self._connect()
        self.box = style.column(
            style.row(self.search, self.previous, self.page, self.next, self.count),
            style.row(self.choose_page, self.choose_found, self.choose_none, self.selection),
            self.tools,
            self.grid,
        )
        self.update()

    def use(self, album: Album) -> None:
        """Show another dataset. Nothing of it is selected, also where names are the same."""
        self.album, self.chosen = album, set()
        self._search()

    @property
    def chosen_indices(self) -> list[int]:
        """Indices of the selected images, in the album's order, as of the last scan."""
        return [index for index in range(len(self.album)) if self.album.name(index) in self.chosen]

    def update(self) -> None:
        """Search again and fill the page, after a change of the album."""
        self.chosen &= set(map(self.album.name, range(len(self.album))))
        self.found = self.album.search(self.search.value)
        self.page.max = max(1, math.ceil(len(self.found) / PAGE))
        self._fill()

    @property
    def shown(self) -> list[int]:
        """Indices on this page."""
        start = (self.page.value - 1) * PAGE
        return self.found[start : start + PAGE]

    def _connect(self) -> None:
        self.search.observe(lambda _: self._search(), "value")
        self.page.observe(lambda _: self._fill(), "value")
        self.previous.on_click(lambda _: self._turn(-1))
        self.next.on_click(lambda _: self._turn(1))
        self.choose_page.on_click(lambda _: self._select(self.chosen | self._names(self.shown)))
        self.choose_found.on_click(lambda _: self._select(self.chosen | self._names(self.found)))
        self.choose_none.on_click(lambda _: self._select(set()))

    def _search(self) -> None:
        self.page.value = 1
        self.update()

    def _turn(self, by: int) -> None:
        self.page.value = min(self.page.max, max(1, self.page.value + by))

    def _names(self, indices: Sequence[int]) -> set[str]:
        return set(map(self.album.name, indices))

    def _select(self, names: set[str]) -> None:
        self.chosen = names
        self._fill()

    def _fill(self) -> None:
        shown = [*self.shown, *([None] * PAGE)][:PAGE]
        for card, index in zip(self.cards, shown, strict=True):
            card.show(self.album, index, chosen=index is not None and self.album.name(index) in self.chosen)
        self.count.value = f'<span class="edk-hint">of {self.page.max} · {len(self.found):,} images</span>'
        self.previous.disabled = self.page.value <= 1
        self.next.disabled = self.page.value >= self.page.max
        self._report_selection()

    def _report_selection(self) -> None:
        text = f"{count_images(len(self.chosen))} selected in {self.album.root}" if self.chosen else "nothing selected"
        self.selection.value = f'<span class="edk-hint">{style.name_html(text)}</span>'
        self.on_select()

    def _choose(self, index: int, chosen: bool) -> None:
        (self.chosen.add if chosen else self.chosen.discard)(self.album.name(index))
        self._report_selection()

    def _write_caption(self, index: int, text: str) -> None:
        def write() -> None:
            self.album.set_caption(index, text)
            self._say(f"Caption of {self.album.name(index)} written.", "good")
            self._on_edit()

        attempt(write, self._say)


def _note_on(album: Album, index: int, source: CaptionSource) -> str:
    """What is worth knowing about a card's caption, as HTML."""
    words = f"Not edited here: {source.locked}." if source.locked else ""
    if not source.is_own:
        name = album.dataset.caption(index).text
        words = "from the file name" if source.text else f"no caption; trained as {name!r}, from the file name"
    return f'<div class="edk-hint">{style.name_html(words)}</div>' if words else ""


def count_images(number: int) -> str:
    """`1 image`, `1,712 images`."""
    return count_things(number, "image")


def count_things(number: int, noun: str) -> str:
    """`1 file`, `1,712 files`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
