"""What a command is: a summary, its flags, and what it runs. Which commands there are is not known here."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

EXIT_PROBLEM = 1
EXIT_USAGE = 2


@dataclass(frozen=True)
class Command:
    """A row of a table of commands.

    Attributes:
        summary: what it does, in a line.
        add_flags: gives its parser the flags.
        run: calls the library; returns an exit status, or None for 0.
        usage: first line of its help, where argparse's own would fill a page.
    """

    summary: str
    add_flags: Callable[[argparse.ArgumentParser], object]
    run: Callable[[argparse.Namespace], int | None]
    usage: str | None = None


class Parser(argparse.ArgumentParser):
    """argparse, whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """End with the message, without the usage."""
        self.exit(EXIT_USAGE, f"{self.prog}: {message}\n")
