"""What a preparation step does to files: said before (dry run), done whole or not at all, and undone on request.

Every step goes through `Changes`: new files are written beside their final name and renamed, an existing file is kept in
the journal before it is replaced, a moved one is noted before it moves. `undo` plays a journal backwards, also that of a
step that was interrupted.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from everydream_kit.data.dataset import Problem
from everydream_kit.errors import DataError


@dataclass(frozen=True, slots=True)
class Change:
    """One file that was, or would be, written or moved.

    Attributes:
        path: where it is afterwards.
        what: in words: "written", "moved here", "resized" ...
        source: where it came from, if elsewhere.
    """

    path: str
    what: str
    source: str | None = None


@dataclass(frozen=True)
class PrepReport:
    """What a preparation step did, or would do.

    Attributes:
        title: the step.
        dry_run: nothing was touched.
        changes: in order.
        problems: what was left alone, and why.
        journal: file that `undo` takes, where something existing was changed.
    """

    title: str
    dry_run: bool
    changes: list[Change] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    journal: Path | None = None

    @property
    def text(self) -> str:
        """For people: counts, then what was left alone."""
        counts = Counter(change.what for change in self.changes)
        would = "would be " if self.dry_run else ""
        lines = [f"{self.title}{' (dry run, nothing was touched)' if self.dry_run else ''}"]
        lines += [f"  {count} {would}{what}" for what, count in counts.most_common()] or ["  nothing to do"]
        lines += [f"  left alone: {problem}" for problem in self.problems]
        if self.journal is not None and not self.dry_run and self.changes:
            lines.append(f"  can be undone: undo({str(self.journal)!r})")
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.text


class Changes:
    """Does the changes of one step, or only lists them in a dry run."""

    def __init__(self, title: str, *, dry_run: bool, journal: Path | None = None) -> None:
        """Start a step.

        Args:
            title: the step, for the report.
            dry_run: list only.
            journal: where former contents are kept; needed by steps that replace or move existing files.
        """
        self.report = PrepReport(title, dry_run, journal=journal)

    def write(self, path: Path, content: bytes, what: str, source: Path | None = None) -> None:
        """Write a file; what it held before goes into the journal, where there is one."""
        self._list(path, what, source)
        if not self.report.dry_run:
            self._note("write", str(path), _encode(path.read_bytes()) if path.is_file() else None)
            write_whole(path, content)

    def copy(self, source: Path, target: Path, what: str = "copied") -> None:
        """Copy a file with its times."""
        self._list(target, what, source)
        if not self.report.dry_run:
            self._note("write", str(target), _encode(target.read_bytes()) if target.is_file() else None)
            target.parent.mkdir(parents=True, exist_ok=True)
            partial = target.with_name(f"{target.name}.partial")
            shutil.copy2(source, partial)
            os.replace(partial, target)

    def move(self, source: Path, target: Path, what: str = "moved") -> None:
        """Move a file.

        Raises:
            DataError: something of that name is there already.
        """
        self._list(target, what, source)
        if not self.report.dry_run:
            if target.exists():
                raise DataError(f"{target}: is there already, so {source} was not moved. Give another folder.")
            self._note("move", str(source), str(target))
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(source, target)

    def leave(self, path: str | Path, cause: str, cure: str) -> None:
        """Say why a file is left alone."""
        self.report.problems.append(Problem(str(path), cause, cure, skipped=False))

    def _list(self, path: Path, what: str, source: Path | None) -> None:
        self.report.changes.append(Change(str(path), what, None if source is None else str(source)))

    def _note(self, action: str, first: str, second: str | None) -> None:
        if self.report.journal is None:
            return
        self.report.journal.parent.mkdir(parents=True, exist_ok=True)
        with self.report.journal.open("a", encoding="utf-8") as file:
            file.write(json.dumps([action, first, second]) + "\n")


def undo(journal: str | Path, *, dry_run: bool = False) -> PrepReport:
    """Put everything back as it was before a step.

    Files that were written get their former contents or disappear, moved ones go home. The journal is then renamed to
    `….undone`.

    Args:
        journal: of the step's report.
        dry_run: list only.

    Raises:
        DataError: there is no such journal, or it is damaged.
    """
    journal = Path(journal)
    if not journal.is_file():
        raise DataError(f"{journal}: there is no such journal. A step's report names its own.")
    changes = Changes(f"Undo {journal.name}", dry_run=dry_run)
    try:
        steps = [json.loads(line) for line in journal.read_text(encoding="utf-8").splitlines() if line]
    except json.JSONDecodeError as error:
        raise DataError(f"{journal}: is not a journal of a preparation step ({error}).") from error
    for action, first, second in reversed(steps):
        if action == "move" and Path(second).exists():
            changes.move(Path(second), Path(first), "moved back")
        elif action == "write" and second is not None:
            changes.write(Path(first), base64.b64decode(second), "restored")
        elif action == "write":
            changes.report.changes.append(Change(first, "removed"))
            if not dry_run:
                Path(first).unlink(missing_ok=True)
    if not dry_run:
        os.replace(journal, journal.with_name(f"{journal.name}.undone"))
    return changes.report


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that it is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_bytes(content)
    os.replace(partial, path)


def _encode(content: bytes) -> str:
    return base64.b64encode(content).decode("ascii")
