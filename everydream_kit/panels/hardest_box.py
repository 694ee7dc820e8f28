"""The table of the images that a model finds hardest: thumbnail, caption, loss, trend, and the way to their captions."""

from __future__ import annotations

import html
from collections.abc import Callable
from pathlib import Path

import ipywidgets as widgets

from everydream_kit.actions.hardest_images import HardestReader, HardImage, caption_text
from everydream_kit.data.folders import FolderFiles
from everydream_kit.panels import style
from everydream_kit.panels.panel import set_html
from everydream_kit.panels.svg_charts import sparkline
from everydream_kit.panels.thumbnails import image_tag

LEAD = (
    "Images with the highest loss in the last epoch. A wrong caption, a crop that hides the subject or an image that does not "
    "belong is often at the top. Losses differ by chance from use to use, so look at the trend as well."
)
EMPTY = "The table appears after the first epoch."


class HardestBox:
    """The hardest images of the shown run.

    Attributes:
        box: the widget to show.
        lines: one for each image.
    """

    def __init__(self, open_image: Callable[[Path], object]) -> None:
        """Show nothing yet.

        Args:
            open_image: opens an image where its caption can be edited.
        """
        self._open_image = open_image
        self._reader: HardestReader | None = None
        self.head, self.lines, self.slot = widgets.HTML(), widgets.VBox(), widgets.VBox()
        self.box = style.column(widgets.HTML(f'<p class="edk-lead">{LEAD}</p>'), self.slot, self.head, self.lines)

    def attach(self, run: Path | None) -> None:
        """Begin to show another run."""
        self._reader = HardestReader(run) if run is not None else None
        self._show([])

    def refresh(self) -> None:
        """Show what the last epoch has brought. Called while the table is in view only: it reads a file for each epoch."""
        if self._reader is not None and self._reader.update():
            self._show(self._reader.images)

    def _show(self, images: list[HardImage]) -> None:
        epoch = self._reader.epoch if self._reader is not None else None
        text = EMPTY if epoch is None or not images else f"{len(images)} hardest of epoch {epoch + 1}"
        set_html(self.head, f'<div class="edk-hint">{text}</div>')
        files = FolderFiles()
        self.lines.children = tuple(self._line(number, image, files) for number, image in enumerate(images, start=1))

    def _line(self, number: int, image: HardImage, files: FolderFiles) -> widgets.Widget:
        caption = caption_text(image.path, files) if image.path.is_file() else "(the file is gone)"
        uses = f"{image.count} use{'' if image.count == 1 else 's'}"
        text = (
            f'<div class="edk-found edk-hard">{image_tag(image.path, 96, words=image.path.name, height=56)}'
            f"<div><b>{html.escape(image.path.name)}</b><br>{html.escape(caption)}"
            f'<div class="edk-hint">{number} · loss {image.loss:.4f} in {uses}</div></div></div>'
        )
        trend = widgets.HTML(sparkline(image.trend, f"Loss of {image.path.name} by epoch"))
        button = style.button(
            "Open in dataset", icon="pencil", hint=f"Edit the caption of {image.path.name}, or exclude it"
        )
        button.disabled = not image.path.is_file()
        button.on_click(lambda _: self._open_image(image.path))
        return style.line(text, trend, button)
