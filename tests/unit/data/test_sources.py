"""Archives are untrusted, and Hub datasets become folders."""

import io
import tarfile
import zipfile
from pathlib import Path

import pytest
from huggingface_hub.utils import filter_repo_objects

from everydream_kit.data.sources import open_source, unpack_archive
from everydream_kit.errors import DataError


def make_zip(path, entries, **attributes):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in entries.items():
            info = zipfile.ZipInfo(name)
            info.compress_type = zipfile.ZIP_DEFLATED
            info.external_attr = attributes.get("external_attr", 0)
            file.writestr(info, content)
    return path


def make_tar(path, members, mode="w"):
    with tarfile.open(path, mode) as file:
        for info, content in members:
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return path


def tar_member(name, kind=tarfile.REGTYPE, link=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


GOOD = {"cats/a.png": b"image", "cats/a.txt": b"a cat", "b.jpg": b"another"}


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("suffix", [".zip", ".tar", ".tar.gz", ".tgz"])
def test_an_archive_becomes_a_folder_once(tmp_path, suffix):
    archive = tmp_path / f"images{suffix}"
    if suffix == ".zip":
        make_zip(archive, GOOD)
    else:
        members = [(tar_member("cats", tarfile.DIRTYPE), b"")] + [(tar_member(n), c) for n, c in GOOD.items()]
        make_tar(archive, members, "w" if suffix == ".tar" else "w:gz")
    folder = open_source(str(archive), tmp_path / "work")
    assert folder.parent == tmp_path / "work"
    assert contents(folder) == GOOD
    (folder / "mark").touch()
    assert open_source(str(archive), tmp_path / "work") == folder
    assert (folder / "mark").exists()


def test_a_changed_archive_is_unpacked_anew(tmp_path):
    archive = make_zip(tmp_path / "a.zip", GOOD)
    first = unpack_archive(archive, tmp_path / "work")
    make_zip(archive, {**GOOD, "c.jpg": b"new"})
    assert unpack_archive(archive, tmp_path / "work") != first


OUTSIDE = [
    "../evil.txt",
    "cats/../../evil.txt",
    "/evil.txt",
    "..\\evil.txt",
    "C:\\evil.txt",
    "C:evil.txt",
    "\\evil.txt",
]


@pytest.mark.parametrize("kind", ["zip", "tar"])
@pytest.mark.parametrize("name", OUTSIDE)
def test_paths_that_lead_outside_are_refused_by_name_and_leave_nothing(tmp_path, kind, name):
    archive = tmp_path / f"a.{kind}"
    if kind == "zip":
        make_zip(archive, {"good.png": b"x", name: b"evil"})
    else:
        make_tar(archive, [(tar_member("good.png"), b"x"), (tar_member(name), b"evil")])
    with pytest.raises(DataError) as caught:
        open_source(str(archive), tmp_path / "work")
    assert repr(name) in str(caught.value)
    assert "nothing was unpacked" in str(caught.value)
    assert set(tmp_path.rglob("*")) == {archive, tmp_path / "work"}
    assert not (tmp_path.parent / "evil.txt").exists()


SPECIAL = [
    (tar_member("cats/link", tarfile.SYMTYPE, "/etc/passwd"), "a link"),
    (tar_member("cats/hard", tarfile.LNKTYPE, "../../x"), "a link"),
    (tar_member("null", tarfile.CHRTYPE), "a device or pipe"),
    (tar_member("disk", tarfile.BLKTYPE), "a device or pipe"),
    (tar_member("pipe", tarfile.FIFOTYPE), "a device or pipe"),
]


@pytest.mark.parametrize("depth", [100, 2000])
def test_folders_nested_without_end_are_refused_and_leave_nothing(tmp_path, depth):
    archive = tmp_path / "deep.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("a/" * depth + "a.txt", "x")
    with pytest.raises(DataError, match=f"lies {depth} folders deep"):
        unpack_archive(archive, tmp_path / "work")
    assert not [path for path in (tmp_path / "work").rglob("*") if path.name == "a"]


@pytest.mark.parametrize(("member", "what"), SPECIAL, ids=[member.name for member, _ in SPECIAL])
def test_links_and_devices_are_refused_by_name_and_leave_nothing(tmp_path, member, what):
    archive = make_tar(tmp_path / "a.tar", [(tar_member("good.png"), b"x"), (member, b"")])
    with pytest.raises(DataError, match=f"'{member.name}' is {what}"):
        unpack_archive(archive, tmp_path / "work")
    assert list((tmp_path / "work").iterdir()) == []


@pytest.mark.parametrize(
    ("mode", "what"), [(0o120777, "a link"), (0o020666, "a device"), (0o010644, "a device or pipe")]
)
def test_links_and_devices_in_a_zip_are_refused(tmp_path, mode, what):
    archive = make_zip(tmp_path / "a.zip", {"cats/odd": b"/etc/passwd"}, external_attr=mode << 16)
    with pytest.raises(DataError, match=f"'cats/odd' is {what}"):
        unpack_archive(archive, tmp_path / "work")
    assert list((tmp_path / "work").iterdir()) == []


@pytest.mark.parametrize("kind", ["zip", "tar.gz"])
def test_too_many_bytes_or_entries_are_refused_with_the_entry(tmp_path, kind):
    entries = {"small.png": b"x", "bomb.png": bytes(3_000_000), "later.png": b"y"}
    archive = tmp_path / f"a.{kind}"
    if kind == "zip":
        make_zip(archive, entries)
    else:
        make_tar(archive, [(tar_member(n), c) for n, c in entries.items()], "w:gz")
    assert archive.stat().st_size < 20_000
    with pytest.raises(DataError, match=r"more than 0\.0 GiB, 'bomb\.png' goes beyond"):
        unpack_archive(archive, tmp_path / "work", max_bytes=1_000_000)
    with pytest.raises(DataError, match=r"more than 2 entries, 'later\.png'"):
        unpack_archive(archive, tmp_path / "work", max_entries=2)
    assert list((tmp_path / "work").iterdir()) == []


def test_a_zip_that_lies_about_its_sizes_is_refused(tmp_path):
    archive = make_zip(tmp_path / "a.zip", {"bomb.png": bytes(100_000)})
    claims = (100_000).to_bytes(4, "little")
    archive.write_bytes(archive.read_bytes().replace(claims, (10).to_bytes(4, "little")))
    with pytest.raises(DataError, match=r"bomb\.png"):
        unpack_archive(archive, tmp_path / "work")
    assert list((tmp_path / "work").iterdir()) == []


@pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz"])
def test_a_damaged_archive_is_named_and_leaves_nothing(tmp_path, kind):
    archive = tmp_path / f"a.{kind}"
    noise = bytes(i * i % 251 for i in range(50_000))
    if kind == "zip":
        make_zip(archive, {"a.png": noise, "b.png": noise[::-1]})
        data = bytearray(archive.read_bytes())
        data[200:260] = bytes(60)
        archive.write_bytes(data)
    else:
        make_tar(
            archive, [(tar_member("a.png"), noise), (tar_member("b.png"), noise)], "w" if kind == "tar" else "w:gz"
        )
        archive.write_bytes(archive.read_bytes()[: archive.stat().st_size * 2 // 3])
    with pytest.raises(DataError, match="Copy or download it again"):
        unpack_archive(archive, tmp_path / "work")
    assert list((tmp_path / "work").iterdir()) == []


def test_an_entry_twice_is_refused(tmp_path):
    archive = make_tar(tmp_path / "a.tar", [(tar_member("a.png"), b"1"), (tar_member("a.png"), b"2")])
    with pytest.raises(DataError, match=r"'a\.png' cannot be unpacked"):
        unpack_archive(archive, tmp_path / "work")


@pytest.mark.parametrize(
    ("spec", "wanted"),
    [
        ("me/cats", ("me/cats", None)),
        ("hf://datasets/me/cats", ("me/cats", None)),
        ("hf://datasets/me/cats@v1.0", ("me/cats", "v1.0")),
    ],
)
def test_a_hub_dataset_is_fetched_by_its_id(tmp_path, spec, wanted):
    (tmp_path / "a.png").write_bytes(b"x")
    asked = []

    def fetch(repo_id, revision):
        asked.append((repo_id, revision))
        return tmp_path

    assert open_source(spec, tmp_path / "work", fetch=fetch) == tmp_path
    assert asked == [wanted]


def test_a_folder_or_an_archive_within_a_hub_dataset_can_be_meant(tmp_path):
    snapshot = tmp_path / "snapshot"
    (snapshot / "train").mkdir(parents=True)
    (snapshot / "train" / "a.png").write_bytes(b"x")

    def fetch(repo_id, revision):
        return snapshot

    assert open_source("hf://datasets/me/cats/train", tmp_path, fetch=fetch) == snapshot / "train"
    with pytest.raises(DataError, match="no folder 'test'"):
        open_source("hf://datasets/me/cats/test", tmp_path, fetch=fetch)
    (snapshot / "train" / "a.png").unlink()
    make_zip(snapshot / "images.zip", GOOD)
    assert contents(open_source("me/cats", tmp_path / "work", fetch=fetch)) == GOOD
    (snapshot / "images.zip").unlink()
    with pytest.raises(DataError, match="no image files"):
        open_source("me/cats", tmp_path, fetch=fetch)


def test_what_is_neither_archive_nor_dataset_is_said(tmp_path):
    with pytest.raises(DataError, match="neither an archive"):
        open_source(str(Path("not") / "a" / "data set"), tmp_path)


def test_the_table_of_captions_of_a_hub_dataset_is_fetched_with_its_images(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(b"x")
    asked = {}
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda repo_id, **how: asked.update(how) or str(tmp_path))
    assert open_source("me/cats", tmp_path / "work") == tmp_path
    files = [
        "train/a.png",
        "train/metadata.jsonl",
        "metadata.csv",
        "metadata.parquet",
        "data/train-00.parquet",
        "big.csv",
    ]
    assert list(filter_repo_objects(files, allow_patterns=asked["allow_patterns"])) == files[:4]
