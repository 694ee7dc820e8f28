"""The dataset panel and what it is made of: captions on disk, tags, settings, problems, undo, uploads in pieces."""

import io
import itertools
import shutil
import zipfile
from pathlib import Path

import ipywidgets as widgets
import pytest
from PIL import Image

from everydream_kit.actions.background import INSPECTION_FILE
from everydream_kit.data.album import Album
from everydream_kit.errors import DataError
from everydream_kit.panels.dataset_panel import DatasetPanel, read_report
from everydream_kit.panels.upload_area import Receiver, safe_name


def image(path, size=(64, 48), color=(200, 80, 40)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)


@pytest.fixture
def project(tmp_path):
    folder = tmp_path / "jets"
    for number in range(15):
        image(folder / "input" / f"a jet_{number:02}.png")
    for number in range(3):
        image(folder / "input" / "night" / f"{number}.jpg", size=(48, 64))
        (folder / "input" / "night" / f"{number}.txt").write_text("a jet at night, sky, dark")
    return folder


@pytest.fixture
def album(project):
    return Album(project / "input")


def find(album, name):
    return next(index for index in range(len(album)) if album.name(index) == name)


def test_captions_come_from_the_file_next_to_or_the_name(album):
    assert len(album) == 18
    assert album.caption(find(album, "night/0.jpg")) == "a jet at night, sky, dark"
    assert album.caption(find(album, "a jet_00.png")) == "a jet"


def test_a_caption_is_written_and_undone_byte_for_byte(album):
    index = find(album, "night/0.jpg")
    album.set_caption(index, "  a red jet ")
    path = album.root / "night" / "0.txt"
    assert path.read_text() == "a red jet"
    assert album.last_change == "caption of night/0.jpg"
    album.undo()
    assert path.read_text() == "a jet at night, sky, dark"
    index = find(album, "a jet_00.png")
    album.set_caption(index, "new")
    album.undo()
    assert not (album.root / "a jet_00.txt").exists()
    assert album.undo() is None and album.last_change == ""


def test_tags_are_added_and_removed_for_a_selection(album):
    indices = album.search("night")
    assert len(album.add_tags(indices, "3d").changes) == 3
    assert len(album.add_tags(indices, "3d").changes) == 0
    assert len(album.remove_tags(indices, "sky").changes) == 3
    assert album.caption(indices[0]) == "a jet at night, dark, 3d"
    assert dict(album.count_tags(indices)) == {"a jet at night": 3, "dark": 3, "3d": 3}
    album.undo()
    assert album.caption(indices[0]) == "a jet at night, sky, dark, 3d"


def test_search_takes_all_words_and_leaves_out_the_crossed_ones(album):
    assert len(album.search("")) == 18
    assert len(album.search("jet dark")) == 3
    assert len(album.search("jet -dark")) == 15


def test_a_caption_in_a_settings_file_is_shown_and_not_edited(album, project):
    path = project / "input" / "night" / "0.yaml"
    path.write_text("main_prompt: a jet\ntags:\n  - tag: sky\n    weight: 2\n")
    album.reload()
    index = find(album, "night/0.jpg")
    assert album.source(index).locked == "its caption is in 0.yaml"
    with pytest.raises(DataError, match=r"0\.yaml"):
        album.set_caption(index, "x")


def test_settings_for_a_folder_and_for_images_reach_the_data_engine(album):
    album.set_for_folder("night", "multiply", 2.5)
    assert album.dataset.image(find(album, "night/1.jpg")).multiply == 2.5
    index = find(album, "a jet_00.png")
    album.set_for_images([index], "loss_scale", 0.5)
    assert album.dataset.image(find(album, "a jet_00.png")).loss_scale == 0.5
    assert album.caption(find(album, "a jet_00.png")) == "a jet"
    album.undo()
    album.undo()
    assert album.dataset.image(find(album, "night/1.jpg")).multiply == 1.0
    with pytest.raises(DataError, match="from 0 to 1"):
        album.set_for_folder("night", "flip_p", 3)


def test_set_aside_moves_an_image_with_its_caption_and_undo_brings_it_back(album):
    path = album.root / "night" / "0.jpg"
    assert [change.what for change in album.exclude([path]).changes] == ["excluded", "went with them"]
    assert not path.exists() and not path.with_suffix(".txt").exists()
    assert (album.excluded / "night" / "0.txt").is_file()
    assert len(album) == 17
    album.undo()
    assert len(album) == 18 and path.with_suffix(".txt").read_text() == "a jet at night, sky, dark"
    with pytest.raises(DataError, match="outside"):
        album.exclude([album.root.parent / "settings.json"])


def test_the_panel_shows_twelve_at_a_time_and_writes_what_is_typed(project):
    panel = DatasetPanel(project)
    cards = panel.gallery.cards
    assert [card.box.layout.display for card in cards] == [""] * 12 or all(card.index is not None for card in cards)
    assert panel.gallery.page.max == 2
    panel.gallery.next.click()
    assert sum(card.index is not None for card in cards) == 6
    panel.gallery.search.value = "night"
    card = cards[0]
    assert card.text.value == "a jet at night, sky, dark"
    card.text.value = "typed in the panel"
    assert (project / "input" / "night" / "0.txt").read_text() == "typed in the panel"
    assert "written" in panel.message.value
    panel.undo_button.click()
    assert cards[0].text.value == "a jet at night, sky, dark"


def test_the_panel_tags_a_selection_and_asks_for_one(project):
    panel = DatasetPanel(project)
    panel.tag.value = "3d"
    panel.add_tag_button.click()
    assert "Select images first" in panel.message.value
    panel.gallery.search.value = "night"
    panel.gallery.choose_found.click()
    panel.add_tag_button.click()
    assert "3 captions changed" in panel.message.value
    assert (project / "input" / "night" / "2.txt").read_text() == "a jet at night, sky, dark, 3d"


def test_the_panel_applies_a_setting_to_a_folder(project):
    panel = DatasetPanel(project)
    panel.setting.value, panel.setting_value.value, panel.setting_where.value = "multiply", "3", "night"
    panel.setting_button.click()
    assert (project / "input" / "night" / "multiply.txt").read_text() == "3\n"
    panel.setting_value.value = "many"
    panel.setting_button.click()
    assert "must be a number" in panel.message.value


def tick(panel, name):
    """Tick an image where it stands now."""
    panel.gallery.page.value = panel.gallery.found.index(find(panel.album, name)) // 12 + 1
    next(card for card in panel.gallery.cards if card.index == find(panel.album, name)).check.value = True


@pytest.mark.parametrize("change", ["problems", "undo", "rescan", "upload"])
def test_the_selection_keeps_its_images_when_positions_move(project, change):
    before = project / "input" / "a broken.png"
    if change != "undo":
        image(before)
    panel = DatasetPanel(project)
    if change == "undo":
        panel.album.set_caption(0, "x")
        image(before)
    tick(panel, "a jet_03.png")
    if change == "problems":
        panel._exclude([before])
    elif change == "undo":
        panel.undo_button.click()
    elif change == "rescan":
        before.unlink()
        panel.reload_button.click()
    else:
        image(project / "input" / "a a.png")
        panel.receiver.received.append("a a.png")
        panel._received()
    ticked = [card.index for card in panel.gallery.cards if card.check.value]
    assert [panel.album.name(index) for index in ticked] == ["a jet_03.png"]
    panel.exclude_button.click()
    assert not (project / "input" / "a jet_03.png").exists()
    assert sum(path.name.startswith("a jet_") for path in (project / "input").iterdir()) == 14


def test_another_folder_starts_with_nothing_selected_and_actions_say_what_they_touch(project, tmp_path):
    for name in ("a jet_00.png", "new.png"):
        image(tmp_path / "other" / name)
    panel = DatasetPanel(project)
    panel.gallery.choose_found.click()
    assert f"18 images selected in {project / 'input'}" in panel.gallery.selection.value
    assert panel.add_tag_button.description == "Add to selected (18)"
    assert panel.exclude_button.tooltip.endswith(f"18 images in {project / 'input'}")
    panel.source.value = str(tmp_path / "other")
    panel.source_button.click()
    assert not any(card.check.value for card in panel.gallery.cards)
    panel.gallery.choose_found.click()
    assert f"2 images selected in {tmp_path / 'other'}" in panel.gallery.selection.value
    panel.tag.value = "3d"
    panel.add_tag_button.click()
    assert f"2 captions changed in {tmp_path / 'other'}" in panel.message.value


def issue_lines(panel, kind):
    """(HTML, button) of each line of a kind, and its button for all of them."""
    box = next(box for box in panel.problems.lines.children if f">{kind} (" in box.children[0].value)
    rows = [row.children for row in box.children[1:] if isinstance(row, widgets.HBox)]
    return [(row[0].value, row[1]) for row in rows if len(row) == 2], rows[-1][-1]


def look_through(panel):
    """What the page's clock does, until the search for duplicates has ended."""
    panel.refresh()
    assert panel.inspecting.job is not None
    panel.inspecting.job.watch(interval_seconds=0.05)
    panel.refresh()


def test_problems_are_listed_with_their_cure_and_set_aside(project):
    (project / "input" / "broken.jpg").write_bytes(b"no image at all")
    panel = DatasetPanel(project)
    ((line, button),), _ = issue_lines(panel, "Cannot be used")
    assert "broken.jpg" in line
    button.click()
    assert not (project / "input" / "broken.jpg").exists()
    assert "1 file moved" in panel.message.value
    panel.undo_button.click()
    assert (project / "input" / "broken.jpg").exists()


def test_no_problems_is_said_only_when_every_image_was_looked_at(project):
    (project / "settings.json").write_text('{"resolution": 64}')
    for path in (project / "input").rglob("*.[pj][np]g"):
        image(path, size=(96, 96))
    for path in list((project / "input").rglob("*.txt")):
        path.write_text("a jet")
    panel = DatasetPanel(project)
    assert panel.problems.issues == []
    (shown,) = panel.problems.lines.children
    assert "still being looked for" in shown.value and "No problems:" not in shown.value
    panel.problems.show([], complete=True)
    assert "No problems: every file can be used" in panel.problems.lines.children[0].value


def test_one_folder_is_one_folder(project):
    shutil.rmtree(project / "input" / "night")
    assert "<b>1</b><span>folder</span>" in DatasetPanel(project).figures.value


def test_images_that_are_too_small_are_named_for_the_projects_resolution(project):
    panel = DatasetPanel(project)
    lines, every = issue_lines(panel, "Smaller than their bucket")
    assert len(lines) == 8 and "enlarged" in lines[0][0] and "(18 files)" in every.description
    (project / "settings.json").write_text('{"resolution": 64}')
    panel = DatasetPanel(project)
    assert all("Smaller" not in box.children[0].value for box in panel.problems.lines.children[:-1])


@pytest.mark.beside
def test_duplicates_are_found_next_to_and_the_copies_set_aside(project):
    one, other = (Image.effect_noise((8, 6), 90).resize((400, 300), Image.Resampling.BICUBIC) for _ in range(2))
    one.save(project / "input" / "one.png")
    one.resize((200, 150)).save(project / "input" / "one small.png")
    other.save(project / "input" / "other.png")
    (project / "input" / "other copy.png").write_bytes((project / "input" / "other.png").read_bytes())
    data = (project / "input" / "one.png").read_bytes()
    (project / "input" / "torn.png").write_bytes(data[:1000] + bytes(800) + data[1800:])  # its end is there
    for path in (project / "input").glob("a jet_*.png"):
        path.unlink()
    shutil.rmtree(project / "input" / "night")
    (project / "settings.json").write_text('{"resolution": 64, "resume_ckpt": "embedded"}')
    panel = DatasetPanel(project)
    look_through(panel)
    assert panel.tabs.titles[3].description == "Problems (3)"
    ((twice, button),), _ = issue_lines(panel, "Exact duplicates")
    assert "other.png" in twice and "other copy.png" in twice and twice.count("data:image") == 2
    button.click()
    assert (project / "input" / "other.png").exists() != (project / "input" / "other copy.png").exists()
    ((alike, button),), _ = issue_lines(panel, "Look alike")
    assert "400 × 300, 200 × 150" in alike
    button.click()
    assert (project / "input" / "one.png").exists() and not (project / "input" / "one small.png").exists()
    ((torn, button),), _ = issue_lines(panel, "Cannot be used")
    assert "cannot be decoded" in torn
    button.click()
    assert "No problems" in panel.problems.lines.children[0].value
    panel.refresh()
    assert panel.inspecting.job is None, "nothing has come, so nothing is looked for again"
    for _ in range(3):
        panel.undo_button.click()
    assert panel.tabs.titles[3].description == "Problems (3)"
    again = DatasetPanel(project)
    assert again.tabs.titles[3].description == "Problems (3)"
    again.refresh()
    assert again.inspecting.job is None


@pytest.mark.beside
def test_captions_beyond_the_encoders_window_are_named(project):
    (project / "input" / "night" / "0.txt").write_text("a jet " * 60)
    panel = DatasetPanel(project)
    look_through(panel)
    (line,) = _texts_of(panel, "Captions that are too long")
    assert "night/0.jpg" in line and "tokens; never read" in line


def _texts_of(panel, kind):
    box = next(box for box in panel.problems.lines.children if f">{kind} (" in box.children[0].value)
    return [row.children[0].value for row in box.children[1:] if isinstance(row, widgets.HBox)]


def test_the_report_counts_as_the_trainer_does(project):
    panel = DatasetPanel(project)
    assert "18 images make" in panel.report.value and "% full" in panel.report.value
    assert "a jet at night" in panel.report.value


def test_another_folder_becomes_the_dataset_and_stays_so(project, tmp_path):
    image(tmp_path / "other" / "x.png")
    panel = DatasetPanel(project)
    panel.source.value = str(tmp_path / "other")
    panel.source_button.click()
    assert len(panel.album) == 1
    assert len(DatasetPanel(project).album) == 1


def test_a_dataset_of_five_thousand_stays_usable(tmp_path, monkeypatch):
    from everydream_kit.panels import gallery

    folder = tmp_path / "big" / "input"
    image(folder / "p0000.png")
    data = (folder / "p0000.png").read_bytes()
    for number in range(1, 5000):
        (folder / f"p{number:04}.png").write_bytes(data)
    opened = []
    monkeypatch.setattr(gallery, "thumbnail", lambda path, side: opened.append(path) or b"")
    panel = DatasetPanel(tmp_path / "big")
    assert panel.gallery.page.max == 417
    assert len(panel.gallery.cards) == 12 and len(set(opened)) == 12
    opened.clear()
    panel.gallery.page.value = 417
    assert panel.gallery.shown[-1] == 4999
    assert len(opened) == len(panel.gallery.shown) == 8
    panel.gallery.search.value = "p123"
    assert panel.gallery.found == list(range(1230, 1240))


NUMBERS = itertools.count()


def ask(receiver, kind, buffer=None, **content):
    """A message as the page sends it, with a number of its own; returns the answer."""
    content = {"number": f"page-{next(NUMBERS)}", **content, "kind": kind}
    return receiver.take(content, [] if buffer is None else [memoryview(buffer)])


def send(receiver, name, data, piece=1000, *, replace=False):
    """A large file in pieces; returns what was refused."""
    answers = [ask(receiver, "begin", id=name, name=name, size=len(data), replace=replace)]
    for at in reversed(range(0, len(data), piece)):  # pieces may overtake each other
        answers.append(ask(receiver, "piece", data[at : at + piece], id=name, at=at))
    answers.append(ask(receiver, "end", id=name))
    return [answer["error"] for answer in answers if "error" in answer]


def png(color):
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), color).save(buffer, "PNG")
    return buffer.getvalue()


def send_bundle(receiver, *, replace=False, **entries):
    """Small files in one message; returns what was refused, by name."""
    named = {name.replace("__", "."): data for name, data in entries.items()}
    files = [{"name": name, "size": len(data), "replace": replace} for name, data in named.items()]
    return ask(receiver, "bundle", b"".join(named.values()), files=files)["errors"]


def test_a_file_arrives_in_pieces_and_appears_whole(tmp_path):
    receiver = Receiver(tmp_path)
    data = bytes(range(256)) * 40
    ask(receiver, "begin", id="1", name="sub/a.png", size=len(data))
    assert not (tmp_path / "sub" / "a.png").exists()
    assert send(receiver, "sub/a.png", data) == []
    assert (tmp_path / "sub" / "a.png").read_bytes() == data


def test_a_message_that_comes_twice_is_carried_out_once_and_a_missing_one_is_reported(tmp_path):
    receiver = Receiver(tmp_path)
    ask(receiver, "begin", id="1", name="a.png", size=4)
    for at, piece in ((2, b"cd"), (0, b"ab"), (0, b"ab")):
        ask(receiver, "piece", piece, id="1", at=at)
    answers = [ask(receiver, "end", id="1", number="page-last") for _ in range(2)]
    assert answers[0] == answers[1] and "error" not in answers[0]
    assert (tmp_path / "a.png").read_bytes() == b"abcd"
    ask(receiver, "begin", id="2", name="b.png", size=4)
    assert "incomplete" in ask(receiver, "end", id="2")["error"]
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_a_bundle_brings_small_files_and_says_which_it_refuses(tmp_path):
    receiver = Receiver(tmp_path)
    (tmp_path / "b.txt").write_bytes(b"mine")
    refused = send_bundle(receiver, a__png=b"png", b__txt=b"new", c__exe=b"x", d__txt=b"")
    assert refused == {
        "b.txt": "is there already, and stays as it is",
        "c.exe": "not an image, a caption file or a .zip",
    }
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {
        "a.png": b"png",
        "b.txt": b"mine",
        "d.txt": b"",
    }


def test_nothing_is_written_through_a_link_with_a_guessed_name(tmp_path):
    victim = tmp_path / "victim"
    victim.write_bytes(b"kept")
    folder = tmp_path / "input"
    folder.mkdir()
    (folder / ".a.png.part").symlink_to(victim)
    send(Receiver(folder), "a.png", b"new")
    assert victim.read_bytes() == b"kept"
    assert (folder / "a.png").read_bytes() == b"new"


def test_both_are_kept_under_a_stem_that_an_image_shares_with_its_caption(tmp_path):
    for name in ("a.png", "a-2.png", "b.png"):
        (tmp_path / name).write_bytes(b"")
    answer = ask(Receiver(tmp_path), "names", names=["a.png", "a.txt", "a-3.png", "b.txt", "c.png", "a.zip", "x.exe"])
    assert answer["existing"] == ["a.png"]
    assert answer["keep"] == {"a.png": "a-4.png", "a.txt": "a-4.txt"}


def test_an_upload_that_replaces_is_undone_file_by_file(project):
    panel = DatasetPanel(project)
    before = {path.name: path.read_bytes() for path in (project / "input").iterdir() if path.is_file()}
    assert send_bundle(panel.receiver, replace=True, zz__png=png((9, 9, 9)), **{"a jet_00__png": png((1, 1, 1))}) == {}
    panel._received()
    assert "2 files received. 1 replaced" in panel.message.value
    assert (project / "input" / "a jet_00.png").read_bytes() == png((1, 1, 1))
    assert len(panel.album) == 19
    panel.undo_button.click()
    assert {path.name: path.read_bytes() for path in (project / "input").iterdir() if path.is_file()} == before
    kept = sorted(path.name for path in panel.album.excluded.rglob("*.png"))
    assert kept == ["a jet_00.png", "zz.png"]  # what had arrived is not deleted either


def zipped(**entries):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name.replace("__", "."), content)
    return buffer.getvalue()


def unpack(panel):
    """What the page's clock does, until everything is unpacked."""
    panel._received()
    while panel.unpacking.job is not None:
        panel.unpacking.job.watch(interval_seconds=0.05)
        panel.refresh()


@pytest.mark.beside
def test_an_archive_is_unpacked_next_to_and_not_kept(project):
    panel = DatasetPanel(project)
    image = (project / "input" / "a jet_00.png").read_bytes()
    for _ in range(2):
        assert send(panel.receiver, "set.zip", zipped(x__png=image, x__txt=b"hello"), piece=100) == []
    assert not (project / "input" / "set").exists(), "the callback only takes the file"
    unpack(panel)
    assert "2 files unpacked" in panel.message.value
    assert (project / "input" / "set" / "x.txt").read_text() == "hello"
    assert (project / "input" / "set-2" / "x.txt").read_text() == "hello"
    assert len(panel.album) == 20
    assert list((project / ".input-arrivals").iterdir()) == []
    panel.undo_button.click()
    assert not (project / "input" / "set-2").exists() and len(panel.album) == 19


@pytest.mark.beside
def test_a_damaged_archive_is_one_sentence_and_leaves_nothing(project):
    panel = DatasetPanel(project)
    assert send(panel.receiver, "set.zip", zipped(x__png=b"x" * 500)[:200], piece=100) == []
    unpack(panel)
    assert "damaged" in panel.message.value
    assert list((project / ".input-arrivals").iterdir()) == [] and not (project / "input" / "set").exists()


@pytest.mark.beside
def test_an_archive_that_waited_when_the_kernel_ended_is_unpacked_by_the_next_panel(project):
    send(DatasetPanel(project).receiver, "set.zip", zipped(x__txt=b"hello"), piece=100)
    panel = DatasetPanel(project)
    unpack(panel)
    assert (project / "input" / "set" / "x.txt").read_text() == "hello"


def test_other_kinds_of_file_are_refused(tmp_path):
    assert "not an image" in send(Receiver(tmp_path), "virus.exe", b"x")[0]


@pytest.mark.parametrize(
    "name, safe",
    [
        ("../../etc/a.png", "etc/a.png"),
        ("/abs/a.png", "abs/a.png"),
        ("a\\b.png", "a/b.png"),
        ("C:/x?.png", "C_/x_.png"),
    ],
)
def test_names_cannot_lead_out_of_the_folder(name, safe):
    assert safe_name(name) == safe


def test_a_name_of_nothing_is_refused():
    with pytest.raises(DataError, match="no usable file name"):
        safe_name("../..")


@pytest.mark.parametrize("content", ['{"counts": ', "[" * 5000, "[1, 2]"])
def test_a_damaged_report_is_no_report_and_is_logged(
    content: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / INSPECTION_FILE).write_text(content, "utf-8")
    assert read_report(tmp_path) == {}
    assert f"{INSPECTION_FILE}" in caplog.text
    assert "The dataset is inspected again." in caplog.text
