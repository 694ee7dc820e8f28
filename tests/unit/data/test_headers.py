"""Headers: what our own reading of WebP says must be what Pillow says."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from PIL import Image

from everydream_kit.data.headers import ImageHeaderError, read_header


@pytest.mark.parametrize("size", [(1, 1), (3, 2), (160, 120), (1000, 17), (17, 1001)])
@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
@pytest.mark.parametrize("lossless", [False, True])
@pytest.mark.parametrize("orientation", [None, 1, 6])
def test_webp_headers_are_read_as_pillow_reads_them(tmp_path, size, mode, lossless, orientation):
    path = tmp_path / "a.webp"
    exif = Image.Exif()
    if orientation is not None:
        exif[0x0112] = orientation
    pixels = np.random.default_rng(0).integers(0, 255, (size[1], size[0], len(mode)), np.uint8)
    Image.fromarray(pixels).save(path, lossless=lossless, **({"exif": exif} if orientation else {}))
    header = read_header(str(path))
    assert (header.width, header.height) == (size[::-1] if orientation == 6 else size)
    with Image.open(path) as image:
        assert header.has_alpha == (image.mode == "RGBA")


def test_an_animated_webp_is_remarked_on(tmp_path):
    frames = [Image.new("RGB", (32, 24), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "a.webp", save_all=True, append_images=frames[1:])
    header = read_header(str(tmp_path / "a.webp"))
    assert (header.width, header.height, header.note) == (32, 24, "animated: only its first frame is trained on")


def test_a_webp_of_impossible_size_is_refused(tmp_path):
    body = b"VP8X" + (10).to_bytes(4, "little") + bytes(4) + b"\xff\xff\xff" * 2
    data = b"RIFF" + (len(body) + 4).to_bytes(4, "little") + b"WEBP" + body
    (tmp_path / "a.webp").write_bytes(data)
    with pytest.raises(ImageHeaderError) as caught:
        read_header(str(tmp_path / "a.webp"))
    assert caught.value.cause == "claims to have more than 178 million pixels or 65,535 on a side"


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.bmp"])
def test_reading_a_header_takes_no_memory_for_the_pixels(tmp_path, name):
    path = str(tmp_path / name)
    Image.new("RGB", (2000, 1500), "red").save(path)
    read_header(path)  # imports are not counted
    tracemalloc.start()
    read_header(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 400_000  # the pixels would be 9 million bytes
