"""Sample pictures as small JPEGs inside HTML: a gallery that needs no files served, and stays light.

Thumbnails are made once per file and kept while the kernel lives. No widgets here.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from PIL import Image, ImageOps

from everydream_kit.data.image_files import IMAGE_ERRORS, open_image


def thumbnail(path: Path, side: int) -> bytes:
    """A JPEG of the picture within `side` pixels; a grey tile where it cannot be read.

    A file's thumbnail is made again when the file changes.
    """
    try:
        changed = path.stat().st_mtime_ns
    except OSError:
        changed = 0
    return _thumbnail(str(path), changed, side)


@lru_cache(maxsize=1024)
def _thumbnail(path: str, changed: int, side: int) -> bytes:
    try:
        with open_image(path) as picture:
            picture.draft("RGB", (2 * side, 2 * side))
            upright = ImageOps.exif_transpose(picture)
            upright.thumbnail((side, side))
            flat = Image.new("RGB", upright.size, "#ffffff")
            rgba = upright.convert("RGBA")
            flat.paste(rgba, mask=rgba.getchannel("A"))
    except IMAGE_ERRORS:
        flat = Image.new("RGB", (side, side), "#c8ccd0")
    buffer = io.BytesIO()
    flat.save(buffer, "JPEG", quality=82)
    return buffer.getvalue()


def picture_tag(path: Path, side: int, *, words: str = "", height: int | None = None) -> str:
    """An `<img>` with the thumbnail inside."""
    data = base64.b64encode(thumbnail(path, side)).decode()
    tall = f' style="height:{height}px"' if height else ""
    return f'<img alt="{html.escape(words or path.name, quote=True)}"{tall} src="data:image/jpeg;base64,{data}"/>'


def strip(pictures: Sequence[tuple[Path, str]], *, side: int = 220, height: int | None = None) -> str:
    """Pictures beside each other, each with a caption below."""
    figures = "".join(
        f"<figure>{picture_tag(path, side, words=words, height=height)}"
        f"<figcaption>{html.escape(words)}</figcaption></figure>"
        for path, words in pictures
    )
    return f'<div class="edk-shots">{figures}</div>'
