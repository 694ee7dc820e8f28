"""What can be done to many captions at once, each a function from the text of a caption file to its new text.

A file may hold one caption a line; each is edited. `tagging.edit_captions` applies one of these to images, with a journal.
"""

from __future__ import annotations

import re

from everydream_kit.data.tagging import in_each_line, split_tags


def replace_text(text: str, find: str, by: str, *, whole_words: bool = False) -> str:
    """Replace every occurrence, whatever its case.

    Args:
        text: of a caption file.
        find: plain text, not a pattern.
        by: what stands there afterwards; empty takes it out, and a comma or space too many with it.
        whole_words: `cat` does not match in `category`.
    """
    if not find:
        return text
    pattern = re.escape(find)
    if whole_words:
        pattern = rf"(?<!\w){pattern}(?!\w)"
    return in_each_line(text, lambda line: _tidied(re.sub(pattern, lambda _: by, line, flags=re.IGNORECASE), line))


def put_before(text: str, words: str) -> str:
    """Put words before each caption, unless it begins with them. A comma belongs to the words, where one is wanted."""
    return in_each_line(
        text, lambda line: line if _has(line, words, line.startswith(words)) else _tidied(words + line, line)
    )


def put_after(text: str, words: str) -> str:
    """Put words after each caption, unless it ends with them."""
    return in_each_line(
        text, lambda line: line if _has(line, words, line.endswith(words)) else _tidied(line.rstrip() + words, line)
    )


def _has(line: str, words: str, is_there: bool) -> bool:
    """Whether a caption has these words at its end or beginning, or is nothing else."""
    return is_there or line.strip(" ,") == words.strip(" ,")


def add_trigger_word(text: str, word: str) -> str:
    """Make a word the beginning of each caption's main prompt, unless the caption holds it as a word already."""
    word = word.strip()
    if not word:
        return text
    held = re.compile(rf"(?<!\w){re.escape(word)}(?!\w)", re.IGNORECASE)
    return in_each_line(text, lambda line: line if held.search(line) else f"{word} {line.lstrip()}".rstrip())


def sort_tags(text: str) -> str:
    """Sort the tags of each caption, and keep one of each; the main prompt, up to the first comma, stays in front."""

    def edit(line: str) -> str:
        main, *tags = split_tags(line) or [""]
        return ", ".join([main, *sorted(_once([main, *tags])[1:], key=str.lower)])

    return in_each_line(text, edit)


def remove_duplicate_tags(text: str) -> str:
    """Keep the first of tags that are equal but for their case; the order stays."""
    return in_each_line(text, lambda line: ", ".join(_once(split_tags(line))))


def _once(tags: list[str]) -> list[str]:
    seen: dict[str, str] = {}
    for tag in tags:
        seen.setdefault(tag.lower(), tag)
    return list(seen.values())


def _tidied(line: str, before: str) -> str:
    """A caption without the empty tags and double spaces that an edit left; one that was untidy before keeps its form."""
    if line == before or before != ", ".join(split_tags(before)):
        return line
    return ", ".join(split_tags(line))
