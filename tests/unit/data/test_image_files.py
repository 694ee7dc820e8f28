"""One function opens images: which formats, which sizes, and that an image's trouble is a problem of that image."""

from __future__ import annotations

import importlib.util
import io
import os
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
from odd_images import (
    POSTSCRIPT,
    encode,
    long_notes,
    make_image,
    mp4_box,
    png_of_claimed_size,
    put_captions_that_differ_in_spelling,
    put_name_that_is_no_utf8,
)
from PIL import Image, features

from everydream_kit.data import image_files
from everydream_kit.data.folders import FolderFiles
from everydream_kit.data.image_files import IMAGE_ERRORS, MAX_SIDE, UNREAD_EXTENSIONS, open_image
from everydream_kit.data.pixels import center_crop, load_pixels
from everydream_kit.data.reading_problems import Problem
from everydream_kit.data.scanning import scan_dataset
from everydream_kit.errors import DataError
from everydream_kit.panels.thumbnails import thumbnail

GRAY_TILE = Image.new("RGB", (32, 32), "#c8ccd0")
HAS_HEIF = importlib.util.find_spec("pillow_heif") is not None


def scan(root: Path) -> tuple[list[str], dict[str, Problem]]:
    dataset = scan_dataset(root)
    return sorted(dataset.paths), {Path(problem.path).name: problem for problem in dataset.problems}


@pytest.fixture
def ghostscript(tmp_path, monkeypatch):
    """A `gs` on the path that leaves a mark when it is run."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("gs", "gswin64c", "gswin32c"):
        (tools / name).write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\necho 10.0\n")
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)
    return tmp_path / "ran"


def test_postscript_is_never_run_whatever_it_is_called(tmp_path, ghostscript):
    assert shutil.which("gs")
    folder = tmp_path / "set"
    folder.mkdir()
    make_image().save(folder / "a.png")
    for name in ("a.mask.png", "b.png", "c.jpg", "d.tif"):
        (folder / name).write_bytes(POSTSCRIPT)
    used, problems = scan(folder)
    assert used == ["a.png"]
    assert set(problems) == {"b.png", "c.jpg", "d.tif"}
    crop = center_crop(96, 96, (64, 64))
    with pytest.raises(DataError, match=r"a\.png: cannot be decoded"):
        load_pixels(folder / "a.png", (64, 64), crop, mask_path=folder / "a.mask.png")
    for name in ("a.mask.png", "b.png"):
        tile = Image.open(io.BytesIO(thumbnail(folder / name, 32)))
        assert np.abs(np.asarray(tile, int) - np.asarray(GRAY_TILE, int)).max() < 6
        with pytest.raises(IMAGE_ERRORS):
            open_image(folder / name)
    assert not ghostscript.exists()


@pytest.mark.parametrize("name", long_notes())
def test_a_png_with_long_notes_is_used_and_its_pixels_are_right(tmp_path, name):
    (tmp_path / name).write_bytes(long_notes()[name])
    used, problems = scan(tmp_path)
    assert (used, problems) == ([name], {})
    loaded = load_pixels(tmp_path / name, (96, 96), center_crop(96, 96, (96, 96)))
    assert np.array_equal(loaded.pixels, np.asarray(make_image()))
    assert Image.open(io.BytesIO(thumbnail(tmp_path / name, 32))).getpixel((0, 0)) != (200, 204, 208)


def test_short_notes_and_profiles_are_kept(tmp_path):
    profile = bytes(range(256)) * 8
    make_image().save(tmp_path / "a.png", icc_profile=profile)
    with open_image(tmp_path / "a.png") as image:
        image.load()
        assert image.info["icc_profile"] == profile


@pytest.mark.parametrize("size", [(170_000_000, 1), (1, 170_000_000), (MAX_SIDE + 1, 8), (20_000, 20_000)])
def test_an_image_of_impossible_size_is_a_problem_everywhere(tmp_path, size):
    (tmp_path / "a.png").write_bytes(png_of_claimed_size(*size))
    used, problems = scan(tmp_path)
    assert used == []
    assert problems["a.png"].cause == "claims to have more than 178 million pixels or 65,535 on a side"
    with pytest.raises(DataError, match=r"a\.png: cannot be decoded"):
        load_pixels(tmp_path / "a.png", (64, 64), center_crop(*size, (64, 64)))
    assert thumbnail(tmp_path / "a.png", 32)


@pytest.mark.parametrize("error", [MemoryError, RuntimeError, AttributeError, TypeError, ZeroDivisionError, KeyError])
def test_whatever_a_decoder_raises_is_a_problem_of_its_image(tmp_path, monkeypatch, error):
    make_image().save(tmp_path / "a.png")

    def broken(self):
        raise error("decoder")

    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", broken)
    with pytest.raises(DataError, match=r"a\.png: cannot be decoded"):
        load_pixels(tmp_path / "a.png", (64, 64), center_crop(96, 96, (64, 64)))
    assert thumbnail(tmp_path / "a.png", 32)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.tif", "TIFF"),
        ("a.TIFF", "TIFF"),
        ("a.gif", "GIF"),
        ("a.jpe", "JPEG"),
        pytest.param(
            "a.avif", "AVIF", marks=pytest.mark.skipif(not features.check("avif"), reason="this Pillow has no AVIF")
        ),
        pytest.param("a.heic", "HEIF", marks=pytest.mark.skipif(not HAS_HEIF, reason="pillow-heif is not installed")),
        pytest.param("a.HEIF", "HEIF", marks=pytest.mark.skipif(not HAS_HEIF, reason="pillow-heif is not installed")),
    ],
)
def test_every_format_that_pillow_and_its_plugins_read_is_used(tmp_path, name, kind):
    image_files.formats()  # registers the plug-in
    data = encode(make_image(), kind)
    (tmp_path / name).write_bytes(data)
    (tmp_path / "a.txt").write_text("a gradient")
    dataset = scan_dataset(tmp_path)
    assert dataset.problems == []
    assert (dataset.image(0).caption.text, dataset.image(0).width) == ("a gradient", 96)
    loaded = load_pixels(tmp_path / name, (96, 96), center_crop(96, 96, (96, 96)))
    assert np.abs(loaded.pixels.astype(int) - np.asarray(make_image(), int)).mean() < 40  # lossy, GIF by 256 colors
    (tmp_path / name).write_bytes(data[: len(data) * 2 // 3])
    dataset = scan_dataset(tmp_path)
    assert len(dataset) == 0
    assert len([problem for problem in dataset.problems if problem.skipped]) == 1


def test_the_first_frame_and_the_first_page_are_used_with_a_note(tmp_path):
    others = [make_image().rotate(90)]
    make_image().save(tmp_path / "a.gif", save_all=True, append_images=others)
    make_image().save(tmp_path / "b.tif", save_all=True, append_images=others)
    used, problems = scan(tmp_path)
    assert used == ["a.gif", "b.tif"]
    assert problems["a.gif"].cause == "animated: only its first frame is trained on"
    assert problems["b.tif"].cause == "holds several pages: only the first is trained on"


def test_pixels_that_have_no_rgb_are_named_by_the_scan(tmp_path):
    Image.new("F", (32, 32)).save(tmp_path / "a.tif")
    used, problems = scan(tmp_path)
    assert used == []
    assert problems["a.tif"].cause == "floating-point pixels have no agreed range"


def test_heic_without_the_plugin_names_the_cure(tmp_path, monkeypatch):
    monkeypatch.setattr("everydream_kit.data.headers.formats", lambda: ("JPEG", "PNG"))
    monkeypatch.setattr(image_files, "formats", lambda: ("JPEG", "PNG"))
    data = mp4_box(b"ftyp", b"heic" + bytes(4) + b"mif1heic") + mp4_box(b"mdat", bytes(200))
    (tmp_path / "IMG_1.HEIC").write_bytes(data)
    used, problems = scan(tmp_path)
    assert used == []
    assert problems["IMG_1.HEIC"].cause == "the plug-in that reads this format is not installed"
    assert "pip install everydream-kit[heic]" in problems["IMG_1.HEIC"].cure


@pytest.mark.parametrize("ending", sorted(UNREAD_EXTENSIONS))
def test_images_of_other_formats_are_named(tmp_path, ending):
    make_image().save(tmp_path / "cat.png")
    for name in (f"x{ending}", f"y{ending.upper()}"):
        (tmp_path / name).write_bytes(struct.pack(">I", 7) * 20)
    dataset = scan_dataset(tmp_path)
    assert list(dataset.paths) == ["cat.png"]
    assert [(p.cause, p.skipped) for p in dataset.problems] == [
        (f"2 {ending} images are not read: x{ending}, y{ending.upper()}", True)
    ]


def test_captions_are_found_whatever_their_case_unicode_form_or_full_name(tmp_path):
    expected = put_captions_that_differ_in_spelling(tmp_path)
    (tmp_path / "Global.yaml").write_text("flip_p: 0.5\n")
    (tmp_path / "MULTIPLY.TXT").write_text("3")
    dataset = scan_dataset(tmp_path)
    assert dataset.problems == []
    found = {Path(dataset.path(i)).name: dataset.image(i) for i in range(len(dataset))}
    assert {name: image.caption.text for name, image in found.items()} == expected
    assert {(image.flip_p, image.multiply) for image in found.values()} == {(0.5, 3.0)}
    for name in expected:  # what moves an image takes its caption along
        assert len(FolderFiles().companions(tmp_path / name)) == 1


def test_a_caption_goes_to_the_image_that_it_fits_to_the_letter(tmp_path):
    for name in ("A.png", "a.png", "b.jpg", "b.png"):
        make_image().save(tmp_path / name)
    if len(list(tmp_path.iterdir())) < 4:
        pytest.skip("this file system ignores case")
    (tmp_path / "a.txt").write_text("small")
    (tmp_path / "b.txt").write_text("both")
    (tmp_path / "b.png.txt").write_text("only where nothing else is")
    dataset = scan_dataset(tmp_path)
    captions = {dataset.paths[i]: dataset.image(i).caption.text for i in range(len(dataset))}
    assert captions == {"A.png": "A", "a.png": "small", "b.jpg": "both", "b.png": "both"}


def test_captions_that_belong_to_no_image_are_reported(tmp_path):
    make_image().save(tmp_path / "cat.png")
    for name in ("cat.txt", "dog.txt", "bird.JSON", "local.yaml"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "captions").mkdir()
    for number in range(12):
        (tmp_path / "captions" / f"{number:02}.txt").write_text("x")
    _, problems = scan(tmp_path)
    assert problems[tmp_path.name].cause == "2 caption files belong to no image: bird.JSON, dog.txt"
    assert problems["captions"].cause.startswith("12 caption files belong to no image: 00.txt, 01.txt")
    assert problems["captions"].cause.endswith("09.txt and 2 more")
    assert not problems["captions"].skipped


@pytest.mark.parametrize(
    "name",
    [
        *(
            "IMG_0001.jpg",
            "DSC01234.jpg",
            "DSCF0001_2.png",
            "photo_7.png",
            "image (3).png",
            "P1010101.jpg",
            "00012.png",
        ),
        *("Screenshot 2024-01-02.png", "PXL_2024.jpg", "d41d8cd98f00b204e9800998ecf8427e.png", "download(1).webp"),
        "123e4567-e89b-12d3-a456-426614174000.png",
    ],
)
def test_captions_from_the_names_of_cameras_and_downloads_are_counted(tmp_path, name):
    for place in (name, "a red car_1.png", "image of a cat_2.png", "sampan_3.png"):
        make_image().save(tmp_path / place)
    _, problems = scan(tmp_path)
    cause = problems[tmp_path.name].cause
    assert cause.startswith(
        "4 captions come from file names, and 1 of them looks like a name from a camera or a download"
    )


def test_names_that_begin_with_an_underscore_are_counted_as_empty_captions(tmp_path):
    for name in ("_0001.png", "_cat.png", "a car_1.png"):
        make_image().save(tmp_path / name)
    _, problems = scan(tmp_path)
    assert problems[tmp_path.name].cause == (
        "3 captions come from file names, and 2 of them have an empty caption, since nothing precedes the first "
        "underscore"
    )


def test_a_name_that_is_no_utf8_gives_a_caption_and_a_note(tmp_path):
    put_name_that_is_no_utf8(tmp_path)
    dataset = scan_dataset(tmp_path)
    assert dataset.image(0).caption.text == "ein bär"
    dataset.image(0).caption.text.encode()  # as a tokenizer does
    assert [problem.cause for problem in dataset.problems] == [
        "its name is not UTF-8; the caption from it is read as Windows-1252: 'ein bär'"
    ]
