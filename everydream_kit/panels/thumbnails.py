"""Sample images as small JPEGs inside HTML: a gallery that needs no files served, and stays light.

Thumbnails are made once per file and kept while the kernel lives. No widgets here.
"""

from __future__ import annotations

import base64
import hashlib
import html
import io
import secrets
from collections import OrderedDict
from functools import lru_cache
from pathlib import Path

from PIL import Image, ImageOps

from everydream_kit.data.image_files import IMAGE_ERRORS, open_image

KNOWN_IMAGES = 20_000
"""Keys that are remembered, the latest: far more than a page can hold."""
_SECRET = secrets.token_bytes(16)
_known: OrderedDict[str, Path] = OrderedDict()


def thumbnail(path: Path, side: int) -> bytes:
    """A JPEG of the image within `side` pixels; a gray tile where it cannot be read.

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
        with open_image(path) as image:
            image.draft("RGB", (2 * side, 2 * side))
            upright = ImageOps.exif_transpose(image)
            upright.thumbnail((side, side))
            flat = Image.new("RGB", upright.size, "#ffffff")
            rgba = upright.convert("RGBA")
            flat.paste(rgba, mask=rgba.getchannel("A"))
    except IMAGE_ERRORS:
        flat = Image.new("RGB", (side, side), "#c8ccd0")
    buffer = io.BytesIO()
    flat.save(buffer, "JPEG", quality=82)
    return buffer.getvalue()


@lru_cache
def blank() -> bytes:
    """A JPEG of one white pixel."""
    buffer = io.BytesIO()
    Image.new("RGB", (1, 1), "#ffffff").save(buffer, "JPEG")
    return buffer.getvalue()


def image_key(path: Path) -> str:
    """The key by which the page may ask for an image that a panel shows (`viewer`)."""
    key = hashlib.blake2b(str(path).encode("utf-8", "surrogateescape"), key=_SECRET, digest_size=12).hexdigest()
    _known[key] = path
    _known.move_to_end(key)
    if len(_known) > KNOWN_IMAGES:
        _known.popitem(last=False)
    return key


def known_image(key: str) -> Path | None:
    """The image of a key; None where this kernel has shown none of that key."""
    return _known.get(key)


def image_tag(path: Path, side: int, *, words: str = "", height: int | None = None) -> str:
    """An `<img>` with the thumbnail inside, which a click opens large."""
    data = base64.b64encode(thumbnail(path, side)).decode()
    tall = f' style="height:{height}px"' if height else ""
    name = html.escape(words or path.name, quote=True)
    return (
        f'<img alt="{name}" title="{name}" tabindex="0" role="button" data-edk-image="{image_key(path)}"{tall} '
        f'src="data:image/jpeg;base64,{data}"/>'
    )
