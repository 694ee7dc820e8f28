"""Reading picture headers: size, orientation, and whether the file is whole, without decoding it.

Pillow reads the header. Whether the end of the file is there is told from the format's own end mark; only a JPEG
whose end mark is not where it should be (a phone may append a film) is decoded, at an eighth of its size. What only a
full decode can find is found by the loader.
"""

from __future__ import annotations

import os
import struct
import zlib
from dataclasses import dataclass
from typing import BinaryIO

from PIL import Image, ImageFile, UnidentifiedImageError

from everydream_kit.data.webp import is_webp, read_webp_header

MAX_PIXELS = 178_956_970
"""Largest picture that is opened: Pillow's own limit against decompression bombs, twice its warning."""

ORIENTATION = 0x0112
LYING = (5, 6, 7, 8)
"""The EXIF tag of orientation, and its values for pictures that lie on their side."""

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")
"""Contents that are read, whatever the file's extension. Pillow calls a JPEG with several views MPO."""

EXTENSIONS = {".jpg": "JPEG", ".jpeg": "JPEG", ".jfif": "JPEG", ".png": "PNG", ".bmp": "BMP", ".webp": "WEBP"}
"""What is scanned for, and the format that each extension promises."""

READ_ERRORS = (
    OSError,  # also UnidentifiedImageError, and what most plugins raise
    SyntaxError,  # a broken header, in Pillow's older plugins
    ValueError,
    TypeError,
    IndexError,
    KeyError,
    EOFError,
    OverflowError,
    ZeroDivisionError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
"""All that Pillow raises on damaged files."""


class PictureError(Exception):
    """The picture cannot be trained on.

    Args:
        cause: what is wrong.
        cure: what the person can do.
    """

    def __init__(self, cause: str, cure: str) -> None:
        super().__init__(cause)
        self.cause = cause
        self.cure = cure


@dataclass(frozen=True, slots=True)
class Header:
    """Size in pixels after EXIF rotation, whether there is transparency, and a remark for the person or ""."""

    width: int
    height: int
    has_alpha: bool
    remark: str = ""


def read_header(path: str) -> Header:
    """Read a picture's header.

    Raises:
        PictureError: empty, no picture, cut off, or of an impossible size.
    """
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size == 0:
                raise PictureError("the file is empty", "Copy or download it again, or delete it.")
            return _inspect(file, size, os.path.splitext(path)[1].lower())
    except Image.DecompressionBombError:
        raise PictureError(
            f"claims to have more than {MAX_PIXELS // 10**6} million pixels",
            "If it is a real picture, make a smaller copy; else delete it: files like this are made to fill memory.",
        ) from None
    except UnidentifiedImageError:
        raise PictureError(
            "not a picture in a format that is read, or its beginning is damaged",
            f"Save it again as one of {', '.join(EXTENSIONS)}.",
        ) from None
    except READ_ERRORS as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error) or type(error).__name__
        raise PictureError(f"cannot be read: {reason}", "Save or download it again, or delete it.") from error


_CUT_OFF = ("the file is cut off: its end is missing", "Copy or download it again.")
_ANIMATED = "animated: only its first frame is trained on"


def _inspect(file: BinaryIO, size: int, extension: str) -> Header:
    if is_webp(file.read(12)):
        return _inspect_webp(file, size, extension)
    file.seek(0)
    with Image.open(file, formats=FORMATS) as image:
        width, height = image.size
        if width < 1 or height < 1:
            raise PictureError(f"has no pixels ({width} x {height})", "Delete it, or save it again.")
        if not _is_whole(image, file, size):
            raise PictureError(*_CUT_OFF)
        if _is_turned(image):
            width, height = height, width
        has_alpha = image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info
        return Header(width, height, has_alpha, _remark(image, extension))


def _inspect_webp(file: BinaryIO, size: int, extension: str) -> Header:
    try:
        header = read_webp_header(file, size)
    except EOFError:
        raise PictureError(*_CUT_OFF) from None
    width, height = header.width, header.height
    if width * height > MAX_PIXELS:
        raise Image.DecompressionBombError
    if width < 1 or height < 1:
        raise PictureError(f"has no pixels ({width} x {height})", "Delete it, or save it again.")
    if header.exif is not None and header.exif.get(ORIENTATION) in LYING:
        width, height = height, width
    return Header(width, height, header.has_alpha, _ANIMATED if header.is_animated else _wrong_name("WEBP", extension))


def _is_turned(image: Image.Image) -> bool:
    """Whether EXIF says that the picture lies on its side. Asked only where there is EXIF: PNG decodes to look for it."""
    if not any(name in image.info for name in ("exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif")):
        return False
    try:
        return image.getexif().get(ORIENTATION) in LYING
    except READ_ERRORS:
        return False  # damaged EXIF: viewers show the picture unturned


def _remark(image: Image.Image, extension: str) -> str:
    found = "JPEG" if image.format == "MPO" else str(image.format)
    if found != "JPEG" and getattr(image, "is_animated", False):
        return _ANIMATED
    return _wrong_name(found, extension)


def _wrong_name(found: str, extension: str) -> str:
    promised = EXTENSIONS.get(extension)
    return f"named {extension}, but is a {found} file" if promised and found != promised else ""


def _is_whole(image: ImageFile.ImageFile, file: BinaryIO, size: int) -> bool:
    """Whether the file's end is there."""
    position = file.tell()
    try:
        if image.format in ("JPEG", "MPO"):
            return _ends_with(file, size, b"\xff\xd9") or _decodes(image)
        if image.format == "PNG":
            return _ends_with(file, size, b"IEND\xaeB`\x82") or _png_has_end(file, size)
        if image.format == "GIF":
            return _ends_with(file, size, b";")
        return _bmp_has_all_rows(image, size)
    finally:
        file.seek(position)


def _ends_with(file: BinaryIO, size: int, mark: bytes) -> bool:
    """Whether the last bytes are the end mark, padding aside."""
    file.seek(max(0, size - 64))
    return file.read().rstrip(b"\0\r\n").endswith(mark)


def _decodes(image: Image.Image) -> bool:
    """Whether a JPEG can be decoded to its end, at an eighth of its size to keep memory small."""
    image.draft("RGB", (max(1, image.width // 8), max(1, image.height // 8)))
    try:
        image.load()
    except READ_ERRORS:
        return False
    return True


def _png_has_end(file: BinaryIO, size: int) -> bool:
    """Walk over the chunks by their lengths."""
    position = 8
    while position + 12 <= size:
        file.seek(position)
        length, kind = struct.unpack(">I4s", file.read(8))
        position += 12 + length
        if kind == b"IEND":
            return bool(position <= size)
    return False


def _bmp_has_all_rows(image: ImageFile.ImageFile, size: int) -> bool:
    """Rows of an uncompressed BMP are as long as its header says; compressed ones are left to the loader."""
    tile = image.tile[0] if image.tile else None
    if tile is None or tile[0] != "raw":
        return True
    stride = int(tile[3][1])
    return size >= tile[2] + stride * image.height
