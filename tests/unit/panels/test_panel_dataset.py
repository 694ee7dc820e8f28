"""The dataset panel and what it is made of: captions on disk, tags, settings, problems, undo."""

import shutil
from pathlib import Path

import ipywidgets as widgets
import pytest
from panel_parts import image, make_jets
from PIL import Image

from everydream_kit.actions.background import INSPECTION_FILE
from everydream_kit.data.album import Album
from everydream_kit.errors import DataError
from everydream_kit.panels.dataset_panel import DatasetPanel, read_report


@pytest.fixture
def project(tmp_path):
    return make_jets(tmp_path / "jets")


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
        panel._render()
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
    assert "still checking" in shown.value and "No problems:" not in shown.value
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


@pytest.mark.background
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


@pytest.mark.background
def test_captions_beyond_the_encoders_window_are_named(project):
    (project / "input" / "night" / "0.txt").write_text("a jet " * 200)
    panel = DatasetPanel(project)
    look_through(panel)
    (line,) = _texts_of(panel, "Captions that are too long")
    assert "night/0.jpg" in line and "tokens; never read" in line
    assert len(line.split("never read: ")[1]) < 200, "the list stays a list"


def test_an_empty_dataset_has_no_file_that_cannot_be_used(tmp_path):
    panel = DatasetPanel(tmp_path / "jets")
    assert "<b>0</b><span>cannot be used</span>" in panel.figures.value
    assert panel.tabs.titles[3].description == "Problems (0)"
    (row,) = _rows_of(panel, "No images yet")
    assert "holds no image" in row.children[0].value and len(row.children) == 1, "nothing to exclude"


def test_a_note_names_its_file_and_is_not_taken_for_a_file_that_is_used(project):
    (project / "input" / "orphan.txt").write_text("a caption")
    panel = DatasetPanel(project)
    (line,) = _texts_of(panel, "Notes")
    assert "input: 1 caption file belongs to no image: orphan.txt" in line and "<b>" not in line
    assert "are used" not in "".join(box.children[0].value for box in panel.problems.lines.children)


def test_an_answer_stays_while_a_task_reports_progress(project):
    panel = DatasetPanel(project)
    panel.fetching = Reporting()
    panel.refresh()
    assert "1 of 9" in panel.message.value
    panel.exclude_button.click()
    panel.refresh()
    assert "Select images first" in panel.message.value, "not wiped at the next beat"
    tick(panel, "a jet_00.png")
    panel.exclude_button.click()
    panel.refresh()
    assert "moved to" in panel.message.value
    panel.fetching.state = "failed"
    panel.refresh()
    assert "9 of 9" in panel.message.value, "the end is always said"


class Reporting:
    """Stands for a background task that is in progress: each look reports more."""

    job, step, state = object(), 0, "running"

    def poll(self):
        self.step += 1
        is_alive = self.state == "running"
        words = f"{self.step if is_alive else 9} of 9"
        return {"alive": is_alive, "state": self.state, "message": words, "step": self.step, "num_steps": 9}


def _rows_of(panel, kind):
    box = next(box for box in panel.problems.lines.children if f">{kind} (" in box.children[0].value)
    return [row for row in box.children[1:] if isinstance(row, widgets.HBox)]


def _texts_of(panel, kind):
    return [row.children[0].value for row in _rows_of(panel, kind)]


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


@pytest.mark.parametrize("content", ['{"counts": ', "[" * 5000, "[1, 2]"])
def test_a_damaged_report_is_no_report_and_is_logged(
    content: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / INSPECTION_FILE).write_text(content, "utf-8")
    assert read_report(tmp_path) == {}
    assert f"{INSPECTION_FILE}" in caplog.text
    assert "The dataset is inspected again." in caplog.text
