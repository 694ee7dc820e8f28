"""The captions in numbers, for the log and the model card."""

from PIL import Image

from everydream_kit.data.scanning import scan_dataset
from everydream_kit.training.summary import summarise_captions


def test_captions_are_counted_and_none_is_reported(tmp_path):
    for name, caption in {"a": "one two", "b": "one two", "c": "a b c d, tag", "d": ""}.items():
        Image.new("RGB", (64, 64)).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(caption, encoding="utf-8")
    assert summarise_captions(scan_dataset(tmp_path)) == {
        "different_captions": 3,
        "images_without_caption": 1,
        "images_with_tags": 1,
        "median_words_in_a_caption": 2,
    }
