"""Commands in the pages are ones that work: each is read by the real parsers, and each script that is named exists."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from everydream_kit.cli import COMMANDS
from everydream_kit.cli.command import Parser
from everydream_kit.cli.training_commands import read_setting_flags
from everydream_kit.params import parameters

REPOSITORY = Path(__file__).parents[2]
RECORDS = ("CHANGELOG.md", "decisions.md", "differences.md", "experiments.md", "experiments-embedded-base.md")
"""What was done or changed at its time: names of then are right there."""
PAGES = [
    page
    for pattern in ("*.md", "docs/*.md", ".github/**/*.md")
    for page in REPOSITORY.glob(pattern)
    if page.name not in RECORDS
]
STARTS = re.compile(r"^[!$ ]*(?:\S*/)?(?:everydream|(?:accelerate launch|torchrun|python3?)\b.*? -m everydream_kit) ")
LOCAL_SCRIPT = re.compile(r"(?:^|[ /])((?:scripts|benchmarks|recipes)/[\w/.-]+\.(?:py|sh|txt))")
TALK = {"…", "...", "--help"}
"""Places for what the reader fills in, and the flag that ends every parser."""


def lines_of_code(page: Path) -> Iterator[str]:
    """Lines of indented blocks and of fenced ones for a shell, without comments, continuations joined; and code in prose."""
    text = page.read_text(encoding="utf-8")
    prose, *fences = re.split(r"^```", text, flags=re.MULTILINE)
    shells = [
        re.sub(r"^(bash|sh|text)?\n", "", block) for block in fences[::2] if re.match(r"(bash|sh|text)?\n", block)
    ]
    prose = "\n".join([prose, *fences[1::2]])
    indented = re.findall(r"^ {4,}(\S.*)$", prose, re.MULTILINE)
    for block in [*shells, "\n".join(indented)]:
        for line in re.sub(r"\\\n\s*", " ", block).splitlines():
            yield re.sub(r"(^|\s)#.*$", "", line).strip()
    for span in re.findall(r"`([^`\n]+)`", prose):
        yield span.strip()


def commands_of(page: Path) -> Iterator[list[str]]:
    """The words of each command of ours, from its name on."""
    for line in lines_of_code(page):
        for part in re.split(r"&&|\|\||[;|>]|(?<= )&$", line):
            start = STARTS.match(part.strip() + " ")
            words = shlex.split(part.strip()[start.end() - 1 :]) if start else []
            words = [
                word
                for word, before in zip(words, ["", *words], strict=False)
                if word not in TALK or before.startswith("--")
            ]
            if words and words[0] in COMMANDS and len(words) > 1:
                yield words


SHOWN = sorted(
    {
        (page.name, " ".join(map(shlex.quote, words)))
        for page in PAGES
        if page.name not in RECORDS
        for words in commands_of(page)
    }
)


def test_the_pages_show_commands_at_all() -> None:
    assert len(SHOWN) > 25
    assert {"train", "plan", "push", "resume", "merge", "export", "sample"} <= {line.split()[0] for _, line in SHOWN}


@pytest.mark.parametrize(("page", "line"), SHOWN)
def test_a_command_that_is_shown_is_understood(page: str, line: str) -> None:
    """Every flag is known, positional arguments are enough, and the values of settings are of their kind."""
    name, *words = shlex.split(line)
    parser = Parser(prog=name, allow_abbrev=False)
    COMMANDS[name].add_flags(parser)
    options, unknown = parser.parse_known_args(words)
    assert unknown == []
    flags = {flag for action in parser._actions for flag in action.option_strings}
    if {f"--{record.name}" for record in parameters()} - {"--logdir"} <= flags:
        read_setting_flags(options)


def scripts_of(page: Path) -> Iterator[tuple[str, list[str]]]:
    """The local scripts that a page runs, each with its flags."""
    for line in lines_of_code(page):
        found = LOCAL_SCRIPT.search(line)
        if found:
            yield found[1], re.findall(r"(?<=\s)(--[\w-]+)", line[found.end() :])


SCRIPTS = sorted({(name, *flags) for page in PAGES for name, flags in scripts_of(page)})


@pytest.mark.parametrize("words", SCRIPTS, ids=" ".join)
def test_a_script_that_is_shown_exists_and_has_the_flags(words: tuple[str, ...]) -> None:
    text = (REPOSITORY / words[0]).read_text(encoding="utf-8")
    assert [flag for flag in words[1:] if f'"{flag}"' not in text] == []


def cds_and_clones() -> Iterator[tuple[str, str]]:
    """Commands for a shell that take so many words, with their page."""
    for page in PAGES:
        for line in lines_of_code(page):
            for part in re.split(r"&&|;", line.lstrip("!$ ")):
                if re.match(r"(cd|git clone) ", part.strip()):
                    yield page.name, part.strip()


@pytest.mark.parametrize(("page", "line"), sorted(set(cds_and_clones())))
def test_lines_of_a_shell_were_not_joined(page: str, line: str) -> None:
    """A pass over the text once made one line of three commands: `cd` takes one word, `git clone` an address and a folder."""
    words = [word for word in shlex.split(line.removeprefix("git ")) if not word.startswith("-")]
    assert len(words) <= (2 if words[0] == "cd" else 3), f"{page}: {line}"
