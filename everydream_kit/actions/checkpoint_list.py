"""The checkpoints of a project as they come: listed again and again, for a small share of the time.

A run folder on Drive takes a hundred times as long to look through as one on a local disk, so the time of the last look
decides when the next one is due.
"""

from __future__ import annotations

import time
from pathlib import Path

from everydream_kit.actions.project import Project
from everydream_kit.runs import Checkpoint

LOOKING_SHARE = 0.05
"""Of the time goes into looking at most."""


class CheckpointList:
    """What `Project.checkpoints` gave at the last look.

    Attributes:
        known: checkpoint folders, the latest run first, each run's latest first.
    """

    def __init__(self, project: Project) -> None:
        self._project = project
        self.known: list[Path] = []
        self._due_at = 0.0
        self.update()

    def update(self) -> bool:
        """Refresh if it is time. Returns whether the list has changed."""
        begin = time.monotonic()
        if begin < self._due_at:
            return False
        found = self._project.checkpoints()
        self._due_at = begin + (time.monotonic() - begin) / LOOKING_SHARE
        if found == self.known:
            return False
        self.known = found
        return True

    def label(self, checkpoint: Path) -> str:
        """Its name, with its run's where the project has several of this name."""
        same = [other for other in self.known if other.name == checkpoint.name]
        return checkpoint.name if len(same) < 2 else Checkpoint.at(checkpoint).label
