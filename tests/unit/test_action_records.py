"""An action is a function: its signature and docstring become flags, controls and hints, and nothing repeats them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import ipywidgets as widgets
import pytest

import everydream_kit.generation
from everydream_kit.actions.action import Action, read_argument_docs, text_of
from everydream_kit.actions.table import ACTIONS, PUSH, SAMPLE, TIDY_STEPS
from everydream_kit.cli.action_commands import add_action_flags, run_action
from everydream_kit.cli.command import Parser
from everydream_kit.panels.action_controls import make_action_control

GIVEN: dict[str, Any] = {}


class Unknown:
    """A type that the functions' module does not know."""


def shade(
    source: str | Path,
    *,
    count: int = 3,
    color: Literal["red", "blue"] = "red",
    near: bool = True,
    dry_run: bool = False,
    cfgs: Sequence[float] = (1.0, 2.5),
    word: str | None = None,
    client: Unknown | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Path]:
    """Shade images.

    More about it.

    Args:
        source: where they are:
            a folder.
        count: how many.
        color, word: of the shade.
        near: those that are near, too.
        dry_run: only report.
        cfgs: scales.

    Raises:
        ValueError: never.
    """
    GIVEN.update(locals())
    if progress is not None:
        progress(1, 2)
    return [Path("a"), Path("b")]


@pytest.fixture
def action(monkeypatch: pytest.MonkeyPatch) -> Action:
    """`shade` as an action; the type of its client is not there when its signature is read, as a lazy import is not."""
    GIVEN.clear()
    monkeypatch.setattr(everydream_kit.generation, "shade", shade, raising=False)
    monkeypatch.delitem(globals(), "Unknown")
    return Action("shade images", "generation:shade", {"cfgs": "cfg"}, {"near": "exact"}, skip=("client",))


def parse(action: Action, *words: str) -> Any:
    parser = Parser(prog="shade", allow_abbrev=False)
    add_action_flags(action, parser)
    return parser.parse_args(words)


def test_what_is_not_given_is_left_to_the_function(action: Action, capsys: pytest.CaptureFixture[str]) -> None:
    run_action(action, parse(action, "here"))
    assert GIVEN.pop("progress") is not None
    assert GIVEN == {
        "source": "here",
        **{
            "count": 3,
            "color": "red",
            "near": True,
            "dry_run": False,
            "cfgs": (1.0, 2.5),
            "word": None,
            "client": None,
        },
    }
    assert capsys.readouterr().out == "a\nb\n"


def test_flags_arrive_as_the_values_that_the_signature_names(action: Action) -> None:
    words = "here --count 4 --color blue --exact --dry_run --cfg 1 2 --cfg 3 --word x"
    run_action(action, parse(action, *words.split()))
    del GIVEN["progress"], GIVEN["client"]
    assert GIVEN == {
        "source": "here",
        **{"count": 4, "color": "blue", "near": False, "dry_run": True, "cfgs": [1.0, 2.0, 3.0], "word": "x"},
    }


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ("", "required: source"),
        ("here --color green", "invalid choice: 'green'"),
        ("here --count many", "invalid int value"),
        ("here --near --exact", "not allowed with argument"),
        ("here --client x", "unrecognized arguments"),
        ("here --cfgs 1", "unrecognized arguments"),
    ],
)
def test_what_the_signature_does_not_allow_is_an_error(
    action: Action, words: str, problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse(action, *words.split())
    assert problem in capsys.readouterr().err


def test_the_help_is_the_docstring_with_the_defaults(action: Action, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(action, "--help")
    text = " ".join(capsys.readouterr().out.split())
    for words in ("where they are: a folder", "how many (default 3)", "scales; may be repeated (default 1.0 2.5)"):
        assert words in text
    assert text.count("of the shade") == 2
    assert action.description == "Shade images.\n\nMore about it."


def test_controls_have_the_default_the_choices_and_the_words_of_the_record(action: Action) -> None:
    how = action.arguments
    color = make_action_control(how["color"], "Color", "9em", titles={"red": "warm"})
    assert (color.options, color.value) == ((("warm", "red"), ("blue", "blue")), "red")
    near, word = (
        make_action_control(how["near"], "near", "9em"),
        make_action_control(how["word"], "Word", "9em", placeholder="x"),
    )
    assert (type(near), near.value, type(word), word.value) == (widgets.Checkbox, True, widgets.Text, "")
    assert make_action_control(how["cfgs"], "cfg", "9em").value == "1.0, 2.5"
    count = make_action_control(how["count"], "Count", "9em", min=1, max=9)
    assert (type(count), count.value, count.max) == (widgets.BoundedIntText, 3, 9)
    assert {getattr(one, "tooltip", None) or one.description_tooltip for one in (color, word)} == {"of the shade"}


@pytest.mark.parametrize("name", [*ACTIONS, *TIDY_STEPS])
def test_every_argument_of_every_action_is_explained(name: str) -> None:
    action = {**ACTIONS, **TIDY_STEPS}[name]
    assert [argument.name for argument in action.arguments.values() if not argument.help] == []
    assert {*action.flags, *action.opposites} <= action.arguments.keys()


def test_values_of_the_table_that_are_read_elsewhere_are_there() -> None:
    assert {"diffusers", "samples", "training"} <= set(PUSH.arguments["what"].choices)
    assert SAMPLE.arguments["cfgs"].many and SAMPLE.arguments["prompts"].required
    assert "token" not in PUSH.arguments


def test_entries_of_a_docstring_are_read_with_their_continuation() -> None:
    assert read_argument_docs("X.\n\nArgs:\n    a, b: one\n        two.\n    c: three.\n\nRaises:\n    E: four.") == {
        "a": "one two",
        "b": "one two",
        "c": "three",
    }
    assert read_argument_docs("X.") == {}


def test_a_report_is_printed_as_its_text() -> None:
    class Report:
        text = "all good"

    assert text_of(Report()) == "all good"
    assert text_of([Path("a"), Path("b")]) == "a\nb"
