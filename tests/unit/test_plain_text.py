"""Names and messages of strangers on a terminal and in a log: nothing in them acts, and one line stays one."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from everydream_kit.cli import main
from everydream_kit.plain_text import PlainFormatter, plain_lines, printable

ACTING = {
    "clears the screen": "\x1b[2J",
    "sets the window's title": "\x1b]0;pwned\x07",
    "goes back over the line": "good\rbad",
    "erases letters": "ab\x08\x08",
    "C1 control": "\x9b2J",
    "a new line": "a\nERROR all is lost",
    "a new line of another kind": "a\u2028b\x85c",
    "reverses the order": "cod.\u202egnp.exe",
    "isolates": "\u2067evil\u2069",
    "DEL": "a\x7f",
    "NUL": "a\x00b",
    "half a character": "\ud800",
    "bytes that are no text": "caf\udce9",
}


@pytest.mark.parametrize("text", ACTING.values(), ids=ACTING)
def test_a_name_is_shown_on_one_line_and_does_nothing(text: str) -> None:
    shown = printable(text)
    assert shown.isprintable()
    assert len(shown.splitlines()) == 1
    assert all(word in shown for word in ("bad", "ERROR", "evil", "caf") if word in text)


@pytest.mark.parametrize(
    "text", ["plain", "日本\u3000語", "सा\u200dथ", "👩\u200d🚀", "a\u00a0b", "naïve", "\N{HEBREW LETTER ALEF}"]
)
def test_names_in_every_script_stay(text: str) -> None:
    assert printable(text) == plain_lines(text) == text


def test_a_message_keeps_its_lines_and_nothing_else_that_acts() -> None:
    assert plain_lines("a:\n\tb\x1b[0m\r\x9bc\u202e") == "a:\n\tb\\x1b[0m\\r\\x9bc\\u202e"


def test_a_log_line_is_plain_whatever_was_logged() -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(PlainFormatter("%(message)s"))
    record = logging.LogRecord("x", logging.WARNING, "", 0, "%s: %s", ("a\x1b[2J", "b\x9b"), None)
    handler.handle(record)
    assert stream.getvalue() == "a\\x1b[2J: b\\x9b\n"


@pytest.fixture
def hostile_folder(tmp_path: Path) -> Path:
    """Good and broken images whose names act on terminals."""
    folder = tmp_path / "images\x1b[5m"
    folder.mkdir()
    for number, text in enumerate(("\x1b[2J", "a\nERROR gone", "\x9b2J", "cod.\u202egnp", "goo\rbad")):
        Image.new("RGB", (32, 32)).save(folder / f"good {number} {text}.png")
        (folder / f"bad {number} {text}.png").write_bytes(b"no image")
    return folder


def words_for(folder: Path) -> Iterator[list[str]]:
    yield ["prepare", str(folder), "--resolution", "64"]
    yield ["prepare", str(folder / "none\x1b[2J")]
    yield [
        "train",
        "--resume_ckpt",
        "embedded",
        "--data_root",
        str(folder / "none\x1b[2J"),
        "--logdir",
        str(folder / "l"),
    ]
    yield ["train", "--config", str(folder / "none\x1b[2J.json")]
    yield ["export", str(folder / "none\x1b[2J"), str(folder / "out.safetensors")]
    yield ["resume", str(folder / "none\x1b[2J")]


def test_commands_show_hostile_names_as_text(hostile_folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for words in words_for(hostile_folder):
        main(words)
        shown = "".join(capfd.readouterr())
        assert shown
        assert plain_lines(shown) == shown, words
        assert "\nERROR" not in shown
