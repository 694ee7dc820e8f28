"""Grids of labeled images, and image files that carry their settings. Pillow only; no model is needed here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from everydream_kit.atomic import open_atomic

_PAPER, _INK, _QUIET = "#ffffff", "#1f2328", "#59636e"
_EXIF_IFD, _USER_COMMENT = 0x8769, 0x9286


def label_grid(
    rows: Sequence[Sequence[Image.Image]],
    *,
    column_labels: Sequence[str] = (),
    row_labels: Sequence[str] = (),
    title: str = "",
) -> Image.Image:
    """Lay images out in a grid with labels: prompt x guidance scale x checkpoint, before and after, and so on.

    Args:
        rows: images row by row; rows may be of unequal length, cells are as large as the largest image.
        column_labels: above the columns.
        row_labels: above each row's images, wrapped over the whole width: long prompts stay readable.
        title: above everything, wrapped.

    Raises:
        ValueError: no image at all.
    """
    if not any(len(row) for row in rows):
        raise ValueError("a grid needs at least one image")
    cell_width = max(image.width for row in rows for image in row)
    cell_height = max(image.height for row in rows for image in row)
    num_columns = max(len(row) for row in rows)
    size = max(11, min(22, cell_width // 16))
    gap = max(4, size // 2)
    width = num_columns * cell_width + (num_columns - 1) * gap + 2 * gap
    font, small = _font(size), _font(max(10, size - 2))

    lines = _Lines(width - 2 * gap)
    title_lines = lines.wrap(title, font)
    labels = [lines.wrap(row_labels[index] if index < len(row_labels) else "", small) for index in range(len(rows))]
    title_height = lines.height(title_lines, font) + (gap if title_lines else 0)
    head_height = (lines.line_height(small) + gap // 2) if any(column_labels) else 0
    row_heights = [lines.height(label, small) + (gap // 2 if label else 0) + cell_height for label in labels]
    height = 2 * gap + title_height + head_height + sum(row_heights) + gap * (len(rows) - 1)

    grid = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(grid)
    top = gap
    lines.write(draw, (gap, top), title_lines, font, _INK)
    top += title_height
    for column, label in enumerate(column_labels[:num_columns]):
        left = gap + column * (cell_width + gap)
        text = _shortened(label, small, cell_width)
        draw.text((left + cell_width / 2, top), text, font=small, fill=_QUIET, anchor="ma")
    top += head_height
    for row, wrapped, row_height in zip(rows, labels, row_heights, strict=True):
        lines.write(draw, (gap, top), wrapped, small, _QUIET)
        image_top = top + row_height - cell_height
        for column, image in enumerate(row):
            left = gap + column * (cell_width + gap)
            offset = ((cell_width - image.width) // 2, (cell_height - image.height) // 2)
            grid.paste(image.convert("RGB"), (left + offset[0], image_top + offset[1]))
        top += row_height + gap
    return grid


class _Lines:
    """Text broken to a width."""

    def __init__(self, width: int) -> None:
        self.width = width

    def wrap(self, text: str, font: Any) -> list[str]:
        lines: list[str] = []
        for paragraph in text.splitlines():
            line = ""
            for word in paragraph.split():
                longer = f"{line} {word}".strip()
                if line and font.getlength(longer) > self.width:
                    lines.append(line)
                    line = word
                else:
                    line = longer
            lines.append(_shortened(line, font, self.width))
        return lines

    def line_height(self, font: Any) -> int:
        ascent, descent = font.getmetrics()
        return int((ascent + descent) * 1.15)

    def height(self, lines: Sequence[str], font: Any) -> int:
        return len(lines) * self.line_height(font)

    def write(
        self, draw: ImageDraw.ImageDraw, corner: tuple[int, int], lines: Sequence[str], font: Any, fill: str
    ) -> None:
        for index, line in enumerate(lines):
            draw.text((corner[0], corner[1] + index * self.line_height(font)), line, font=font, fill=fill)


def _shortened(text: str, font: Any, width: int) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"


def _font(size: int) -> Any:
    """Pillow's own scalable font: the same on every machine."""
    return ImageFont.load_default(size)


def save_image(image: Image.Image, path: str | Path, *, quality: int = 95) -> None:
    """Save an image with its settings where UIs look for them: a PNG's `parameters` text, a JPEG's or WebP's user
    comment.

    Args:
        path: its extension chooses the format.
        quality: of JPEG and WebP.
    """
    path = Path(path)
    settings = str(image.info.get("parameters", ""))
    if path.suffix.lower() == ".png":
        text = PngImagePlugin.PngInfo()
        if settings:
            text.add_text("parameters", settings)  # becomes iTXt by itself where Latin-1 does not do
        with open_atomic(path) as file:
            image.save(file, "PNG", pnginfo=text)
        return
    exif = Image.Exif()
    if settings:
        exif.get_ifd(_EXIF_IFD)[_USER_COMMENT] = b"UNICODE\x00" + settings.encode("utf-16-be")
    with open_atomic(path) as file:
        image.save(file, Image.registered_extensions()[path.suffix.lower()], quality=quality, exif=exif)
