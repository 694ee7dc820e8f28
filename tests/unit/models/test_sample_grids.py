"""Grids of labeled images, and settings inside image files."""

import pytest
from PIL import Image

from everydream_kit.models.sample_grids import label_grid, save_image
from everydream_kit.models.sampling import SamplePrompt, settings_text

SETTINGS = """a cat
Negative prompt: dog
Steps: 30, Sampler: DDIM, CFG scale: 7.5, Seed: 3, Size: 64x96, Clip skip: 2, Version: EveryDream Kit"""


def test_settings_are_written_as_the_common_uis_write_them():
    prompt = SamplePrompt("a cat", "dog", 3, 64, 96)
    assert settings_text(prompt, 7.5, scheduler="ddim", num_inference_steps=30, clip_skip=2) == SETTINGS


@pytest.mark.parametrize("text", [SETTINGS, "猫 €\nSteps: 1"])
def test_a_png_carries_its_settings(tmp_path, text):
    image = Image.new("RGB", (8, 8))
    image.info["parameters"] = text
    save_image(image, tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as read:
        assert read.text["parameters"] == text


@pytest.mark.parametrize("suffix", [".jpg", ".webp"])
def test_a_jpeg_carries_its_settings_as_a_user_comment(tmp_path, suffix):
    image = Image.new("RGB", (8, 8))
    image.info["parameters"] = SETTINGS
    save_image(image, tmp_path / f"a{suffix}")
    with Image.open(tmp_path / f"a{suffix}") as read:
        comment = read.getexif().get_ifd(0x8769)[0x9286]
    assert comment[:8] == b"UNICODE\x00"
    assert comment[8:].decode("utf-16-be") == SETTINGS


def test_a_grid_holds_every_image_unscaled():
    colors = ["#ff0000", "#00ff00", "#0000ff"]
    images = [Image.new("RGB", (64, 48), color) for color in colors]
    grid = label_grid(
        [images[:2], images[2:]], column_labels=["cfg 1", "cfg 7"], row_labels=["a", "b"], title="t " * 60
    )
    counts = {color: count for count, color in grid.getcolors(maxcolors=2**20)}
    assert [counts[color] for color in [(255, 0, 0), (0, 255, 0), (0, 0, 255)]] == [64 * 48] * 3
    assert grid.width < 64 * 3  # a long title wraps, it does not widen the grid


def test_a_grid_without_images_is_refused():
    with pytest.raises(ValueError, match="at least one image"):
        label_grid([[]])
