"""What null, repeated names, odd tags and negative weights in settings files mean: by their effect on a scanned folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from PIL import Image

from everydream_kit.data import textfiles
from everydream_kit.data.captions import Tag
from everydream_kit.data.dataset import Dataset, DatasetImage
from everydream_kit.data.scanning import scan_dataset

PARSERS = {"python": yaml.Loader, "libyaml": getattr(yaml, "CLoader", None)}
NULLS = ("", "~", "null", "Null", "NULL", "!!null null")
VALUES = (
    "multiply",
    "cond_dropout",
    "flip_p",
    "loss_scale",
    "rating",
    "max_caption_length",
    "shuffle_tags",
    "keep_tags",
)


@pytest.fixture(params=PARSERS)
def parser(request, monkeypatch):
    """PyYAML with and without libyaml: a plain scalar has another style in each."""
    if PARSERS[request.param] is None:
        pytest.skip("this PyYAML has no libyaml")
    monkeypatch.setattr(textfiles, "_LOADER", PARSERS[request.param])


def scan(root: Path, **files: str) -> Dataset:
    """A folder with one image, `a red car_1.png`, and the given files (`__` for the dot)."""
    Image.new("RGB", (48, 32)).save(root / "a red car_1.png")
    for name, text in files.items():
        stem, ending = name.split("__")
        (root / f"{'a red car_1' if stem == 'sidecar' else stem}.{ending}").write_text(text)
    return scan_dataset(root)


def image(dataset: Dataset) -> DatasetImage:
    assert len(dataset) == 1, dataset.problems
    return dataset.image(0)


@pytest.mark.parametrize("null", NULLS)
def test_null_in_a_folder_leaves_every_value_to_the_next_source(tmp_path, parser, null):
    names = (*VALUES, "batch_id", "main_prompt", "caption", "tags")
    dataset = scan(tmp_path, global__yaml="multiply: 3", local__yaml="".join(f"{name}: {null}\n" for name in names))
    found = image(dataset)
    assert dataset.problems == []
    assert (found.multiply, found.caption.text, found.loss_scale) == (3.0, "a red car", 1.0)
    assert (found.batch_id, found.caption.tags) == (None, ())


@pytest.mark.parametrize("name", ["main_prompt", "caption"])
@pytest.mark.parametrize("text", ["{name}: {null}", "{name}: [{null}]"])
@pytest.mark.parametrize("null", NULLS[1:])
def test_null_next_to_an_image_does_not_replace_its_caption(tmp_path, parser, name, text, null):
    words = text.format(name=name, null=null)
    assert image(scan(tmp_path, sidecar__yaml=words)).caption.text == "a red car"
    assert image(scan(tmp_path, sidecar__txt="a boat", sidecar__yaml=words)).caption.text == "a boat"


def test_an_empty_text_in_quotes_is_the_empty_caption(tmp_path, parser):
    for text in ("main_prompt: ''", 'caption: ""', "main_prompt: !!str"):
        assert image(scan(tmp_path, sidecar__yaml=text)).caption.text == ""


@pytest.mark.parametrize("word", ["'null'", '"~"', "!!str null"])
def test_null_in_quotes_is_a_word(tmp_path, parser, word):
    assert image(scan(tmp_path, sidecar__yaml=f"main_prompt: {word}")).caption.text in ("null", "~")


@pytest.mark.parametrize(
    ("tags", "texts"),
    [
        ("[~, x]", ["x"]),
        ("[null, x, ]", ["x"]),
        ("[{tag: x, weight: null}, {tag: ~, weight: 2}]", ["x"]),
        ("\n- \n- x", ["x"]),
    ],
)
def test_null_among_tags_is_no_tag(tmp_path, parser, tags, texts):
    found = image(scan(tmp_path, sidecar__yaml=f"tags: {tags}"))
    assert [tag.text for tag in found.caption.tags] == texts
    assert found.caption.main_prompt == "a red car"


def test_null_in_json_is_not_given_either(tmp_path):
    nothing = dict.fromkeys((*VALUES, "batch_id", "main_prompt", "caption", "tags"))
    found = image(scan(tmp_path, sidecar__json=json.dumps(nothing), local__yaml="rating: 3"))
    assert (found.caption.text, found.multiply, found.rating) == ("a red car", 1.0, 3.0)
    index = tmp_path / "index.json"
    index.write_text(json.dumps([{"image": "a red car_1.png", **nothing}]))
    found = image(scan_dataset(index))
    assert (found.caption.text, found.multiply) == ("a red car", 1.0)


@pytest.mark.parametrize("name", ["multiply", "cond_dropout", "flip_p", "loss_scale", "batch_id"])
def test_an_empty_one_value_file_says_nothing_and_is_reported(tmp_path, name):
    dataset = scan(tmp_path, **{f"{name}__txt": " \n"})
    found = image(dataset)
    assert (found.multiply, found.batch_id) == (1.0, None)
    assert [(p.cause, p.skipped) for p in dataset.problems] == [("the file is empty, so it sets nothing", False)]


@pytest.mark.parametrize(
    ("files", "tags"),
    [
        ({"sidecar__yaml": "tags: [{tag: a, weight: 3}, b, a]"}, [("a", 3.0), ("b", 1.0)]),
        ({"sidecar__yaml": "tags: [a, b, {tag: a, weight: 3}]"}, [("a", 3.0), ("b", 1.0)]),
        ({"sidecar__yaml": "tags: [a, {tag: a, weight: 3}, {tag: a, weight: 2}]"}, [("a", 3.0)]),
        ({"sidecar__yaml": "tags: [{tag: a, weight: 3}]", "sidecar__json": '{"tags": ["a"]}'}, [("a", 3.0)]),
        ({"global__yaml": "tags: [{tag: a, weight: 3}]", "sidecar__txt": "x, a, b"}, [("a", 3.0), ("b", 1.0)]),
        ({"local__yaml": "tags: [{tag: a, weight: 3}]", "sidecar__yaml": "tags: [{tag: a, weight: 1}]"}, [("a", 1.0)]),
        ({"local__yaml": "tags: [{tag: a, weight: 3}]", "sidecar__yaml": "caption: 'x, a'"}, [("a", 3.0)]),
    ],
)
def test_an_explicit_weight_holds_whichever_copy_of_the_tag_has_it(tmp_path, files, tags):
    assert [tuple(tag) for tag in image(scan(tmp_path, **files)).caption.tags] == tags


def test_a_weight_of_the_folder_reaches_the_tag_of_a_file_name_and_of_every_alternative(tmp_path):
    Image.new("RGB", (48, 32)).save(tmp_path / "x, a_2.png")
    dataset = scan(tmp_path, local__yaml="tags: [{tag: a, weight: 3}]", sidecar__yaml="caption: ['x, b', 'y, a']")
    choices = [list(choice.tags) for i in range(2) for choice in dataset.image(i).caption.choices]
    assert choices == [[Tag("a", 3.0), Tag("b")], [Tag("a", 3.0)], [Tag("a", 3.0)]]


@pytest.mark.parametrize(
    ("text", "cause", "tags"),
    [
        ("tags: [{tag: a, weight: 2, note: x}]", "tags: a has an unknown key 'note'", [("a", 2.0)]),
        ("tags: [{tag: a, tag: b}]", "tags, b, tag: given twice; the last value is used", [("b", 1.0)]),
        ("tags: [b, {tag: a, weight: -1}]", "found -1; 0 (named last) is used", [("b", 1.0), ("a", 0.0)]),
        ("tags: [{tag: a, weight: heavy}]", "found heavy; 1 is used", [("a", 1.0)]),
        ("tags: [{tag: a, weight: .inf}]", "found .inf; 1 is used", [("a", 1.0)]),
        ("tags: [{tag: a, weight: [1]}]", "found a list; 1 is used", [("a", 1.0)]),
        ("tags: [a]\ntags: [c]", "tags: given twice; the last value is used", [("c", 1.0)]),
        ("caption: {tags: [{tag: a, weight: -2}]}", "found -2; 0 (named last) is used", [("a", 0.0)]),
    ],
)
@pytest.mark.parametrize("place", ["sidecar__yaml", "local__yaml", "global__yaml"])
def test_a_slip_in_a_tag_is_a_warning_and_the_image_is_used(tmp_path, parser, place, text, cause, tags):
    dataset = scan(tmp_path, **{place: text})
    assert [tuple(tag) for tag in image(dataset).caption.tags] == tags
    assert len(dataset.problems) == 1
    assert cause in dataset.problems[0].cause
    assert not dataset.problems[0].skipped


def test_of_a_name_given_twice_the_last_value_counts_in_json_too(tmp_path):
    dataset = scan(tmp_path, sidecar__json='{"multiply": 2, "multiply": 3}')
    assert image(dataset).multiply == 3.0
    assert [p.cause for p in dataset.problems] == ["multiply: given twice; the last value is used"]


@pytest.mark.parametrize("place", ["sidecar__yaml", "local__yaml", "global__yaml", "loss_scale__txt"])
def test_a_negative_loss_scale_works_with_a_warning_and_a_bound(tmp_path, place):
    text = "{}" if place == "loss_scale__txt" else "loss_scale: {}"
    dataset = scan(tmp_path, **{place: text.format("-0.25")})
    assert image(dataset).loss_scale == -0.25
    assert [(p.cause, p.skipped) for p in dataset.problems] == [
        ("loss_scale: -0.25 is negative, so the model unlearns these images", False)
    ]
    dataset = scan(tmp_path, **{place: text.format("-1.5")})
    assert len(dataset) == 0
    assert "a number from -1 to 1000000 is expected, found -1.5" in dataset.problems[0].cause


def test_main_prompts_after_the_first_are_reported(tmp_path):
    dataset = scan(tmp_path, sidecar__yaml="main_prompt: [one, two]")
    assert image(dataset).caption.text == "one"
    assert [str(problem).partition(": ")[2] for problem in dataset.problems] == [
        "main_prompt: of 2 texts only the first is used. Write them as a list under caption: one of them is then drawn "
        "for each use."
    ]
    assert scan(tmp_path, sidecar__yaml="main_prompt: [null, one]").problems == []
