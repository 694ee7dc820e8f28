"""Reading WebP headers. Pillow reads the whole file and sets up its decoder to learn the size; thirty bytes say it.

Source: "WebP Container Specification" and "VP8 Data Format" (RFC 6386, section 9.1), RFC 9649 for the lossless header.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import BinaryIO

from PIL import Image

_ANIMATED, _EXIF, _ALPHA = 0x02, 0x08, 0x10  # flags of the extended header
_MAX_EXIF_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class WebPHeader:
    """Size in pixels before rotation, and what else the header says. `exif` is None where there is none."""

    width: int
    height: int
    has_alpha: bool
    is_animated: bool
    exif: Image.Exif | None


def is_webp(start: bytes) -> bool:
    """Whether a file that begins with these 12 bytes is a WebP."""
    return start[:4] == b"RIFF" and start[8:12] == b"WEBP"


def read_webp_header(file: BinaryIO, num_bytes: int) -> WebPHeader:
    """Read the header of a WebP file.

    Args:
        file: open, anywhere.
        num_bytes: length of the file.

    Raises:
        EOFError: the file is shorter than it says.
        ValueError: the first chunk is not an image.
    """
    file.seek(0)
    start = file.read(30)
    if len(start) < 30 or int.from_bytes(start[4:8], "little") + 8 > num_bytes:
        raise EOFError
    kind, data = start[12:16], start[20:]
    if kind == b"VP8 " and data[3:6] == b"\x9d\x01\x2a":
        width, height = struct.unpack("<HH", data[6:10])
        return WebPHeader(width & 0x3FFF, height & 0x3FFF, False, False, None)
    if kind == b"VP8L" and data[:1] == b"\x2f":
        bits = int.from_bytes(data[1:5], "little")
        return WebPHeader((bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1, bool(bits >> 28 & 1), False, None)
    if kind == b"VP8X":
        width, height = (int.from_bytes(data[i : i + 3], "little") + 1 for i in (4, 7))
        exif = _read_exif(file, num_bytes) if data[0] & _EXIF else None
        return WebPHeader(width, height, bool(data[0] & _ALPHA), bool(data[0] & _ANIMATED), exif)
    raise ValueError("its first chunk is not an image")


def _read_exif(file: BinaryIO, num_bytes: int) -> Image.Exif | None:
    """The EXIF chunk, found by walking over the others."""
    position = 12
    while position + 8 <= num_bytes:
        file.seek(position)
        kind, length = struct.unpack("<4sI", file.read(8))
        if kind == b"EXIF":
            exif = Image.Exif()
            try:
                exif.load(file.read(min(length, _MAX_EXIF_BYTES)))
            except (SyntaxError, ValueError, OSError, struct.error):  # damaged: viewers show the image unturned
                return None
            return exif
        position += 8 + length + length % 2
    return None
