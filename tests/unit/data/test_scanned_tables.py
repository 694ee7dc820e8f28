"""Scanning folders with tables of captions: which captions they give, and what is reported."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from scanned_folders import put, scan

from everydream_kit.data.captions import Tag
from everydream_kit.data.scanning import scan_dataset
from everydream_kit.data.sources import kind_of_source
from everydream_kit.errors import DataError


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv", "table.tsv"])
def test_a_table_as_data_root_names_the_command_that_reads_it(tmp_path, name):
    table = put(tmp_path, name, "")
    for read in (scan_dataset, kind_of_source):
        with pytest.raises(DataError, match=f"everydream tidy captions-from-table .*{name} FOLDER"):
            read(str(table))


HF = "".join(
    json.dumps({"file_name": name, "text": text}) + "\n" for name, text in {"a.png": "a cat, red", "b.png": "x"}.items()
)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metadata.jsonl", HF + '{"file_name": "c.png", "text": null}\n'),
        ("metadata.csv", 'file_name,text\na.png,"a cat, red"\nb.png,x\n'),
        ("Metadata.CSV", 'file_name,text\na.png,"a cat, red"\nb.png,x\n'),
        ("meta_cap.json", json.dumps({"a": {"caption": "a cat", "tags": "red"}, "b.png": {"tags": "x"}})),
        ("meta_lat.json", json.dumps({"a": {"caption": "a cat, red", "train_resolution": [64, 64]}, "b": {}})),
    ],
)
def test_the_table_of_a_folder_gives_the_captions_of_images_without_one(tmp_path, name, content):
    for image in ("a.png", "b.png", "a dog_1.png"):
        put(tmp_path, f"train/{image}")
    put(tmp_path, f"train/{name}", content.replace("c.png", "b.png"))
    put(tmp_path, "train/b.txt", "its own")
    found = scan(tmp_path)
    assert {key: image.caption.text for key, image in found.items()} == {
        "train/a.png": "a cat, red",
        "train/a dog_1.png": "a dog",
        "train/b.png": "its own",
    }
    assert found["train/a.png"].caption.tags == (Tag("red"),)


def test_a_table_reaches_the_folders_below_and_a_nearer_one_wins(tmp_path):
    for image in ("x/a.png", "x/b.png", "y/a.png"):
        put(tmp_path, image)
    put(tmp_path, "metadata.csv", "file_name,text\nx/a.png,far\n./x/b.png,far b\ny\\a.png,far y\n")
    put(tmp_path, "x/metadata.csv", "file_name,text\na.png,near\n")
    put(tmp_path, "global.yaml", "main_prompt: all\ntags: [by foo]")
    texts = {key: image.caption.text for key, image in scan(tmp_path).items()}
    assert texts == {"x/a.png": "near, by foo", "x/b.png": "far b, by foo", "y/a.png": "far y, by foo"}


def test_settings_next_to_an_image_leave_it_the_caption_of_the_table(tmp_path):
    for name in ("a", "b"):
        put(tmp_path, f"{name}.png")
    put(tmp_path, "metadata.csv", 'file_name,text\na.png,"a cat, red"\nb.png,"a dog, blue"\n')
    put(tmp_path, "a.yaml", "multiply: 3")
    put(tmp_path, "b.yaml", "main_prompt: its own")
    found = scan(tmp_path)
    assert (found["a.png"].caption.text, found["a.png"].multiply) == ("a cat, red", 3.0)
    assert found["b.png"].caption.text == "its own"


def test_a_changed_table_changes_the_captions_that_a_scan_remembers(tmp_path):
    put(tmp_path, "set/a.png")
    for text in ("one", "two"):
        put(tmp_path, "set/metadata.csv", f"file_name,text\na.png,{text}\n")
        dataset = scan_dataset(tmp_path / "set", cache_dir=tmp_path / "cache")
        assert dataset.caption(0).text == text


@pytest.mark.parametrize(
    ("name", "content", "cause"),
    [
        (
            "metadata.csv",
            "file_name,label\na.png,3\n",
            "no caption of it is used: none of the columns is called caption",
        ),
        ("metadata.csv", "file_name,text\nz.png,a\na.png,b\n", "1 of its 2 rows names no image that is here"),
        ("metadata.parquet", "PAR1", "a table in Parquet is not read"),
    ],
)
def test_captions_of_a_table_that_are_not_used_are_reported(tmp_path, name, content, cause):
    put(tmp_path, "a.png")
    table = put(tmp_path, name, content)
    [problem] = scan_dataset(tmp_path).problems
    assert (problem.path, problem.skipped) == (str(table), False)
    assert problem.cause.startswith(cause)


BAD_LINE = HF.replace("b.png", "z.png").splitlines()[0] + '\n{"file_name": "b.png", "text\n'


@pytest.mark.parametrize(
    ("name", "content", "trained", "cause"),
    [
        ("metadata.jsonl", BAD_LINE, {"a.png": "a cat, red", "own.png": "its own"}, "line 2, column 24: "),
        ("metadata.jsonl", "{", {"own.png": "its own"}, "line 1, column 2: "),
        ("meta_cap.json", '["a.png"]', {"own.png": "its own"}, "cannot be read as a table of captions (a list of obj"),
    ],
)
def test_an_image_whose_caption_may_be_in_what_cannot_be_read_is_skipped(tmp_path, name, content, trained, cause):
    for image in ("a.png", "b.png", "own.png"):
        put(tmp_path, image)
    put(tmp_path, "own.txt", "its own")
    table = put(tmp_path, name, content)
    dataset = scan_dataset(tmp_path)
    assert {path: dataset.caption(index).text for index, path in enumerate(dataset.paths)} == trained
    [problem, *images] = dataset.problems
    assert (problem.path, problem.cause.startswith(cause), problem.skipped) == (str(table), True, False)
    skipped = {"a.png", "b.png", "own.png"} - trained.keys()
    assert {Path(one.path).name for one in images if one.skipped} == skipped


def test_a_caption_may_hold_a_line_end_of_unicode(tmp_path):
    put(tmp_path, "a.png")
    put(tmp_path, "metadata.jsonl", '{"file_name": "a.png", "text": "a\u2028cat"}\n')
    assert scan(tmp_path)["a.png"].caption.text == "a cat"
