"""What is wrong with files of a dataset."""

from __future__ import annotations

from dataclasses import dataclass

MASK_SUFFIX = ".mask.png"


@dataclass(frozen=True, slots=True)
class Problem:
    """A file that cannot be used, or is used, but not the way its settings suggest.

    Attributes:
        path: the file.
        cause: what is wrong with it, without a full stop.
        cure: what the person can do.
        skipped: it is excluded from training; else it is used, and this is a note.
    """

    path: str
    cause: str
    cure: str
    skipped: bool = True

    def __str__(self) -> str:
        return f"{self.path}: {self.cause}. {self.cure}"
