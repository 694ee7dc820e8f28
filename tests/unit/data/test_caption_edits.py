"""Editing many captions at once: each way on its own, and through the panel with its preview and undo."""

import pytest
from PIL import Image

from everydream_kit.data import caption_edits as edits
from everydream_kit.panels.bulk_edit import CAPTION_EDITS
from everydream_kit.panels.dataset_panel import DatasetPanel

EDITS = [
    (edits.replace_text, ("a Cat, cat, category", "cat", "dog"), "a dog, dog, dogegory"),
    (lambda *a: edits.replace_text(*a, whole_words=True), ("a cat, category", "cat", "dog"), "a dog, category"),
    (edits.replace_text, ("a cat, blurry, night", "blurry", ""), "a cat, night"),
    (edits.replace_text, ("a .* cat", ".*", r"\1 (red)"), r"a \1 (red) cat"),
    (edits.replace_text, ("a cat\n\na dog", "a ", "the "), "the cat\n\nthe dog"),
    (edits.replace_text, ("a cat", "", "x"), "a cat"),
    (edits.put_before, ("a cat", "photo of "), "photo of a cat"),
    (edits.put_before, ("photo of a cat", "photo of "), "photo of a cat"),
    (edits.put_before, ("", "sks, "), "sks"),
    (edits.put_after, ("a cat", ", by ada"), "a cat, by ada"),
    (edits.put_after, ("a cat\na dog", ", by ada"), "a cat, by ada\na dog, by ada"),
    (edits.add_trigger_word, ("a cat", "sks"), "sks a cat"),
    (edits.add_trigger_word, ("a SKS cat", "sks"), "a SKS cat"),
    (edits.add_trigger_word, ("asks a cat", "sks"), "sks asks a cat"),
    (edits.add_trigger_word, ("", " sks "), "sks"),
    (edits.sort_tags, ("a cat, tree, Night, tree, bag",), "a cat, bag, Night, tree"),
    (edits.sort_tags, ("zebra",), "zebra"),
    (edits.remove_duplicate_tags, ("a cat, tree, Tree, bag, a cat",), "a cat, tree, bag"),
]


@pytest.mark.parametrize(("edit", "given", "expected"), EDITS)
def test_a_caption_is_edited(edit, given, expected):
    assert edit(*given) == expected
    assert edit(expected, *given[1:]) == expected or edit is edits.replace_text, "again changes nothing"


@pytest.fixture
def panel(tmp_path):
    for name, text in (("a", "a cat, night, night"), ("b", "a dog, sky, Bag"), ("c", "")):
        (tmp_path / "jets" / "input").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 64)).save(tmp_path / "jets" / "input" / f"{name}.png")
        (tmp_path / "jets" / "input" / f"{name}.txt").write_text(text)
    return DatasetPanel(tmp_path / "jets")


def captions(panel):
    return [(panel.album.root / f"{name}.txt").read_text() for name in "abc"]


@pytest.mark.parametrize("name", CAPTION_EDITS)
def test_every_action_says_what_it_changes_does_it_and_is_undone_in_one_step(panel, name):
    before = captions(panel)
    panel.bulk.action.value = name
    panel.bulk.words.value, panel.bulk.by.value = "night", "day"
    panel.bulk.button.click()
    assert "Select images first" in panel.message.value
    panel.gallery.choose_found.click()
    assert "of 3 captions would change, such as: " in panel.bulk.preview.value
    would = int(panel.bulk.preview.value.split(">")[1].split()[0])
    panel.bulk.button.click()
    after = captions(panel)
    assert sum(x != y for x, y in zip(before, after, strict=True)) == would > 0
    assert f"{would} caption" in panel.message.value
    assert panel.undo_button.tooltip == f"Undo: {CAPTION_EDITS[name].title.lower()}"
    panel.undo_button.click()
    assert captions(panel) == before


def test_only_the_fields_that_an_action_needs_are_shown_and_required(panel):
    panel.gallery.choose_found.click()
    panel.bulk.action.value = "sort"
    assert panel.bulk.words.layout.display == panel.bulk.by.layout.display == "none"
    panel.bulk.action.value = "trigger"
    assert (panel.bulk.words.layout.display, panel.bulk.by.layout.display) == ("", "none")
    panel.bulk.button.click()
    assert "type the words first" in panel.message.value
