"""What the panel's album does to people's files: every encoding keeps its text, and every step can be taken back."""

import json
import resource
import signal
from contextlib import contextmanager
from pathlib import Path

import pytest
from PIL import Image

from everydream_kit.data.album import Album
from everydream_kit.data.textfiles import read_text
from everydream_kit.errors import DataError
from everydream_kit.panels.dataset_panel import DatasetPanel


def image(path, size=(64, 48)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size).save(path)


@pytest.fixture
def root(tmp_path):
    for name in ("a red jet_1.png", "b.png", "night/b.png"):
        image(tmp_path / "jets" / "input" / name)
    return tmp_path / "jets" / "input"


def find(album, name):
    return next(index for index in range(len(album)) if album.name(index) == name)


def snapshot(root):
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


@contextmanager
def no_room_beyond(num_bytes):
    """As on a full disk, writing more than this into a file fails."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32", "cp1252"])
def test_a_tag_keeps_the_text_of_every_encoding(root, encoding):
    file = root / "b.txt"
    file.write_bytes("ein Café in Köln, naß".encode(encoding))
    before = file.read_bytes()
    album = Album(root)
    assert album.caption(find(album, "b.png")) == "ein Café in Köln, naß"
    album.add_tags(range(len(album)), "night")
    assert read_text(file) == "ein Café in Köln, naß, night"
    album.undo()
    assert file.read_bytes() == before


def test_a_caption_of_an_unknown_code_page_is_named_and_left_alone(root):
    data = "кошка на крыше, ночь".encode("koi8-r")
    (root / "b.txt").write_bytes(data)
    panel = DatasetPanel(root.parent)
    panel.gallery.choose_found.click()
    panel.tag.value = "night"
    panel.add_tag_button.click()
    assert (root / "b.txt").read_bytes() == data
    assert "1 left alone" in panel.message.value and "UTF-8" in panel.message.value
    card = next(card for card in panel.gallery.cards if card.index == find(panel.album, "b.png"))
    assert card.text.disabled and "Not edited here" in card.note.value


def test_a_caption_file_is_found_as_the_scan_finds_it(root):
    (root / "B.TXT").write_text("a jet")
    album = Album(root)
    album.add_tags([find(album, "b.png")], "sky")
    assert (root / "B.TXT").read_text() == "a jet, sky"
    assert not (root / "b.txt").exists()


def test_two_excluded_files_of_one_name_both_survive_and_both_come_back(root):
    (root / "b.txt").write_text("the first")
    first = snapshot(root)
    Album(root).exclude([root / "b.png"])
    image(root / "b.png", (32, 32))
    (root / "b.txt").write_text("the second")
    album = Album(root)
    album.exclude([root / "b.png"])
    kept = {path.name: path.read_bytes() for path in album.excluded.iterdir()}
    assert kept["b.txt"] == b"the first" and kept["b-2.txt"] == b"the second"
    assert kept["b.png"] == first["b.png"] != kept["b-2.png"]
    album.undo()
    assert (root / "b.txt").read_text() == "the second"
    report = album.undo()  # the place is taken: nothing is overwritten, and the report says so
    assert "is there again" in report.problems[0].cause
    assert (root / "b.txt").read_text() == "the second" and (album.excluded / "b.txt").read_text() == "the first"


def test_undo_survives_the_kernel_in_order(root):
    before = snapshot(root)
    Album(root).add_tags(range(3), "sky")
    Album(root).set_for_folder("night", "multiply", 2)
    Album(root).exclude([root / "night" / "b.png"])
    titles = []
    while label := Album(root).last_change:
        titles.append(label)
        Album(root).undo()
    assert titles == ["1 file excluded", "multiply of folder night", "add sky"]
    assert snapshot(root) == before


def test_undo_on_a_full_disk_keeps_the_caption_and_can_be_tried_again(root):
    (root / "b.txt").write_text("a long caption, " * 20)
    before = snapshot(root)
    album = Album(root)
    album.set_caption(find(album, "b.png"), "short")
    with no_room_beyond(50), pytest.raises(OSError):
        album.undo()
    assert (root / "b.txt").read_text() == "short"
    assert album.last_change == "caption of b.png"
    album.undo()
    assert snapshot(root) == before


def test_a_step_that_fails_half_way_can_be_taken_back(root):
    before = snapshot(root)
    album = Album(root)
    names = {"a red jet_1.png": "x" * 10, "b.png": "y" * 10, "night/b.png": "z" * 5000}
    texts = iter([names[album.name(index)] for index in range(3)])
    with no_room_beyond(2000), pytest.raises(OSError):
        album.edit(range(3), "all", lambda _: next(texts))
    assert (root / "a red jet_1.txt").read_text() == "x" * 10
    assert album.last_change == "all"
    album.undo()
    assert snapshot(root) == before


def test_a_step_that_could_not_be_noted_changes_nothing_and_leaves_no_entry(root):
    (root / "b.txt").write_text("a long caption, " * 200)
    before = snapshot(root)
    album = Album(root)
    album.add_tags([find(album, "a red jet_1.png")], "sky")
    with no_room_beyond(500), pytest.raises(OSError):
        album.set_caption(find(album, "b.png"), "short")
    assert album.last_change == "add sky"
    album.undo()
    assert snapshot(root) == before


def test_a_date_that_does_not_exist_in_a_yaml_does_not_keep_the_album_from_opening(root):
    text = "date: 2024-13-45  # of the scan\nmultiply: 2\n"
    (root / "b.yaml").write_text(text)
    panel = DatasetPanel(root.parent)
    index = find(panel.album, "b.png")
    assert panel.album.source(index).locked == ""
    panel.album.set_for_images([index], "multiply", 3)
    assert (root / "b.yaml").read_text() == "date: 2024-13-45  # of the scan\nmultiply: 3\n"
    assert panel.album.dataset.image(find(panel.album, "b.png")).multiply == 3
    panel.album.undo()
    assert (root / "b.yaml").read_text() == text


@pytest.mark.parametrize("text", ["{multiply: 2}", "multiply:\n  2\n"])
def test_a_settings_file_that_cannot_be_edited_by_line_is_named_and_left_alone(root, text):
    (root / "night" / "b.yaml").write_text(text)
    album = Album(root)
    report = album.set_for_images([find(album, "night/b.png")], "multiply", 3)
    assert len(report.problems) == 1 and "b.yaml" in report.problems[0].cause
    assert (root / "night" / "b.yaml").read_text() == text


def test_settings_in_a_json_win_so_a_yaml_next_to_them_is_not_written(root):
    (root / "b.json").write_text(json.dumps({"multiply": 2}))
    album = Album(root)
    assert "wins" in album.set_for_images([find(album, "b.png")], "multiply", 3).problems[0].cause
    assert not (root / "b.yaml").exists()


def test_tags_with_commas_are_several_tags(root):
    (root / "b.txt").write_text("a woman")
    album = Album(root)
    index = find(album, "b.png")
    album.add_tags([index], "red hair, smile")
    assert album.caption(index) == "a woman, red hair, smile"
    album.remove_tags([index], " Smile ,red  hair")
    assert album.caption(index) == "a woman"
    with pytest.raises(DataError, match="Type the tags"):
        album.add_tags([index], " , ")


CAMERA = ["IMG_0042.jpg", "DSC01234.jpg", "20240101_120000.jpg", "photo.jpg", "PXL_2024.jpg", "deadbeef01.jpg"]


@pytest.mark.parametrize("name", CAMERA)
def test_a_name_from_a_camera_is_no_caption(root, name):
    image(root / name)
    panel = DatasetPanel(root.parent)
    index = find(panel.album, name)
    assert panel.album.caption(index) == ""
    assert "<b>3</b><span>captions from file names</span>" in panel.figures.value
    assert "<b>1</b><span>without a caption</span>" in panel.figures.value
    card = next(card for card in panel.gallery.cards if card.index == index)
    assert card.text.value == "" and "no caption; trained as" in card.note.value
    panel.album.add_tags([index], "sks style")
    assert (root / name).with_suffix(".txt").read_text() == "sks style"


def test_tags_on_a_name_that_describes_keep_it(root):
    album = Album(root)
    album.add_tags([find(album, "a red jet_1.png")], "sks style")
    assert (root / "a red jet_1.txt").read_text() == "a red jet, sks style"


@pytest.mark.parametrize("name", ["/tmp/nowhere-at-all", "~/nowhere-at-all", "nowhere", "./no/where", "a/b/c"])
def test_a_folder_that_is_not_there_is_said_to_be_none(root, name):
    panel = DatasetPanel(root.parent)
    panel.source.value = name
    panel.source_button.click()
    assert "there is no such folder" in panel.message.value
    assert str(Path(name).expanduser().name) in panel.message.value
    assert panel.fetching.job is None and len(panel.album) == 3
