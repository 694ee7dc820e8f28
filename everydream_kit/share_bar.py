"""A bar on the terminal for work that takes a while inside one call, such as sampling."""

from __future__ import annotations

import os
from typing import Any

FORM = "{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"


class ShareBar:
    """Shows how much is done, and goes when it has ended. Where stderr is not a terminal it shows nothing."""

    def __init__(self, what: str) -> None:
        from tqdm import tqdm

        self._bar: Any = tqdm(
            total=1.0, desc=what, leave=False, bar_format=FORM, mininterval=0, disable=not os.isatty(2)
        )

    def __enter__(self) -> ShareBar:
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    def show(self, done: float, total: float) -> None:
        """Show this much of the total as done."""
        self._bar.update(done / total - self._bar.n)
