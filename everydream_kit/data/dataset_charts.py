"""Charts of a dataset: how its buckets fill, and a contact sheet of its images. Plain Pillow, for notebooks and
files."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from everydream_kit.data.dataset import Dataset
from everydream_kit.data.image_files import IMAGE_ERRORS, open_image
from everydream_kit.data.report import BucketFill

WIDTH = 1000
CELL = 120
NUM_CELLS = 32
"""Images of a contact sheet, spread evenly over the dataset."""

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

_MARGIN = 16
_BARS_HEIGHT = 220
_INK, _PALE, _BAR, _SHORT, _PAPER = "#1f2933", "#9aa5b1", "#2f6fab", "#e0a030", "#ffffff"


def draw_dataset(dataset: Dataset, buckets: Sequence[BucketFill]) -> Image.Image:
    """Bucket chart above, contact sheet below; RGB, 1000 pixels wide.

    A bar is as high as its bucket has images; the yellow part on top stands for the places left empty in short
    batches.
    """
    chart = _draw_buckets(buckets)
    grid = _draw_contact_grid(dataset)
    page = Image.new("RGB", (WIDTH, chart.height + grid.height), _PAPER)
    page.paste(chart, (0, 0))
    page.paste(grid, (0, chart.height))
    return page


def _draw_buckets(buckets: Sequence[BucketFill]) -> Image.Image:
    page = Image.new("RGB", (WIDTH, _BARS_HEIGHT + 110), _PAPER)
    draw = ImageDraw.Draw(page)
    font = ImageFont.load_default(13)
    draw.text((_MARGIN, 8), "Images in each bucket (yellow: places left empty in short batches)", _INK, font)
    if not buckets:
        draw.text((_MARGIN, 40), "no images", _PALE, font)
        return page
    tallest = max(bucket.num_images / bucket.fullness for bucket in buckets)
    pitch = (WIDTH - 2 * _MARGIN) / len(buckets)
    bar = min(60.0, pitch * 0.7)
    floor = 36 + _BARS_HEIGHT
    for number, bucket in enumerate(buckets):
        left = _MARGIN + pitch * (number + 0.5) - bar / 2
        top = floor - (_BARS_HEIGHT - 20) * bucket.num_images / tallest
        top_of_batches = floor - (_BARS_HEIGHT - 20) * bucket.num_images / bucket.fullness / tallest
        draw.rectangle((left, top_of_batches, left + bar, floor), _SHORT)
        draw.rectangle((left, top, left + bar, floor), _BAR)
        draw.text((left + bar / 2, top_of_batches - 3), str(bucket.num_images), _INK, font, anchor="mb")
        _draw_upright(page, f"{bucket.size[0]}x{bucket.size[1]}", (int(left + bar / 2), floor + 6), font)
    draw.line((_MARGIN, floor, WIDTH - _MARGIN, floor), _INK)
    return page


def _draw_upright(page: Image.Image, text: str, top: tuple[int, int], font: Font) -> None:
    """A label that reads from bottom to top, centerd below a point."""
    left, upper, right, lower = font.getbbox(text)
    label = Image.new("RGB", (int(right - left) + 2, int(lower - upper) + 2), _PAPER)
    ImageDraw.Draw(label).text((1 - left, 1 - upper), text, _INK, font)
    label = label.rotate(90, expand=True)
    page.paste(label, (top[0] - label.width // 2, top[1]))


def _draw_contact_grid(dataset: Dataset) -> Image.Image:
    """Up to `NUM_CELLS` images with the beginning of their captions."""
    count = min(NUM_CELLS, len(dataset))
    columns = (WIDTH - _MARGIN) // CELL
    rows = -(-count // columns)
    page = Image.new("RGB", (WIDTH, rows * (CELL + 16) + _MARGIN), _PAPER)
    draw = ImageDraw.Draw(page)
    font = ImageFont.load_default(11)
    chosen = np.linspace(0, len(dataset) - 1, count).round().astype(int).tolist() if count else []
    for number, index in enumerate(chosen):
        left, top = _MARGIN + number % columns * CELL, number // columns * (CELL + 16)
        thumbnail = _thumbnail(dataset.path(index))
        if thumbnail is None:
            draw.rectangle((left, top, left + CELL - 8, top + CELL - 8), outline=_PALE)
            draw.text((left + 6, top + 6), "unreadable", _PALE, font)
        else:
            page.paste(thumbnail, (left + (CELL - 8 - thumbnail.width) // 2, top + (CELL - 8 - thumbnail.height) // 2))
        draw.text((left, top + CELL - 6), _shorten(dataset.caption(index).text, font), _INK, font)
    return page


def _shorten(text: str, font: Font) -> str:
    """As much of a text as fits below a cell."""
    while text and font.getlength(text) > CELL - 8:
        text = text[: max(0, int(len(text) * 0.9) - 1)]
    return text


def _thumbnail(path: str) -> Image.Image | None:
    """A small RGB copy, or None where the file is broken."""
    side = CELL - 8
    try:
        with warnings.catch_warnings(), open_image(path) as image:
            warnings.filterwarnings("ignore", module=r"PIL\b")
            image.draft("RGB", (side, side))
            small = ImageOps.exif_transpose(image)
            small.thumbnail((side, side))
            return small.convert("RGBA").convert("RGB") if small.mode == "P" else small.convert("RGB")
    except IMAGE_ERRORS:
        return None
