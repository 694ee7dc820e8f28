"""Captions and archive names in code pages that do not name themselves: read, or at least reported."""

from __future__ import annotations

import io
import logging
import zipfile
from pathlib import Path

import pytest
from odd_images import make_image

from everydream_kit.data.scanning import scan_dataset
from everydream_kit.data.sources import unpack_archive
from everydream_kit.data.textfiles import TextError, parse_json

FOREIGN = {
    "gbk": "一只坐在沙发上的红色小猫",
    "koi8-r": "рыжий кот сидит на диване",
    "cp1251": "рыжий кот сидит на диване",
    "iso8859-7": "μια κόκκινη γάτα στον καναπέ",
    "euc-kr": "소파에 앉아 있는 빨간 고양이",
}
WESTERN = [
    "une forêt d'été à l'orée du bois, l'île, le château",
    "grüne Äpfel, süße Köche, Öl",
    "ένα".replace("ένα", "café"),
]


@pytest.mark.parametrize("encoding", FOREIGN)
@pytest.mark.parametrize("name", ["a.txt", "a.caption"])
def test_a_caption_in_another_code_page_is_used_with_a_note(tmp_path, encoding, name):
    make_image().save(tmp_path / "a.png")
    (tmp_path / name).write_bytes(FOREIGN[encoding].encode(encoding))
    dataset = scan_dataset(tmp_path, cache_dir=tmp_path / ".cache")
    assert len(dataset.problems) == 1
    assert "not UTF-8, and unlikely to be Windows-1252" in dataset.problems[0].cause + dataset.problems[0].cure or (
        dataset.problems[0].skipped and "it is not text in UTF-8" in dataset.problems[0].cause
    )
    assert len(scan_dataset(tmp_path, cache_dir=tmp_path / ".cache").problems) == 1  # said again


@pytest.mark.parametrize("text", WESTERN)
def test_western_text_is_read_without_a_note(tmp_path, text):
    make_image().save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_bytes(text.encode("cp1252"))
    dataset = scan_dataset(tmp_path)
    assert (dataset.image(0).caption.text, dataset.problems) == (text, [])


def zip_with_name(path: Path, name: bytes) -> Path:
    """A zip whose names are these bytes and which does not say in what encoding."""
    image = io.BytesIO()
    make_image().save(image, "PNG")
    plain = b"x" * len(name)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(plain.decode() + "_1.png", image.getvalue())
    path.write_bytes(path.read_bytes().replace(plain, name))
    return path


def test_names_in_a_zip_are_read_as_utf8_where_they_are_and_reported_where_not(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        folder = unpack_archive(zip_with_name(tmp_path / "a.zip", "Bär".encode()), tmp_path)
    assert [path.name for path in folder.iterdir()] == ["Bär_1.png"]
    assert caplog.text == ""
    with caplog.at_level(logging.WARNING):
        folder = unpack_archive(zip_with_name(tmp_path / "b.zip", "犬小屋".encode("cp932")), tmp_path)
    assert len(list(folder.iterdir())) == 1
    assert "are in an unknown code page" in caplog.text


def test_a_windows_path_in_json_is_answered_with_the_cure():
    with pytest.raises(TextError, match=r"Invalid .escape.*Write each backslash twice"):
        parse_json('{"image": "R:\\images\\a.png"}'.replace("\\\\", "\\"))


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("text", ["a", "a red cat, café", "ein Bär in Łódź"])
def test_utf_16_without_a_mark_is_read(tmp_path, encoding, text):
    make_image().save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_bytes(text.encode(encoding))
    dataset = scan_dataset(tmp_path)
    assert dataset.problems == []
    assert dataset.caption(0).text == text


@pytest.mark.parametrize("data", [b"a\0b", b"\0" * 20, bytes(range(64)), "猫\0".encode("utf-16-le")])
def test_zeros_that_are_no_utf_16_are_refused_with_the_cure(tmp_path, data):
    make_image().save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_bytes(data)
    [problem] = scan_dataset(tmp_path).problems
    assert "save it as UTF-8" in problem.cause
