"""Looking at an image: a click on any thumbnail opens it large, keys go to the next, and it can be downloaded.

Thumbnails carry a key (`image_key`), never a path. The page sends the key back, and the kernel answers with the image;
so a page can have those images only that a panel has shown. `assets/viewer.js` is the page's side, one widget in each
panel. Without anywidget thumbnails are just images.
"""

from __future__ import annotations

import mimetypes
from typing import Any

import ipywidgets as widgets

from everydream_kit.panels.page_widgets import make_page_widget
from everydream_kit.panels.thumbnails import known_image, thumbnail

SHOWN_SIDE = 1600
"""Pixels of the larger side on the page; the download is the file itself."""
MAX_DOWNLOAD_BYTES = 200_000_000


def answer(content: dict[str, Any]) -> tuple[dict[str, Any], list[bytes]]:
    """What the page gets for a message: the image to look at, or the file to keep; `error` where there is none."""
    reply: dict[str, Any] = {"to": "viewer", "number": content.get("number")}
    path = known_image(str(content.get("key")))
    if path is None:
        return {**reply, "error": "The kernel was restarted: run the cell again."}, []
    try:
        if content.get("kind") != "file":
            return {**reply, "name": path.name, "type": "image/jpeg"}, [thumbnail(path, SHOWN_SIDE)]
        if path.stat().st_size > MAX_DOWNLOAD_BYTES:
            return {**reply, "error": f"It is too large to be sent to the page. It is at {path}"}, []
        kind = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
        return {**reply, "name": path.name, "type": kind}, [path.read_bytes()]
    except OSError as error:
        return {**reply, "error": f"{path.name}: {error.strerror}"}, []


def make_viewer() -> widgets.Widget:
    """The widget that lets the thumbnails of its panel be opened; an empty one without anywidget."""
    viewer = make_page_widget("viewer")
    if viewer is None:
        return widgets.HTML("")

    def take(widget: Any, content: dict[str, Any], buffers: list[Any]) -> None:
        if content.get("kind") in ("image", "file"):
            viewer.send(*answer(content))

    viewer.on_msg(take)
    return viewer
