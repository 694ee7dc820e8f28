"""Opening image files: the one place that does, for scan, loader, preparation and panels alike.

An image comes from strangers, so only formats of `formats()` are tried (Pillow would run Ghostscript on PostScript),
area and sides are bounded before anything is decoded, and `IMAGE_ERRORS` is all that decoding can raise: an image's
trouble is a problem of that image. A test of the layout forbids `Image.open` elsewhere.
"""

from __future__ import annotations

import importlib.util
import io
import os
import struct
import warnings
import zlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image, features

MAX_PIXELS = 178_956_970
"""Largest area that is opened: Pillow's own limit against decompression bombs, twice its warning."""

MAX_SIDE = 65_535
"""Longest side: JPEG's own limit. A hair of 170,000,000 × 1 has an area that passes and takes gigabytes to resize."""

EXTENSIONS = {
    **dict.fromkeys((".jpg", ".jpeg", ".jfif", ".jpe"), "JPEG"),
    ".png": "PNG",
    ".bmp": "BMP",
    ".webp": "WEBP",
    ".gif": "GIF",
    **dict.fromkeys((".tif", ".tiff"), "TIFF"),
    ".avif": "AVIF",
    **dict.fromkeys((".heic", ".heif"), "HEIF"),
}
"""What is scanned for, and the format that each extension promises."""

UNREAD_EXTENSIONS = frozenset(
    f".{name}"
    for names in (
        "jxl jp2 j2k jpf jpx psd psb xcf kra svg svgz eps ai tga",
        "ico icns exr hdr dds qoi ppm pgm pbm pnm pcx dib apng mng",
        "dng cr2 cr3 nef arw orf rw2 raf pef srw heics avifs wmf emf",
    )
    for name in names.split()
)
"""Images of formats that are not read: named by the scan, with the cure."""

HEIF_CURE = "Install the plug-in with `pip install everydream-kit[heic]`, or save it as JPEG or PNG."

IMAGE_ERRORS = (
    OSError,  # also UnidentifiedImageError, and what most plugins raise
    SyntaxError,  # a broken header, in Pillow's older plugins
    ValueError,
    TypeError,
    LookupError,
    EOFError,
    ArithmeticError,
    RuntimeError,  # the decoders of AVIF and HEIF
    AttributeError,  # damaged TIFF tags
    AssertionError,
    MemoryError,  # one image too large for this machine
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
"""All that Pillow and its plug-ins raise on damaged files."""

ORIENTATION = 0x0112
LYING = (5, 6, 7, 8)
"""The EXIF tag of orientation, and its values for images that lie on their side."""

_MAX_CHUNK_BYTES = 1 << 20
_MAX_TEXT_BYTES = 16 << 20
"""Bytes that text chunks of a PNG may decompress to, each and together; larger ones are skipped."""


@cache
def formats() -> tuple[str, ...]:
    """Contents that are read, whatever a file's extension. Pillow calls a JPEG with several views MPO."""
    found = ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF"]
    if features.check("avif"):  # Pillow 11.3 and later
        found.append("AVIF")
    if importlib.util.find_spec("pillow_heif") is not None:
        import pillow_heif

        pillow_heif.register_heif_opener()
        found.append("HEIF")
    return tuple(found)


def open_image(source: str | Path | BinaryIO) -> Image.Image:
    """Open an image: its header is read and its size checked, its pixels are decoded on demand.

    Raises:
        Image.DecompressionBombError: the area or a side is beyond its limit.
        UnidentifiedImageError: not in one of the formats.
        IMAGE_ERRORS: damaged.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # panoramas of 90 to 180 megapixels are used
        return open_header(source, with_trailer=True)


def open_header(source: str | Path | BinaryIO, *, with_trailer: bool = False) -> Image.Image:
    """`open_image` for threads: without a change to the warning filters, which a process has once.

    Args:
        source: path, or a file that is open at its start.
        with_trailer: look at what follows a PNG's pixels as well, which only decoding reads.
    """
    is_own = isinstance(source, str | Path)
    file: BinaryIO = open(source, "rb") if is_own else source  # type: ignore[arg-type,assignment]  # noqa: SIM115
    try:
        image = Image.open(_without_long_notes(file, with_trailer), formats=formats())
        check_size(*image.size)
    except BaseException:
        if is_own:
            file.close()
        raise
    if is_own:
        image._exclusive_fp = True  # closed with the image, as Pillow does for a path
    return image


def check_size(width: int, height: int) -> None:
    """Raises: Image.DecompressionBombError: more pixels, or a longer side, than is opened."""
    if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
        raise Image.DecompressionBombError(f"{width} x {height} pixels")


def count_images(data_root: Any) -> int | None:
    """Image files below a dataset's folder or folders; None where it is an archive, an index or on the Hub."""
    roots = data_root if isinstance(data_root, list) else [data_root]
    if not all(isinstance(root, str) and Path(root).is_dir() for root in roots):
        return None
    names = (name for root in roots for _, _, names in os.walk(root) for name in names)
    return sum(os.path.splitext(name)[1].lower() in EXTENSIONS and ".mask." not in name for name in names)


def describe_limits() -> str:
    """The limits in words."""
    return f"{MAX_PIXELS // 10**6} million pixels or {MAX_SIDE:,} on a side"


def orientation(image: Image.Image) -> int:
    """The EXIF orientation; 1 where there is none or it is damaged, as viewers show it.

    Asked only where there is EXIF: PNG decodes to look for it.
    """
    if not any(name in image.info for name in ("exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif")):
        return 1
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except IMAGE_ERRORS:
        return 1


def _without_long_notes(file: BinaryIO, with_trailer: bool) -> BinaryIO:
    """The file, or a PNG without those text and ICC chunks that Pillow refuses to read for their length."""
    start = file.read(8)
    file.seek(0)
    if start != b"\x89PNG\r\n\x1a\n":
        return file
    size = os.fstat(file.fileno()).st_size if not isinstance(file, io.BytesIO) else file.seek(0, io.SEEK_END)
    kept: list[tuple[int, int]] = [(0, 8)]
    room = _MAX_TEXT_BYTES
    skipped = False
    end = 8
    for kind, offset, length in png_chunks(file, size):
        if kind == b"IDAT" and not with_trailer:
            break
        end = min(size, offset + length)
        if kind in (b"tEXt", b"zTXt", b"iTXt", b"iCCP"):
            num_bytes = _decompressed(file, kind, offset + 8, length - 12) if room > 0 else length
            room -= min(num_bytes, _MAX_CHUNK_BYTES)  # of those that are skipped as well: finding that out takes time
            if num_bytes > _MAX_CHUNK_BYTES or room < 0:
                skipped = True
                continue
        kept.append((offset, length))
    file.seek(0)
    if not skipped:
        return file
    kept.append((end, size - end))  # the rest as it is
    return io.BufferedReader(_Parts(file, kept))


def png_chunks(file: BinaryIO, size: int) -> Iterator[tuple[bytes, int, int]]:
    """Kind, offset and whole length of every chunk of a PNG."""
    position = 8
    while position + 12 <= size:
        file.seek(position)
        length, kind = struct.unpack(">I4s", file.read(8))
        yield kind, position, length + 12
        position += length + 12


def _decompressed(file: BinaryIO, kind: bytes, offset: int, length: int) -> int:
    """How many bytes a chunk's text or profile has, counted up to a little more than the limit."""
    if length > 4 * _MAX_CHUNK_BYTES or kind == b"tEXt":
        return length
    file.seek(offset)
    data = file.read(length)
    place = data.find(b"\0") + 2  # after the keyword, and the method of compression
    if kind == b"iTXt":
        if data[place - 1 : place] != b"\1":
            return length
        place = data.find(b"\0", data.find(b"\0", place + 1) + 1) + 1  # after language and translated keyword
    try:
        return len(zlib.decompressobj().decompress(data[place:], _MAX_CHUNK_BYTES + 1))
    except zlib.error:
        return length


class _Parts(io.RawIOBase):
    """Some parts of a file, one after the other, as a file."""

    def __init__(self, file: BinaryIO, parts: list[tuple[int, int]]) -> None:
        self._file = file
        self._parts = parts
        self._size = sum(length for _, length in parts)
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        left = self._position
        for offset, length in self._parts:
            if left < length:
                self._file.seek(offset + left)
                data = self._file.read(min(len(buffer), length - left))
                buffer[: len(data)] = data
                self._position += len(data)
                return len(data)
            left -= length
        return 0

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()
