"""Text that somebody else wrote, made safe to show: names of files, captions, words of files and servers.

Terminals obey control characters, and marks of reading order make a line say something else than it holds. Both are shown
as escapes. What goes into HTML is escaped on top of that where HTML is made (`panels/style.py`, `export/model_card.py`).
"""

from __future__ import annotations

import logging
import re

_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")
"""C0, DEL, C1, line and paragraph separators, marks of reading order. Wide blanks and joiners are not among them: they are
part of many languages' names."""


def printable(text: str) -> str:
    """A name that can be logged, hashed and saved on one line: bytes that are no text, and controls, as escapes."""
    if text.isprintable():
        return text
    try:
        data = text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # half a character, as JSON can spell it; no file name holds one
        data = text.encode("utf-8", "backslashreplace")
    return _CONTROL.sub(_escape, data.decode("utf-8", "backslashreplace"))


def plain_lines(text: str) -> str:
    """A message of one line or several, with all controls but line breaks and tabs as escapes."""
    return _CONTROL.sub(lambda match: match[0] if match[0] in "\n\t" else _escape(match), text)


class PlainFormatter(logging.Formatter):
    """Log lines on which no message acts."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, as `plain_lines` shows it."""
        return plain_lines(super().format(record))


def _escape(match: re.Match[str]) -> str:
    return repr(match[0])[1:-1]
