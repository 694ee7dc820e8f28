"""Uploading checkpoints while training continues.

The trainer hands over each checkpoint as it is saved; a thread pushes it with its resume state, so that another machine
can continue. Nothing here raises into the training: what goes wrong becomes a warning, and the next checkpoint is tried
again. Only the latest waiting checkpoint is kept: a slow line falls behind by skipping, not by queueing.

A checkpoint may be pruned while it is on its way, so its files are held by hard links until it has arrived. Where the
disk has no hard links (some network drives), it is uploaded in place; if it is pruned then, that upload is given up.
"""

from __future__ import annotations

import logging
import os
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from everydream_kit.errors import ExportError, KitError
from everydream_kit.export.hub.push import push_to_hub
from everydream_kit.runs import Checkpoint

logger = logging.getLogger(__name__)
Kind = Literal["uploading", "uploaded", "warning"]
Report = Callable[[Kind, int, str], None]
"""Called with (kind, step, address or message), from the uploader's thread."""


@dataclass(frozen=True)
class _Pending:
    folder: Path
    step: int
    held: Path | None


class HubUploader:
    """Pushes every n-th checkpoint that it is given, and always the last.

    Args:
        repo_id: `me/jets`. `check_hub_access` before training says whether a push will be let in.
        every: n; None uploads only the last.
        private: of a repository that is created.
        report: called for uploads and warnings; by default the log.
        options: more arguments for `push_to_hub` (token, license, api, sleep ...).
    """

    def __init__(
        self, repo_id: str, every: int | None = 1, *, private: bool = True, report: Report | None = None, **options: Any
    ) -> None:
        self.repo_id = repo_id
        self.every = every
        self.report = report if report is not None else _log_report
        self.options = {"private": private, **options}
        self._lock = threading.Lock()
        self._waiting: _Pending | None = None
        self._thread: threading.Thread | None = None
        self._num_submitted = 0
        self._uploaded_step = -1

    def submit(self, folder: Path, step: int, *, last: bool = False) -> bool:
        """Hand over a complete checkpoint. Returns at once.

        Args:
            folder: the checkpoint, inside its run folder.
            step: optimizer steps done.
            last: upload it whatever `every` says.

        Returns:
            Whether it will be uploaded.
        """
        self._num_submitted += 1
        if not last and (self.every is None or self._num_submitted % self.every):
            return False
        waiting = _Pending(Path(folder), step, _hold(Path(folder)))
        with self._lock:
            skipped, self._waiting = self._waiting, waiting
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._work, name="hub-uploader", daemon=True)
                self._thread.start()
        if skipped is not None:
            _release(skipped)
            self.report(
                "warning", skipped.step, f"Upload of step {skipped.step} skipped: the line is slower than saving."
            )
        return True

    def close(self, timeout_seconds: float | None = None) -> bool:
        """Wait until what was handed over has arrived or failed.

        Args:
            timeout_seconds: give up after so long, with a warning; None waits as long as it takes.

        Returns:
            Whether nothing is under way any more.
        """
        thread = self._thread
        if thread is not None:
            thread.join(timeout_seconds)
            if thread.is_alive():
                self.report(
                    "warning",
                    self._uploaded_step,
                    f"The upload to {self.repo_id} is not finished after {timeout_seconds:.0f} s and was given up. "
                    f"The checkpoint is on this disk: everydream push RUN {self.repo_id}",
                )
                return False
        return True

    def _work(self) -> None:
        while True:
            with self._lock:
                job, self._waiting = self._waiting, None
                if job is None:
                    self._thread = None
                    return
            try:
                self._upload(job)
            finally:
                _release(job)

    def _upload(self, job: _Pending) -> None:
        started = time.monotonic()
        self.report("uploading", job.step, self.repo_id)
        try:
            url = self._push(job)
        except (KitError, OSError) as error:
            words = str(error).replace(str(job.held or job.folder), str(job.folder))
            self.report("warning", job.step, f"Upload of step {job.step} failed, training continues. {words}")
            return
        self._uploaded_step = job.step
        logger.info("Uploaded step %d to %s in %.0f s.", job.step, url, time.monotonic() - started)
        self.report("uploaded", job.step, url)

    def _push(self, job: _Pending) -> str:
        folder = job.held or job.folder
        resumable = Checkpoint.at(folder).resumable
        parts = ("diffusers", "samples", "training", *(("resume",) if resumable else ()))
        if not (folder / "model_index.json").is_file() and not any(folder.glob("*.safetensors")):
            raise ExportError(f"{job.folder} was pruned before its upload began.")
        message = f"Step {job.step} ({job.folder.name})"
        return push_to_hub(folder, self.repo_id, what=parts, message=message, **self.options)


def _log_report(kind: Kind, step: int, message: str) -> None:
    logger.log(logging.WARNING if kind == "warning" else logging.INFO, "step %d: %s: %s", step, kind, message)


def _hold(folder: Path) -> Path | None:
    """Hard links to a checkpoint's files, in a hidden folder of the same run and name; None where links do not work."""
    run = Checkpoint.at(folder).run
    if run is None:
        return None
    held = run.uploading_folder / folder.name
    try:
        shutil.rmtree(held, ignore_errors=True)
        shutil.copytree(folder, held, copy_function=os.link)
    except OSError:  # shutil.Error is one
        shutil.rmtree(held, ignore_errors=True)
        return None
    return held


def _release(job: _Pending) -> None:
    if job.held is not None:
        shutil.rmtree(job.held, ignore_errors=True)
