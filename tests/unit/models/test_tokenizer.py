"""The shipped vocabulary, and tokenizer folders for every version of transformers."""

import json
import logging

import pytest

from everydream_kit.errors import ModelError
from everydream_kit.models import tokenizer
from everydream_kit.models.tokenizer import build_tokenizer, clip_vocabulary, load_tokenizer, save_tokenizer
from everydream_kit.strict_json import read_json


def test_the_vocabulary_is_clips_own():
    vocabulary = clip_vocabulary()
    assert len(vocabulary) == 49408
    assert (vocabulary["<|startoftext|>"], vocabulary["<|endoftext|>"]) == (49406, 49407)
    assert vocabulary["cat</w>"] == 2368


def test_a_sentence_has_the_ids_that_openais_tokenizer_gives():
    ids = build_tokenizer()("hello world, a photo of a cat")["input_ids"]
    assert ids == [49406, 3306, 1002, 267, 320, 1125, 539, 320, 2368, 49407]


@pytest.mark.parametrize("pad_token", ["<|endoftext|>", "!"])
def test_a_saved_tokenizer_comes_back_the_same(tmp_path, pad_token):
    tokenizer = build_tokenizer(pad_token)
    save_tokenizer(tokenizer, tmp_path)
    again = load_tokenizer(tmp_path)
    texts = ["A Photo, of   a CAT!", "naïve café 🐱 it's", ""]
    settings = {"padding": "max_length", "max_length": 77, "truncation": True}
    assert again(texts, **settings)["input_ids"] == tokenizer(texts, **settings)["input_ids"]
    assert again.pad_token_id == (0 if pad_token == "!" else 49407)
    assert again.model_max_length == 77


def test_transformers_4_finds_its_files(tmp_path):
    save_tokenizer(build_tokenizer(), tmp_path)
    assert json.loads((tmp_path / "vocab.json").read_text(encoding="utf-8")) == clip_vocabulary()
    merges = (tmp_path / "merges.txt").read_text(encoding="utf-8").splitlines()
    assert merges[:2] == ["#version: 0.2", "i n"]
    assert len(merges) == 48895
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["tokenizer_class"] == "CLIPTokenizer"
    assert json.loads((tmp_path / "special_tokens_map.json").read_text())["bos_token"] == "<|startoftext|>"


def test_added_tokens_are_saved(tmp_path):
    tokenizer = build_tokenizer()
    tokenizer.add_tokens(["<my-cat>"])
    save_tokenizer(tokenizer, tmp_path)
    assert load_tokenizer(tmp_path)("a <my-cat>")["input_ids"] == [49406, 320, 49408, 49407]
    assert json.loads((tmp_path / "added_tokens.json").read_text()) == {"<my-cat>": 49408}


def test_a_folder_without_vocabulary_is_refused(tmp_path):
    with pytest.raises(ModelError, match="no tokenizer here"):
        load_tokenizer(tmp_path)


def test_a_vocabulary_is_read_once(tmp_path, monkeypatch):
    """Its 49,408 entries are most of what loading a tokenizer takes."""
    save_tokenizer(build_tokenizer(), tmp_path)
    read = []

    def noting(path, **options):
        read.append(path.name)
        return read_json(path, **options)

    monkeypatch.setattr(tokenizer, "read_json", noting)
    load_tokenizer(tmp_path)
    assert read.count("vocab.json") == 1


def test_a_text_beyond_the_window_gives_no_warning_of_the_library(tmp_path, caplog):
    save_tokenizer(build_tokenizer(), tmp_path)
    transformers = logging.getLogger("transformers")
    before, transformers.propagate = transformers.propagate, True
    try:
        for made in (build_tokenizer(), load_tokenizer(tmp_path)):
            assert len(made("cat " * 100, add_special_tokens=False)["input_ids"]) == 100
    finally:
        transformers.propagate = before
    assert "Token indices sequence length" not in caplog.text
