"""A path of a folder, by its name in it: `log_path = InFolder("train.log")` in a class that has a `folder`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, overload


class InFolder:
    """The path of a file or folder inside `self.folder`, whether it is there or not."""

    def __init__(self, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, owner: None, kind: type) -> InFolder: ...

    @overload
    def __get__(self, owner: Any, kind: type) -> Path: ...

    def __get__(self, owner: Any, kind: type) -> InFolder | Path:
        return self if owner is None else Path(owner.folder) / self.name
