"""What is made from the declaration: flags, forms, the reference page."""

from __future__ import annotations

from pathlib import Path

import pytest

from everydream_kit.config import TrainConfig
from everydream_kit.errors import ConfigError
from everydream_kit.params import check_value, format_value, parameter, parameters, parse_text, reference_page

ROOT = Path(__file__).resolve().parents[2]


def test_every_parameter_is_listed_once_with_help_and_group() -> None:
    names = [record.name for record in parameters()]
    assert sorted(names) == sorted(TrainConfig.model_fields)
    assert all(record.help and record.group and record.knob.when for record in parameters())
    assert sum(record.knob.basic for record in parameters()) > 10


def test_the_reference_page_is_what_the_declaration_says() -> None:
    assert (ROOT / "docs" / "parameters.md").read_text("utf-8") == reference_page()


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("lr", "1e-5", 1e-5),
        ("resolution", "512", 512),
        ("resolution", ["512", "768"], [512, 768]),
        ("batch_size", "auto", "auto"),
        ("shuffle_tags", "on", True),
        ("shuffle_tags", "false", False),
        ("clip_grad_norm", "none", None),
        ("data_root", "pictures", "pictures"),
        ("data_root", ["a", "b"], ["a", "b"]),
        ("data_root", "[x", "[x"),
        ("lora_targets", '["[qk]_proj"]', ["[qk]_proj"]),
        ("data_root", '{"resolver": "multi"}', {"resolver": "multi"}),
        ("plugins", ["a.B"], ["a.B"]),
        ("new_tokens", '{"<cat>": "cat"}', {"<cat>": "cat"}),
        ("betas", ["0.9", "0.99"], [0.9, 0.99]),
        ("text_encoder_betas", ["0.9"], [0.9]),
        ("sample_cfgs", ["1", "4.5"], [1.0, 4.5]),
        ("betas", "[0.9, 0.99]", [0.9, 0.99]),
        ("seed", "-1", -1),
        ("optimizer_config", "optimizer.json", "optimizer.json"),
    ],
)
def test_typed_text_becomes_the_value_that_is_meant(name: str, text: str | list[str], value: object) -> None:
    assert parse_text(name, text) == value


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("lr", "fast", "lr: must be a number"),
        ("batch_size", "many", "batch_size: must be a whole number or auto"),
        ("shuffle_tags", "maybe", "shuffle_tags: must be on or off"),
        (
            "new_tokens",
            "{",
            "new_tokens, line 1, column 2: not valid JSON.*quotes, without a comma after the last one.$",
        ),
        ("lora_targets", "[qk]_proj", r'one that begins with a bracket in a JSON list: \["\[qk\]_proj"\]$'),
        ("betas", "[0.9", "before this place.$"),
        ("betas", ["0.9,0.99"], r"^betas: must be a number \(got '0.9,0.99'\); several are given with spaces between$"),
        (
            "resolution",
            "128,192",
            r"^resolution: must be a whole number \(got '128,192'\); several are given with spaces",
        ),
    ],
)
def test_text_that_cannot_be_read_is_named(name: str, text: str | list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse_text(name, text)


def test_one_value_is_checked_by_itself_as_a_form_does() -> None:
    assert check_value("lr", 1e-5) is None
    assert check_value("lr", -1.0) == "must be greater than 0 (got -1.0)"
    assert check_value("resume_ckpt", "x") is None


def test_ranges_are_said_in_words() -> None:
    assert parameter("lr").range_text == "above 0 to 100"
    assert parameter("resolution").range_text == "from 64 to 2048 in steps of 8"
    assert parameter("loss_type").range_text == "mse, huber, mse_huber, huber_mse"
    assert (format_value(1e-6), format_value(None), format_value(True), format_value(0.25)) == (
        "1e-6",
        "none",
        "on",
        "0.25",
    )
