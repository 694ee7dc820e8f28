"""Uploads to the dataset panel: files in pieces, bundles, archives, and what is refused."""

import io
import itertools
import zipfile

import pytest
from panel_parts import make_jets
from PIL import Image

from everydream_kit.errors import DataError
from everydream_kit.panels.dataset_panel import DatasetPanel
from everydream_kit.panels.upload_area import Receiver, safe_name


@pytest.fixture
def project(tmp_path):
    return make_jets(tmp_path / "jets")


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
        "b.txt": "already exists, and stays as it is",
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


@pytest.mark.background
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


@pytest.mark.background
def test_a_damaged_archive_is_one_sentence_and_leaves_nothing(project):
    panel = DatasetPanel(project)
    assert send(panel.receiver, "set.zip", zipped(x__png=b"x" * 500)[:200], piece=100) == []
    unpack(panel)
    assert "damaged" in panel.message.value
    assert list((project / ".input-arrivals").iterdir()) == [] and not (project / "input" / "set").exists()


@pytest.mark.background
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
