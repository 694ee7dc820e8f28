"""A background task of a panel: started, polled at each beat of the clock, gone when it has finished."""

from __future__ import annotations

import contextlib
from pathlib import Path

from everydream_kit import jobs
from everydream_kit.errors import JobError
from everydream_kit.runs import Status


class BackgroundTask:
    """One background task at a time, in a process of its own. No widgets here.

    Attributes:
        folder: its log and status; a background task of its own kind has a folder of its own.
        job: the process, until `poll` has reported its end; also one that another panel has started.
    """

    def __init__(self, folder: Path, environment: dict[str, str] | None = None) -> None:
        self.folder = folder
        self._environment = environment
        self.job: jobs.Job | None = None
        self.attach()

    def attach(self) -> bool:
        """Follow the folder's background task if one is running, whoever started it. Returns whether one is."""
        job = jobs.Job(self.folder)
        if self.job is None and job.is_alive():
            self.job = job
        return self.job is not None

    def begin(self, task: str, *arguments: str) -> None:
        """Start a background task.

        Raises:
            JobError: the last one is still running, or the process cannot be started.
        """
        self.job = jobs.start_module(
            self.folder,
            "everydream_kit.actions.background",
            [task, str(self.folder), *arguments],
            environment=self._environment,
        )

    def stop(self) -> None:
        """End the background task; what it has written stays."""
        if self.job is not None:
            with contextlib.suppress(JobError):  # it ended at this very moment
                self.job.kill()

    def poll(self) -> Status | None:
        """Status; None where nothing is under way. The status with `alive` false comes once."""
        if self.job is None:
            return None
        status = self.job.status()
        if not status["alive"]:
            self.job = None
        return status
