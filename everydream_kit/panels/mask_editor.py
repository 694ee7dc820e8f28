"""Loss masks in the dataset panel: painted with a brush over the image, shown, removed.

What is painted is not learned (docs/data.md). The page sends the mask as a PNG (`assets/brush.js`, by anywidget); it is
written as one undoable step. Without anywidget masks are shown and removed here, and made in an image editor.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ipywidgets as widgets
from PIL import Image

from everydream_kit.data.album import Album
from everydream_kit.data.image_files import IMAGE_ERRORS, open_image
from everydream_kit.errors import DataError
from everydream_kit.panels import style
from everydream_kit.panels.page_widgets import make_page_widget
from everydream_kit.panels.panel import attempt, set_html
from everydream_kit.panels.thumbnails import thumbnail

SHOWN_SIDE = 768
"""Pixels of the image on the page; a mask has one value for each 8 pixels of a training image."""
MAX_MASK_BYTES = 8 << 20


class MaskEditor:
    """One image at a time, with its mask.

    Attributes:
        number: which image, counted from 1 over those that the gallery's search found.
        brush: the widget that is painted on, or None without anywidget.
        remove_button: removes the shown image's mask.
        box: the widget to show.
    """

    def __init__(
        self,
        album: Callable[[], Album],
        found: Callable[[], list[int]],
        save: Callable[[int, bytes | None], None],
        say: Callable[[str, style.Tone], None],
    ) -> None:
        """Show nothing yet.

        Args:
            album: gives the images as they are now.
            found: gives the indices that the search found.
            save: called with an image and its new mask, a PNG; None: without one.
            say: takes messages.
        """
        self._album, self._found, self._save, self._say = album, found, save, say
        self.number = style.control(widgets.BoundedIntText, "Image", "130px", label="46px", value=1, min=1, max=1)
        self.previous, self.next = style.button("‹ Back"), style.button("Next ›")
        self.remove_button = style.button("Remove mask", icon="trash", hint="Remove the mask. Undo brings it back")
        self.title, self.hint = widgets.HTML(), widgets.HTML()
        self.number.observe(lambda _: self.show(), "value")
        self.previous.on_click(lambda _: self._turn(-1))
        self.next.on_click(lambda _: self._turn(1))
        self.remove_button.on_click(lambda _: attempt(lambda: self._save(self._index(), None), say))
        self.brush: Any = make_page_widget("brush", image=b"", mask=b"", name="", version=0)
        if self.brush is not None:
            self.brush.on_msg(self._take)
        shown = [] if self.brush is None else [self.brush]
        row = style.row(self.previous, self.number, self.next, self.remove_button, self.title)
        self.box = style.column(row, self.hint, *shown)

    def show(self) -> None:
        """Show the image of this number, with its mask as it is on the disk."""
        found = self._found()
        self.number.max = max(1, len(found))
        self.previous.disabled, self.next.disabled = self.number.value <= 1, self.number.value >= len(found)
        self.remove_button.disabled = True
        if not found:
            set_html(self.title, "")
            set_html(self.hint, '<div class="edk-empty">Masks begin with the first images.</div>')
            return
        album, index = self._album(), self._index()
        path = album.path(index)
        mask = album.mask(index)
        self.remove_button.disabled = mask is None
        set_html(self.title, f'<span class="edk-hint">of {len(found):,} · {style.name_html(album.name(index))}</span>')
        words = (
            "Red is ignored in the loss: the model does not learn it." if mask else "No mask: everything is learned."
        )
        if self.brush is None:
            words += f" To make one, save {path.stem}.mask.png next to the image: black is ignored."
        set_html(self.hint, f'<div class="edk-hint">{style.name_html(words)}</div>')
        if self.brush is not None:
            with self.brush.hold_sync():
                self.brush.image, self.brush.mask = thumbnail(path, SHOWN_SIDE), _mask_png(mask)
                self.brush.name = album.name(index)
                self.brush.version += 1

    def _index(self) -> int:
        return self._found()[min(int(self.number.value), len(self._found())) - 1]

    def _turn(self, by: int) -> None:
        self.number.value = min(self.number.max, max(1, self.number.value + by))

    def _take(self, _: Any, content: Any, buffers: list[Any]) -> None:
        """A mask from the page. It names its image, which may not be the shown one any more."""
        if isinstance(content, dict) and content.get("kind") == "mask" and buffers:
            attempt(lambda: self._receive(str(content.get("name")), bytes(buffers[0])), self._say)

    def _receive(self, name: str, data: bytes) -> None:
        album = self._album()
        index = next((one for one in range(len(album)) if album.name(one) == name), None)
        if index is None:
            raise DataError(f"{name}: is not in the dataset any more; its mask is not saved.")
        self._save(index, check_mask(data))


def check_mask(data: bytes) -> bytes | None:
    """A mask from the page as a small gray PNG; None where nothing is masked.

    Raises:
        DataError: it is not an image, or larger than a mask can be.
    """
    if len(data) > MAX_MASK_BYTES:
        raise DataError("The mask is too large.")
    try:
        with open_image(io.BytesIO(data)) as image:
            gray = image.convert("L")
    except IMAGE_ERRORS as error:
        raise DataError(f"The mask cannot be read ({error}).") from error
    if gray.getextrema() == (255, 255):
        return None
    return _png(gray)


def _mask_png(path: Path | None) -> bytes:
    """A mask as it is shown; empty where there is none or it cannot be read."""
    if path is None:
        return b""
    try:
        with open_image(path) as image:
            gray = image.convert("L")
    except IMAGE_ERRORS:
        return b""
    gray.thumbnail((SHOWN_SIDE, SHOWN_SIDE))
    return _png(gray)


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
