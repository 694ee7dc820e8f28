"""The field's words: retired ones stay out of names, comments, messages and docs.

The table below is the glossary's left column, as far as a pattern can tell a retired meaning from a good one. `draw`
stays for random numbers and charts, `card` for model cards, `whole` and `say` where they are plain English; reviews
look after those.
"""

import io
import re
import tokenize
from functools import cache
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
FOLDERS = ("everydream_kit", "scripts", "benchmarks", "recipes", "tests", "notebooks/src")
OTHERS = (
    *("setup.cfg", "ruff.toml", "colab_setup.sh", "scripts/check", "scripts/start_pod.sh", "Dockerfile", ".ci/run"),
    *(".github/workflows/*.yml", ".github/ISSUE_TEMPLATE/*.yml", "everydream_kit/panels/assets/*"),
    "everydream_kit/preflight/*.json",
)
"""Text that is neither Python nor Markdown, and that people read."""

NAME_PARTS = {
    "picture": "image",
    "pictures": "images",
    "foretell": "estimate",
    "foretold": "estimated",
    "forecast": "estimate",
    "mend": "fix",
    "mended": "fixed",
    "told": "reported",
    "errand": "background task",
    "chore": "background task",
    "chores": "background tasks",
    "remark": "note",
    "remarks": "notes",
    "newest": "latest",
    "money": "cost",
    "settle": "resolve",
    "settled": "resolved",
    "innermost": "unwrap",
    "rejoin": "sync_ranks",
    "beside": "next_to",
    "sheets": "grids",
    "licence": "license",
    "learnt": "learned",
    "centre": "center",
    "colour": "color",
    "grey": "gray",
}
"""Words of an identifier, split at underscores and capitals."""

PHRASES = {
    r"pictures?": "image; sample for what a model generates",
    r"foretell\w*|foretold|forecasts?": "estimate, predict",
    r"mend(s|ed)?": "fix",
    r"errands?|chores?": "background task",
    r"remarks?": "note, warning",
    r"newest": "latest",
    r"without a word": "silently; exited unexpectedly",
    r"(sets?|setting) (\w+ )?aside": "exclude",
    r"left out|leaves? out": "skip, exclude",
    r"beside": "next to, with, compared with",
    r"at work": "running, in use",
    r"go(es)? on|going on|went on": "continue",
    r"with what right": "where it comes from",
    r"how-manieth": "repeat index",
    r"kept back": "held out",
    r"tells?|telling|told": "log, report, say; distinguish",
    r"whole checkpoints?|whole or absent|when whole|not (a )?whole|(is|are|there) whole|no whole": "complete, atomic, full",
    r"(?<!style )(?<!contact )(?<!data )sheets?": "sample, sample grid",
    r"put(s|ting)? (\w+ )?together|tak(e|es|en|ing) (\w+ )?apart": "merge, gather; split, extract",
    r"what waits": "queued, pending; offloaded",
    r"how (it|they|\w+ \w+) stands?": "status, progress",
    r"step(s|ped)? out": "skip",
    r"(is|was) room": "available, fits",
    r"money": "cost",
    r"(is|are) there twice": "exact duplicates",
    r"not a number any more": "NaN or infinite",
    r"look again": "refresh, rescan",
    r"\w*(colour|licence|behaviour|recognis|neighbour|favour|labelled)\w*|learnt|grey|centre": "American spelling",
}
"""Phrases of comments, docstrings, messages and pages."""

ALLOWED = {
    "tests/unit/test_words.py": "the table itself",
    "recipes/embedded_base/vocabulary.py": "words of captions that the embedded model was trained with",
}
"""Files that are not read, and why."""

ALLOWED_LINES = (
    (r"[\"']num_pictures[\"']|[\"']picture_table[\"']", "keys of resume states; runs of before hold them"),
    (r"[\"']pictures[\"']", "key of events and tables of runs before, and folder names of tests"),
    (r"--licence|example\.org/licence", "a misspelled flag, an address"),
    (r"edk-unlabelled|picture-o", "a class of the style sheet, an icon of Font Awesome"),
    (r"set-aside-duplicates", "name of a `tidy` step that scripts use"),
    (r"names tell UIs", "a plain verb"),
    (
        r"\d+ sheets|sheets?(\.py|\b.*\b(DATA|draws|stage|package|go|size|shape|tall|reconstructions))",
        "contact sheets of recipes",
    ),
    (r"(?i:picture) \{number\}|startswith\(.(?i:picture)", "captions that tests train with"),
)
"""Lines that may hold a retired word, and why."""


def name_of(path):
    return path.relative_to(REPOSITORY).as_posix()


def is_read(path):
    return name_of(path) not in ALLOWED


SOURCES = sorted(path for folder in FOLDERS for path in (REPOSITORY / folder).rglob("*.py") if is_read(path))
TEXTS = sorted(path for pattern in OTHERS for path in REPOSITORY.glob(pattern))
PAGES = sorted(path for path in (*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").glob("*.md")) if is_read(path))


@cache
def retired_phrases():
    return re.compile(rf"\b({'|'.join(PHRASES)})\b", re.IGNORECASE)


def advice(phrase):
    return next(words for pattern, words in PHRASES.items() if re.fullmatch(pattern, phrase, re.IGNORECASE))


def parts_of(name):
    return [part.lower() for part in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", name)]


def is_allowed(line):
    return any(re.search(pattern, line) for pattern, _ in ALLOWED_LINES)


def retired_in(path, number, text, line):
    """Retired phrases of a piece of text that starts at a line; inline code is judged by its names alone."""
    found = []
    for match in retired_phrases().finditer(text):
        place = number + text[: match.start()].count("\n")
        around = text.splitlines()[text[: match.start()].count("\n")] if "\n" in text else line
        if not is_allowed(around):
            found.append(f"{name_of(path)}:{place}: {match[0]!r}; write: {advice(match[0])}")
    return found


def retired_in_code(path):
    """Retired names, and retired phrases of comments and strings."""
    source = path.read_text(encoding="utf-8")
    found = []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        number = token.start[0]
        if token.type == tokenize.NAME and not is_allowed(token.line):
            found += [
                f"{name_of(path)}:{number}: name {token.string!r}; write: {NAME_PARTS[part]}"
                for part in parts_of(token.string)
                if part in NAME_PARTS
            ]
        elif token.type in (tokenize.COMMENT, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", tokenize.COMMENT)):
            found += retired_in(path, number, token.string, token.line)
    return found


def test_code_uses_the_fields_words():
    assert not [place for path in SOURCES for place in retired_in_code(path)]


def retired_in_page(path):
    """Retired phrases, and retired parts of names."""
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        found += retired_in(path, number, line, line)
        if not is_allowed(line):
            names = re.findall(r"\b\w+_\w+\b", line)
            found += [
                f"{name_of(path)}:{number}: name {name!r}" for name in names if set(parts_of(name)) & set(NAME_PARTS)
            ]
    return found


@pytest.mark.parametrize("pattern", OTHERS)
def test_other_texts_are_found(pattern):
    assert list(REPOSITORY.glob(pattern))


def test_pages_and_other_texts_use_the_fields_words():
    assert not [place for path in [*PAGES, *TEXTS] for place in retired_in_page(path)]


def wide_prose(path):
    """Lines of prose above 100 columns; tables, code and addresses may be wider."""
    wide, in_code = [], False
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        in_code ^= line.lstrip().startswith("```")
        is_prose = not in_code and not re.match(r"\s*(\||<|!\[|#)|    ", line) and "://" not in line
        if is_prose and len(line) > 100 and " " in line.strip()[:90]:
            wide.append(f"{name_of(path)}:{number}")
    return wide


def test_prose_of_pages_is_at_most_100_columns_wide():
    assert not [place for path in PAGES for place in wide_prose(path)]


def test_there_is_something_to_read_and_the_exceptions_exist():
    assert SOURCES
    assert PAGES
    assert [name for name in ALLOWED if not (REPOSITORY / name).exists()] == []


def test_a_retired_word_is_found_and_named():
    path = REPOSITORY / "tests/unit/test_words.py"
    assert retired_in(path, 7, "one\nlies beside the Picture", "") == [
        f"{name_of(path)}:8: 'beside'; write: next to, with, compared with",
        f"{name_of(path)}:8: 'Picture'; write: image; sample for what a model generates",
    ]
    assert parts_of("_newestRun_ofErrand") == ["newest", "run", "of", "errand"]
    assert retired_in(path, 1, 'state["num_pictures"]', 'state["num_pictures"]') == []
