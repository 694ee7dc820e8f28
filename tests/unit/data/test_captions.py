"""Captions: reading, shuffling, cutting, choosing."""

from __future__ import annotations

from collections import Counter
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from everydream_kit import draws
from everydream_kit.data.captions import (
    Caption,
    Tag,
    caption_from_file_name,
    compose_caption,
    decode_caption,
    encode_caption,
    parse_caption,
    parse_caption_lines,
)

words = st.text("abcdefgh ", min_size=1, max_size=12).map(str.strip).filter(bool)
tags = st.lists(st.builds(Tag, words, st.sampled_from([0.5, 1.0, 3.0])), max_size=8)
captions = st.builds(Caption, words | st.just(""), tags.map(tuple), st.none() | st.integers(1, 60), st.just(()))


def compose(caption: Caption, address: int = 0, **settings) -> str:
    return compose_caption(caption, draws.generator(555, "caption", address), **settings)


@pytest.mark.parametrize(
    ("text", "main", "tags"),
    [
        ("a cat", "a cat", ()),
        ("a cat, red,  blue ", "a cat", ("red", "blue")),
        ("a cat\non a mat, red,\nblue\n", "a cat on a mat", ("red", "blue")),
        ("a cat,, red, red,", "a cat", ("red",)),
        (", red", "", ("red",)),
        ("", "", ()),
        ("  \n ", "", ()),
    ],
)
def test_a_text_is_main_prompt_and_tags(text, main, tags):
    caption = parse_caption(text)
    assert (caption.main_prompt, tuple(tag.text for tag in caption.tags)) == (main, tags)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a red car, at night_0012.jpg", "a red car, at night"),
        ("folder_1/sub/a cat.png", "a cat"),
        ("v1.5 logo_2.png", "v1.5 logo"),
        ("_0001.png", ""),
    ],
)
def test_a_file_name_is_a_caption_up_to_the_underscore(name, text):
    assert caption_from_file_name(name).text == text


@given(captions, st.integers(0, 10), st.booleans(), st.integers(0, 99))
def test_composing_keeps_the_main_prompt_the_kept_tags_and_the_multiset(caption, keep, shuffle, address):
    unlimited = Caption(caption.main_prompt, caption.tags)
    parts = compose(unlimited, address, shuffle=shuffle, keep_tags=keep).split(", ")
    expected = [part for part in (caption.main_prompt, *(tag.text for tag in caption.tags)) if part]
    fixed = (1 if caption.main_prompt else 0) + min(keep, len(caption.tags))
    assert [p for p in parts if p][:fixed] == expected[:fixed]
    assert Counter(p for p in parts if p) == Counter(expected)


@given(captions, st.booleans(), st.integers(0, 99))
def test_the_length_limit_drops_whole_tags_only(caption, shuffle, address):
    text = compose(caption, address, shuffle=shuffle)
    whole = compose(Caption(caption.main_prompt, caption.tags), address, shuffle=shuffle)
    assert whole.startswith(text)
    if caption.max_length is not None and text != caption.main_prompt:
        assert len(text) <= caption.max_length
    rest = whole[len(text) :].removeprefix(", ")
    if rest and caption.max_length is not None:  # the next tag would not have fitted
        assert len(text) + len(rest.split(", ")[0]) + (2 if text else 0) > caption.max_length


def test_a_limit_is_kept_to_the_letter():
    caption = Caption("a cat", (Tag("red"), Tag("blue"), Tag("big")), max_length=10)
    assert compose(caption) == "a cat, red"  # 10 letters
    assert compose(Caption("a cat", caption.tags, max_length=9)) == "a cat"


def test_unshuffled_captions_are_as_written_and_addresses_differ():
    caption = parse_caption("a cat, " + ", ".join(f"t{i}" for i in range(20)))
    assert compose(caption) == caption.text
    shuffled = {compose(caption, address, shuffle=True) for address in range(50)}
    assert len(shuffled) == 50
    assert compose(caption, 7, shuffle=True) == compose(caption, 7, shuffle=True)


def test_every_order_of_equal_tags_is_as_likely():
    caption = Caption("x", (Tag("a"), Tag("b"), Tag("c")))
    counts = Counter(compose(caption, address, shuffle=True) for address in range(3000))
    assert set(counts) == {", ".join(("x", *order)) for order in permutations("abc")}
    assert all(abs(count - 500) < 100 for count in counts.values())  # standard deviation 20


def test_a_heavier_tag_comes_first_in_proportion_to_its_weight():
    caption = Caption("x", (Tag("light", 1.0), Tag("heavy", 3.0)))
    first = Counter(compose(caption, address, shuffle=True).split(", ")[1] for address in range(3000))
    assert abs(first["heavy"] / 3000 - 3 / 4) < 0.04  # standard deviation 0.008


def test_one_of_several_captions_is_drawn():
    caption = parse_caption_lines("a cat, red\n\na photo of a cat\n an animal ")
    assert [choice.text for choice in caption.choices] == ["a cat, red", "a photo of a cat", "an animal"]
    drawn = Counter(compose(caption, address) for address in range(600))
    assert all(abs(drawn[choice.text] - 200) < 60 for choice in caption.choices)
    assert parse_caption_lines(" \n") == Caption()


@given(st.lists(st.builds(Caption, words, tags.map(tuple)), min_size=1, max_size=3))
def test_captions_come_back_from_the_table_as_they_went_in(choices):
    caption = Caption(choices[0].main_prompt, choices[0].tags, None, tuple(choices[1:]))
    assert decode_caption(encode_caption(caption)) == caption


def test_a_weight_of_zero_is_no_division_by_zero():
    caption = Caption("x", (Tag("never", 0.0), Tag("first", 1.0)))
    with np.errstate(all="raise"):
        assert compose(caption, shuffle=True) == "x, first, never"
