"""A second scan reads only what changed, and gives what a first one would."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
from PIL import Image

from everydream_kit.data import dataset_images
from everydream_kit.data.headers import read_header
from everydream_kit.data.scanning import scan_dataset


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "data"
    for name in ("a", "b", "sub/c", "sub/d"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (48, 32)).save(root / f"{name}.png")
        (root / f"{name}.txt").write_text(f"caption of {name}, red")
    return root


@pytest.fixture
def headers_read(monkeypatch):
    """Names of the images whose headers are really read."""
    names = []

    def read_and_note(path):
        names.append(os.path.basename(path))
        return read_header(path)

    monkeypatch.setattr(dataset_images, "read_header", read_and_note)
    return names


def same(one, other) -> bool:
    numbers = all(np.array_equal(one.numbers[name], other.numbers[name], equal_nan=True) for name in one.numbers)
    return numbers and [one.image(i) for i in range(len(one))] == [other.image(i) for i in range(len(other))]


def test_an_unchanged_folder_is_not_read_again(folder, tmp_path, headers_read):
    first = scan_dataset(folder, cache_dir=tmp_path / "cache")
    assert sorted(headers_read) == ["a.png", "b.png", "c.png", "d.png"]
    headers_read.clear()
    second = scan_dataset(folder, cache_dir=tmp_path / "cache")
    assert headers_read == []
    assert same(first, second)


@pytest.mark.parametrize(
    ("change", "reread"),
    [
        (lambda root: (root / "a.txt").write_text("something else"), []),
        (lambda root: (root / "a.txt").unlink(), []),
        (lambda root: (root / "sub/local.yaml").write_text("multiply: 3"), []),
        (lambda root: (root / "global.yaml").write_text("tags: [by foo]"), []),
        (lambda root: (root / "a.json").write_text('{"flip_p": 1}'), []),
        (lambda root: Image.new("RGB", (48, 32)).save(root / "a.mask.png"), []),
        (lambda root: Image.new("RGB", (64, 99)).save(root / "sub/c.png"), ["c.png"]),
        (lambda root: Image.new("RGB", (64, 99)).save(root / "aa.png"), ["aa.png"]),
        (lambda root: (root / "b.png").unlink(), []),
        (lambda root: (root / "sub").rename(root / "moved"), ["c.png", "d.png"]),
    ],
)
def test_after_any_change_the_scan_is_what_a_fresh_one_would_be(folder, tmp_path, headers_read, change, reread):
    scan_dataset(folder, cache_dir=tmp_path / "cache", loss_mask="file")
    change(folder)
    headers_read.clear()
    again = scan_dataset(folder, cache_dir=tmp_path / "cache", loss_mask="file")
    assert headers_read == reread
    fresh = scan_dataset(folder, loss_mask="file")
    assert same(again, fresh)
    assert again.problems == fresh.problems


def test_another_image_of_the_same_length_is_read(tmp_path):
    (tmp_path / "data").mkdir()
    path = tmp_path / "data/a.bmp"
    for size in ((48, 32), (32, 48)):
        Image.new("RGB", size).save(path)
        os.utime(path, (1, size[0]))  # within one tick of the clock nothing would distinguish them
        dataset = scan_dataset(tmp_path / "data", cache_dir=tmp_path / "cache")
        assert (dataset.image(0).width, dataset.image(0).height) == size


def test_other_run_settings_use_the_same_memory_and_other_caption_rules_do_not(folder, tmp_path):
    (folder / "a.txt").write_text("one\ntwo")
    scan_dataset(folder, cache_dir=tmp_path / "cache")
    again = scan_dataset(folder, cache_dir=tmp_path / "cache", caption_lines="choose", flip_p=0.5)
    assert same(again, scan_dataset(folder, caption_lines="choose", flip_p=0.5))
    assert len(again.caption(0).choices) == 2
    assert again.image(0).flip_p == 0.5


def test_problems_and_notes_come_again_every_time(folder, tmp_path):
    (folder / "broken.png").write_bytes(b"rubbish")
    (folder / "b.yaml").write_text("flop: 1")
    Image.new("RGB", (9, 9)).save(folder / "wrong.jpg", "PNG")
    (folder / "sub/local.yaml").write_text("flip_p: much")
    first = scan_dataset(folder, cache_dir=tmp_path / "cache").problems
    assert len(first) == 4
    assert scan_dataset(folder, cache_dir=tmp_path / "cache").problems == first
    (folder / "wrong.txt").write_text("a caption")
    assert scan_dataset(folder, cache_dir=tmp_path / "cache").problems == first


def test_an_index_is_remembered_in_its_own_order(folder, tmp_path, headers_read):
    entries = [{"image": name, "batch_id": name[0]} for name in ("sub/d.png", "a.png", "sub/c.png", "b.png")]
    index = folder / "index.json"
    index.write_text(json.dumps(entries))
    first = scan_dataset(index, cache_dir=tmp_path / "cache")
    headers_read.clear()
    second = scan_dataset(index, cache_dir=tmp_path / "cache")
    assert headers_read == []
    assert same(first, second)
    assert [second.image(i).batch_id for i in range(4)] == ["s", "a", "s", "b"]


@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: b"no zip", lambda data: data[: len(data) // 2]])
def test_a_damaged_memory_is_as_good_as_none(folder, tmp_path, damage):
    first = scan_dataset(folder, cache_dir=tmp_path / "cache")
    (file,) = (tmp_path / "cache").iterdir()
    file.write_bytes(damage(file.read_bytes()))
    assert same(scan_dataset(folder, cache_dir=tmp_path / "cache"), first)
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".npz"]


def test_a_cache_folder_that_cannot_be_made_costs_the_cache_only(folder, tmp_path, caplog):
    (tmp_path / "cache").write_text("a file is in the way")
    assert len(scan_dataset(folder, cache_dir=tmp_path / "cache")) == 4
    assert "the scan could not be cached" in caplog.text


def test_a_folder_of_many_images_is_found_again_by_bisection(tmp_path, headers_read):
    (tmp_path / "data/x").mkdir(parents=True)
    image = tmp_path / "one.bmp"
    Image.new("RGB", (8, 8)).save(image)
    for number in range(700):
        os.link(image, tmp_path / f"data/x/{number}.bmp")
    scan_dataset(tmp_path / "data", cache_dir=tmp_path / "cache")
    (tmp_path / "data/x/300.bmp").unlink()
    headers_read.clear()
    again = scan_dataset(tmp_path / "data", cache_dir=tmp_path / "cache")
    assert headers_read == []
    assert same(again, scan_dataset(tmp_path / "data"))
