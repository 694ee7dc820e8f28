"""Loss masks in the dataset panel: what the page's brush sends is written, shown again, removed and undone."""

import io
import json
import sys
from dataclasses import replace

import pytest
from PIL import Image

from everydream_kit.data.dataset import Defaults
from everydream_kit.panels.dataset_panel import MASKS, DatasetPanel


def png(gray, size=(64, 48)):
    buffer = io.BytesIO()
    Image.new("L", size, gray).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def panel(tmp_path):
    (tmp_path / "jets" / "input").mkdir(parents=True)
    for name in ("a", "b", "c"):
        Image.new("RGB", (64, 48)).save(tmp_path / "jets" / "input" / f"{name}.png")
    panel = DatasetPanel(tmp_path / "jets")
    panel.tabs.selected_index = MASKS
    return panel


def send(panel, name, data):
    """What the page sends when Save mask is pressed."""
    panel.masks._take(None, {"kind": "mask", "name": name}, [memoryview(data)])


def test_a_painted_mask_is_written_shown_removed_and_undone(panel):
    file = panel.album.root / "a.mask.png"
    half = Image.new("L", (64, 48), 255)
    half.paste(0, (0, 0, 32, 48))
    buffer = io.BytesIO()
    half.save(buffer, "PNG")
    send(panel, "a.png", buffer.getvalue())
    assert "Mask of a.png written" in panel.message.value
    with Image.open(file) as mask:
        assert (mask.mode, mask.size, mask.getpixel((0, 0)), mask.getpixel((40, 0))) == ("L", (64, 48), 0, 255)
    assert len(panel.album) == 3, "a mask is not an image of its own"
    settings = json.loads((panel.project.folder / "settings.json").read_text())
    assert settings["loss_mask"] == "file" and "loss_mask: file" in panel.message.value
    masked = replace(panel.album.dataset, defaults=Defaults(loss_mask="file"))
    assert masked.image(0).mask_path == str(file)
    assert panel.masks.brush.mask[:4] == b"\x89PNG" and not panel.masks.remove_button.disabled
    panel.masks.remove_button.click()
    assert not file.exists() and panel.masks.brush.mask == b"" and panel.masks.remove_button.disabled
    panel.undo_button.click()
    assert file.is_file()
    panel.undo_button.click()
    assert not file.exists()


def test_back_and_next_go_through_what_the_search_found(panel):
    panel.gallery.search.value = "-b"
    panel.tabs.selected_index = MASKS
    names = []
    for _ in range(2):
        names.append(panel.masks.brush.name)
        panel.masks.next.click()
    assert names == ["a.png", "c.png"] and panel.masks.next.disabled
    panel.masks.previous.click()
    assert panel.masks.brush.name == "a.png" and panel.masks.brush.image[:2] == b"\xff\xd8"


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [("gone.png", png(0), "not in the dataset any more"), ("a.png", b"no image", "cannot be read")],
)
def test_a_mask_that_cannot_be_saved_is_one_sentence(panel, name, data, words):
    send(panel, name, data)
    assert words in panel.message.value
    assert list(panel.album.root.glob("*.mask.png")) == []


def test_a_mask_that_leaves_nothing_out_removes_the_file(panel):
    send(panel, "a.png", png(0))
    send(panel, "a.png", png(255))
    assert not (panel.album.root / "a.mask.png").exists()


def test_without_anywidget_the_panel_says_how_to_make_a_mask(panel, monkeypatch):
    monkeypatch.setitem(sys.modules, "anywidget", None)
    again = DatasetPanel(panel.project.folder)
    again.tabs.selected_index = MASKS
    assert again.masks.brush is None and "a.mask.png" in again.masks.hint.value
