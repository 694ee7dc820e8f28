"""Odd images, names and captions as people have them. Each function writes one folder."""

from __future__ import annotations

import io
import os
import struct
import unicodedata
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, PngImagePlugin


def make_image(width: int = 96, height: int = 96, mode: str = "RGB") -> Image.Image:
    """A gradient."""
    y, x = np.mgrid[0:height, 0:width]
    pixels = np.stack([x * 255 // max(1, width - 1), y * 255 // max(1, height - 1), (x + y) % 256], -1)
    return Image.fromarray(pixels.astype(np.uint8)).convert(mode)


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    """The bytes of a file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_of_claimed_size(width: int, height: int) -> bytes:
    """A PNG whose header claims a size, with rows that compress to nearly nothing."""
    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    rows = zlib.compress((b"\0" + bytes(-(-width // 8))) * min(height, 4))
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", head) + png_chunk(b"IDAT", rows) + png_chunk(b"IEND", b"")


def long_notes() -> dict[str, bytes]:
    """Whole PNGs with more text or profile than Pillow reads by default, before and after the pixels."""
    long = "node " * 400_000
    plain = encode(make_image(), "PNG")
    files = {"plain.png": plain}
    for name, add in (
        ("ztxt", lambda info: info.add_text("workflow", long, zip=True)),
        ("itxt", lambda info: info.add_itxt("workflow", long, zip=True)),
        ("text", lambda info: info.add_text("parameters", long)),
        ("many", lambda info: [info.add_text(f"k{i}", "x" * 1_000_000, zip=True) for i in range(80)]),
    ):
        info = PngImagePlugin.PngInfo()
        add(info)
        files[f"{name}.png"] = encode(make_image(), "PNG", pnginfo=info)
    files["icc.png"] = encode(make_image(), "PNG", icc_profile=bytes(2_000_000))
    trailer = png_chunk(b"zTXt", b"workflow\0\0" + zlib.compress(long.encode()))
    end = png_chunk(b"IEND", b"")
    files["after.png"] = plain.removesuffix(end) + trailer + end
    return files


def put_captions_that_differ_in_spelling(folder: Path) -> dict[str, str]:
    """Images whose caption file is spelled otherwise. Returns the caption of each image."""
    nfd, nfc = (unicodedata.normalize(form, "café_4") for form in ("NFD", "NFC"))
    cases = {
        "IMG_1.JPG": ("IMG_1.TXT", "a red bicycle"),
        "photo_2.png": ("photo_2.png.txt", "a green boat"),
        "DSC_3.jpg": ("dsc_3.txt", "a blue house"),
        nfd + ".jpg": (nfc + ".txt", "a cup of coffee"),
        "ok_5.jpg": ("ok_5.txt", "a plain caption"),
        "space 7 .jpg": ("space 7 .txt", "space before the dot"),
        "json_8.jpg": ("json_8.JSON", '{"main_prompt": "from json"}'),
        "yaml_9.jpg": ("yaml_9.Yaml", "main_prompt: from yaml"),
        "cap_10.jpg": ("cap_10.Caption", "from caption"),
        "full_11.webp": ("FULL_11.WEBP.yml", "main_prompt: from a full name"),
    }
    for image, (caption, text) in cases.items():
        make_image().save(folder / image)
        (folder / caption).write_text(text, encoding="utf-8")
    words = {image: text for image, (_, text) in cases.items()}
    return words | {"json_8.jpg": "from json", "yaml_9.jpg": "from yaml", "full_11.webp": "from a full name"}


def put_name_that_is_no_utf8(folder: Path, name: bytes = b"ein b\xe4r.jpg") -> None:
    with open(os.fsencode(folder) + b"/" + name, "wb") as file:
        make_image().save(file, "JPEG")


POSTSCRIPT = b"""%!PS-Adobe-3.0 EPSF-3.0
%%BoundingBox: 0 0 96 96
%%EndComments
0 0 96 96 rectfill
showpage
%%EOF
"""


def mp4_box(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", 8 + len(body)) + kind + body
