"""The report: what a person should know before GPU time is spent."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from PIL import Image, ImageFilter

from everydream_kit.data.duplicates import find_duplicates
from everydream_kit.data.epoch_plan import PlanSettings
from everydream_kit.data.preparation import prepare_dataset
from everydream_kit.data.report import cut_text, make_report, write_undersized
from everydream_kit.data.scanning import scan_dataset
from everydream_kit.errors import DataError


def scene(seed: int, size: tuple[int, int] = (160, 128)) -> Image.Image:
    """An image with large soft shapes, as photographs have."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 255, (6, 6, 3), np.uint8))
    return coarse.resize(size, Image.Resampling.BICUBIC).filter(ImageFilter.GaussianBlur(2))


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "data"
    root.mkdir()
    for seed in range(6):
        scene(seed).save(root / f"s{seed}_x.png")
    (root / "s0_x.txt").write_text("a cat, red, small")
    (root / "s1_x.txt").write_text("a dog, red, big, very long tail of words that nobody reads")
    (root / "s2_x.txt").write_text("")
    (root / "s3_x.txt").write_text("a cat, red, small")
    return root


def words(text: str) -> int:
    return len(text.split())


def test_exact_and_near_duplicates_are_reported_apart(folder):
    shutil.copy(folder / "s0_x.png", folder / "copy of s0.png")
    scene(1).save(folder / "s1 again.jpg", quality=60)
    scene(2).resize((80, 64)).save(folder / "s2 small.png")
    dataset = scan_dataset(folder)
    names = list(dataset.paths)
    found = find_duplicates(dataset)
    assert [[names[i] for i in group] for group in found.exact] == [["copy of s0.png", "s0_x.png"]]
    assert [[names[i] for i in group] for group in found.near] == [
        ["s1 again.jpg", "s1_x.png"],
        ["s2 small.png", "s2_x.png"],
    ]
    assert found.unreadable == ()
    assert find_duplicates(dataset, near=False).near == ()


def test_flat_images_of_different_colors_are_not_alike(tmp_path):
    for name in ("black", "red", "blue", "white", "gray"):
        Image.new("RGB", (64, 64), name).save(tmp_path / f"{name}.png")
    assert find_duplicates(scan_dataset(tmp_path)).near == ()


def test_what_only_decoding_finds_is_reported_as_broken(folder):
    data = bytearray((folder / "s5_x.png").read_bytes())
    data[len(data) // 2 : len(data) // 2 + 40] = bytes(40)
    (folder / "s5_x.png").write_bytes(data)
    report = make_report(scan_dataset(folder), PlanSettings(2, resolutions=(128,)))
    assert [problem.path for problem in report.skipped] == [str(folder / "s5_x.png")]
    assert report.skipped[0].cause.startswith("cannot be decoded")
    assert report.near_duplicates == ()


def test_buckets_are_counted_with_their_fullness(folder):
    Image.new("RGB", (128, 128)).save(folder / "square.png")
    report = make_report(scan_dataset(folder), PlanSettings(4, resolutions=(128,)), near_duplicates=False)
    # 160 x 128 = 1.25: between 128 x 128 (1) and 144 x 112 (1.286)
    assert [(b.size, b.num_images, b.num_batches, b.fullness) for b in report.buckets] == [
        ((128, 128), 1, 1, 1 / 4),
        ((144, 112), 6, 2, 6 / 8),
    ]
    assert (report.dataset_size, report.num_images, report.num_steps) == (7, 7, 3)


def test_undersized_images_are_listed_with_what_they_need(folder, tmp_path):
    dataset = scan_dataset(folder)
    settings = PlanSettings(2, resolutions=(256, 512))
    report = make_report(dataset, settings, near_duplicates=False)
    assert len(report.undersized) == 6
    assert {(u.size, u.bucket, u.upscale) for u in report.undersized} == {((160, 128), (256, 256), 2.0)}
    assert write_undersized(tmp_path / "undersized_images.txt", dataset, settings) == 6
    lines = (tmp_path / "undersized_images.txt").read_text().splitlines()
    assert lines[0] == f"160x128 -> 256x256, enlarged 2.00 x: {folder / 's0_x.png'}"
    assert write_undersized(tmp_path / "none.txt", dataset, PlanSettings(2, resolutions=(64,))) == 0
    assert not (tmp_path / "none.txt").exists()


def test_captions_are_counted_and_long_ones_show_what_is_cut(folder):
    settings = PlanSettings(2, resolutions=(128,))
    report = make_report(scan_dataset(folder), settings, near_duplicates=False, count_tokens=words, max_tokens=5)
    assert report.captions.from_file_name == 2
    assert report.captions.empty == 1
    assert report.captions.repeated == (("a cat, red, small", 2),)
    assert report.tags[:2] == (("red", 3), ("small", 2))
    (long,) = report.long_captions
    assert (long.path, long.num_tokens, long.cut) == (
        str(folder / "s1_x.png"),
        12,
        "long tail of words that nobody reads",
    )
    assert make_report(scan_dataset(folder), settings, near_duplicates=False).long_captions is None


@pytest.mark.parametrize(("limit", "cut"), [(0, "a b c"), (1, "b c"), (2, "c")])
def test_text_is_cut_between_words(limit, cut):
    assert cut_text("a b c", words, limit) == cut


def test_the_report_is_text_for_people_and_json_for_programs(folder):
    (folder / "broken.png").write_bytes(b"rubbish")
    scene(9).save(folder / "odd.jpg", "PNG")
    prepared = prepare_dataset(folder, resolution=[128, 256], batch_size=4)
    report = prepared.report(count_tokens=words, max_tokens=5)
    assert len(prepared) == 7
    for part in (
        f"7 images in {folder}",
        "144x112",
        "Skipped (1):",
        "broken.png: not an image in a format that is read",
        "Used, with a note (1):",
        "odd.jpg: named .jpg, but is a PNG file",
        "never read: ...long tail of words that nobody reads",
        "Captions from file names: 3; empty captions: 1",
        "2 x a cat, red, small",
        "Tags: red (3)",
    ):
        assert part in report.text
    plain = json.loads(json.dumps(report.to_json()))
    assert plain["dataset_size"] == 7
    assert plain["skipped"][0]["path"] == str(folder / "broken.png")
    assert plain["buckets"] == [{"size": [144, 112], "num_images": 7, "num_batches": 2, "fullness": 7 / 8}]


def test_a_caption_of_pages_takes_a_line_of_the_text(folder):
    novel = "word " * 5000
    for name in ("s0_x.txt", "s1_x.txt"):
        (folder / name).write_text(novel, "utf-8")
    report = prepare_dataset(folder).report(count_tokens=words, max_tokens=5)
    assert len(report.text) < 4000
    assert report.to_json()["captions"]["repeated"] == [[novel.strip(), 2]]


def test_long_lists_are_cut_in_the_text_only(tmp_path):
    for number in range(14):
        (tmp_path / f"{number}.png").write_bytes(b"")
    report = prepare_dataset(tmp_path).report()
    assert "Skipped (14):" in report.text
    assert "  ... and 4 more" in report.text
    assert len(report.to_json()["skipped"]) == 14


def test_an_empty_or_switched_off_dataset_has_a_report_and_a_plot_too(folder):
    (folder / "multiply.txt").write_text("0")
    prepared = prepare_dataset(folder)
    assert prepared.report().num_images == 0
    assert prepared.plot().size[0] == 1000


def test_the_plot_shows_bars_and_images(folder, tmp_path):
    (folder / "later broken.jpg").write_bytes((folder / "s1_x.png").read_bytes())
    prepared = prepare_dataset(folder, resolution=128)
    (folder / "later broken.jpg").write_bytes(b"gone")
    page = prepared.plot()
    page.save(tmp_path / "plot.png")
    colors = {color for _, color in page.getcolors(1 << 20)}
    assert (0x2F, 0x6F, 0xAB) in colors  # a bar
    assert len(colors) > 500  # the images


def test_preparing_what_is_not_there_is_an_error(tmp_path):
    with pytest.raises(DataError, match="there is no such folder"):
        prepare_dataset(tmp_path / "no" / "such" / "place")
