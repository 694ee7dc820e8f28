"""Reading image headers: size, orientation, and whether the file is complete, without decoding it.

Pillow reads the header. Whether the file is complete shows in the format's own end mark; only a JPEG
whose end mark is not where it should be (a phone may append a film) is decoded, at an eighth of its size. What only a
full decode can find is found by the loader.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import BinaryIO

from PIL import Image, ImageFile, UnidentifiedImageError

from everydream_kit.data.image_files import (
    EXTENSIONS,
    HEIF_CURE,
    IMAGE_ERRORS,
    LYING,
    ORIENTATION,
    check_size,
    describe_limits,
    formats,
    open_header,
    orientation,
    png_chunks,
)
from everydream_kit.data.webp import is_webp, read_webp_header


class ImageHeaderError(Exception):
    """The image cannot be trained on.

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
    """Size in pixels after EXIF rotation, whether there is transparency, and a note for the person or ""."""

    width: int
    height: int
    has_alpha: bool
    note: str = ""


def read_header(path: str) -> Header:
    """Read an image's header.

    Raises:
        ImageHeaderError: empty, no image, cut off, or of an impossible size.
    """
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size == 0:
                raise ImageHeaderError("the file is empty", "Copy or download it again, or delete it.")
            return _inspect(file, size, os.path.splitext(path)[1].lower())
    except Image.DecompressionBombError:
        raise ImageHeaderError(
            f"claims to have more than {describe_limits()}",
            "If it is a real image, make a smaller copy; else delete it: files like this are made to fill memory.",
        ) from None
    except UnidentifiedImageError:
        promised = EXTENSIONS.get(os.path.splitext(path)[1].lower())
        if promised in ("HEIF", "AVIF") and promised not in formats():
            raise ImageHeaderError("the plug-in that reads this format is not installed", HEIF_CURE) from None
        raise ImageHeaderError(
            "not an image in a format that is read, or its beginning is damaged",
            "Save it again as .jpg, .png or .webp.",
        ) from None
    except IMAGE_ERRORS as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error) or type(error).__name__
        raise ImageHeaderError(f"cannot be read: {reason}", "Save or download it again, or delete it.") from error


_CUT_OFF = ("the file is cut off: its end is missing", "Copy or download it again.")
_ANIMATED = "animated: only its first frame is trained on"
_SEVERAL = "holds several pages: only the first is trained on"
_NO_RGB = {"F": "floating-point pixels have no agreed range", "LAB": "its pixels are in the LAB color space"}


def _inspect(file: BinaryIO, size: int, extension: str) -> Header:
    if is_webp(file.read(12)):
        return _inspect_webp(file, size, extension)
    file.seek(0)
    with open_header(file) as image:
        width, height = image.size
        if image.mode in _NO_RGB:
            raise ImageHeaderError(_NO_RGB[image.mode], "Save it as an 8-bit RGB image, such as PNG.")
        if width < 1 or height < 1:
            raise ImageHeaderError(f"has no pixels ({width} x {height})", "Delete it, or save it again.")
        assert isinstance(image, ImageFile.ImageFile)  # it was opened from a file
        if not _is_complete(image, file, size):
            raise ImageHeaderError(*_CUT_OFF)
        if orientation(image) in LYING:
            width, height = height, width
        has_alpha = image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info
        return Header(width, height, has_alpha, _note(image, extension))


def _inspect_webp(file: BinaryIO, size: int, extension: str) -> Header:
    try:
        header = read_webp_header(file, size)
    except EOFError:
        raise ImageHeaderError(*_CUT_OFF) from None
    width, height = header.width, header.height
    check_size(width, height)
    if width < 1 or height < 1:
        raise ImageHeaderError(f"has no pixels ({width} x {height})", "Delete it, or save it again.")
    if header.exif is not None and header.exif.get(ORIENTATION) in LYING:
        width, height = height, width
    return Header(width, height, header.has_alpha, _ANIMATED if header.is_animated else _wrong_name("WEBP", extension))


def _note(image: Image.Image, extension: str) -> str:
    found = "JPEG" if image.format == "MPO" else str(image.format)
    if found != "JPEG" and getattr(image, "is_animated", False):
        return _SEVERAL if found in ("TIFF", "HEIF") else _ANIMATED
    return _wrong_name(found, extension)


def _wrong_name(found: str, extension: str) -> str:
    promised = EXTENSIONS.get(extension)
    article = "an" if found == "AVIF" else "a"
    return f"named {extension}, but is {article} {found} file" if promised and found != promised else ""


def _is_complete(image: ImageFile.ImageFile, file: BinaryIO, size: int) -> bool:
    """Whether the file's end is there."""
    position = file.tell()
    try:
        if image.format in ("JPEG", "MPO"):
            return _ends_with(file, size, b"\xff\xd9") or _decodes(image)
        if image.format == "PNG":
            return _ends_with(file, size, b"IEND\xaeB`\x82") or any(
                kind == b"IEND" and place + length <= size for kind, place, length in png_chunks(file, size)
            )
        if image.format == "GIF":
            return _ends_with(file, size, b";")
        if image.format in ("AVIF", "HEIF"):
            return _boxes_are_complete(file, size)
        if image.format == "TIFF":
            return _tiff_has_all_pixels(image, size)
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
    except IMAGE_ERRORS:
        return False
    return True


def _bmp_has_all_rows(image: ImageFile.ImageFile, size: int) -> bool:
    """Rows of an uncompressed BMP are as long as its header says; compressed ones are left to the loader."""
    tile = image.tile[0] if image.tile else None
    if tile is None or tile[0] != "raw":
        return True
    assert isinstance(tile[3], tuple)  # (mode, stride, ...) for raw pixels
    stride = int(tile[3][1])
    return size >= tile[2] + stride * image.height


def _boxes_are_complete(file: BinaryIO, size: int) -> bool:
    """Whether the boxes of AVIF and HEIF (ISO 14496-12) end where the file does, or before."""
    position = 0
    while position + 8 <= size:
        file.seek(position)
        head = file.read(16)
        length = int.from_bytes(head[:4], "big")
        if length == 1:
            length = int.from_bytes(head[8:16], "big")
        if length == 0:  # to the end of the file
            return True
        if length < 8:
            return False
        position += length
    return position <= size


def _tiff_has_all_pixels(image: ImageFile.ImageFile, size: int) -> bool:
    """Whether every strip or tile of a TIFF ends within the file."""
    tags = getattr(image, "tag_v2", {})
    for offsets, lengths in ((273, 279), (324, 325)):
        places, counts = tags.get(offsets, ()), tags.get(lengths, ())
        if any(place + count > size for place, count in zip(places, counts, strict=False)):
            return False
    return True
