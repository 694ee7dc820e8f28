"""A job: a training process and its run folder; start, watch, stop, kill, resume, and find it again.

`job.json` in the run folder says which process on which machine works on it. Whether that process is alive is always
asked of the operating system, never remembered.
"""

from __future__ import annotations

import contextlib
import math
import platform
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from everydream_kit.atomic import require_writable, write_atomic
from everydream_kit.config import TrainConfig
from everydream_kit.errors import ConfigError, JobError
from everydream_kit.jobs.process import (
    exit_code,
    find_process,
    may_be_running,
    reap,
    spawn,
    write_object,
)
from everydream_kit.jobs.safe_python import module_command
from everydream_kit.locks import hold, is_held
from everydream_kit.runs import ENDED_STATES, Action, RunFolder, Status, list_runs
from everydream_kit.runs.layout import RUN_FOLDER_VARIABLE
from everydream_kit.runs.run_folder import is_fresh
from everydream_kit.settings import give_again, read_settings

FINAL_STATES = (*ENDED_STATES, "died")
_KILLED = getattr(signal, "SIGKILL", 9)
"""Windows has no such name."""
UNDER_WAY = "{}: another start is under way. Try again in a moment."


@dataclass(frozen=True)
class Job:
    """A training process, known by its run folder. Cheap to make, holds nothing that the folder does not.

    Attributes:
        folder: the run folder.
    """

    folder: Path

    @property
    def run(self) -> RunFolder:
        """Its folder's reader."""
        return RunFolder(self.folder)

    @property
    def name(self) -> str:
        return self.folder.name

    def status(self) -> Status:
        """What the trainer last said, with `alive`, and with `state` corrected where the process is gone.

        `state` is one of starting, running, saving, sampling, validating, finished, stopped, failed, or `died`: the process
        ended without saying so (killed, out of memory, machine restarted). `message` then says what is known. `progress` is
        the share of a drawing or an encoding that is done, or None.
        """
        written = self.run.status()
        alive = self.is_alive()
        status: Status = {"state": "starting", "step": 0, "num_steps": None, "message": "", **written, "alive": alive}
        if not alive and status["state"] not in FINAL_STATES:
            status.update(self.run.status())  # its last words may have come between the two looks
            if status["state"] not in FINAL_STATES:
                status.update(self._last_words())
        return status

    def is_alive(self) -> bool:
        """Whether its process is there: known by boot, id and start, or, where it cannot be known, by its heartbeat.

        A heartbeat counts for a process on another machine. For one on this machine whose identity is not sure (a sandbox,
        another container) the lock on the run folder has to be held as well.
        """
        records = self._records()
        if any(may_be_running(record) for record in records):
            return True
        status = records[-1]
        if status.get("state") in FINAL_STATES or not is_fresh(status) or may_be_running(status) is False:
            return False
        return status.get("host", platform.node()) != platform.node() or is_held(self.run.lock_path)

    def stop(self, *, timeout_seconds: float | None = None) -> bool:
        """Ask the trainer to save and end. Returns whether it has ended within the time (None: do not wait).

        Raises:
            JobError: nothing is running.
        """
        self._require_alive("stop")
        asked_before = self.run.pending_action() == "stop"
        listens = self.run.status().get("state") in ("running", "saving", "sampling")
        process = self._find_process()
        if process is not None and not listens and not asked_before:
            # A trainer that still loads reads no requests yet. Never twice: a second signal ends it without saving.
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGTERM)
        self.request("stop")
        return self._wait(timeout_seconds or 0.0)

    def kill(self) -> None:
        """End the process and its children at once. What was not saved is lost; the latest checkpoint stays.

        Raises:
            JobError: nothing is running, or it runs on another machine.
        """
        self._require_alive("kill")
        process = self._find_process()
        if process is None:
            if not self.is_alive():  # it ended between the two looks
                return
            raise JobError(
                f"{self.folder}: this run is in progress, but its process is not known for certain from here (another "
                "machine or container). Ask it to stop instead, or end it there."
            )
        family = [*process.children(recursive=True), process]
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        psutil.wait_procs(family, timeout=10)
        reap()

    def request(self, action: Action) -> str:
        """Write a request (`stop`, `save`, `sample`) into `control.json`; the trainer reads it within one step.

        Returns:
            The request's id, as it comes back in the events.
        """
        if action not in ("stop", "save", "sample"):
            raise JobError(f"{action!r}: no such request; there are stop, save and sample.")
        return self.run.request(action)

    def watch(self, on_update: Callable[[Status], object] | None = None, *, interval_seconds: float = 0.5) -> Status:
        """Wait for the end, calling `on_update(status)` twice a second. An interrupt only detaches: the run continues.

        Returns:
            The last status.
        """
        status = self.status()
        with contextlib.suppress(KeyboardInterrupt):
            while True:
                if on_update is not None:
                    on_update(status)
                if not status["alive"]:
                    break
                time.sleep(interval_seconds)
                status = self.status()
        return status

    def wait(self, timeout_seconds: float = math.inf) -> Status:
        """Wait until the process has ended, for scripts; panels follow it by themselves. An interrupt only detaches.

        Returns:
            The last status; `alive` is true where the process has not ended within the time.
        """
        with contextlib.suppress(KeyboardInterrupt):
            self._wait(timeout_seconds)
        return self.status()

    def _last_words(self) -> Status:
        """State and message of a run whose process is gone without having said so."""
        code = exit_code(self.run.job_record())
        if self.run.pending_action() == "stop":  # before it could read the request
            return {"state": "stopped", "message": "Stopped before training began; nothing was saved."}
        cause = "The training process exited unexpectedly"
        if code is not None and code < 0:
            cause = f"The training process was ended by signal {-code}"
            if code == -_KILLED:
                cause += " (someone killed it, or the machine was out of memory)"
        tail = self.run.log_tail(1)
        cause += f"; the last line of its log: {tail[-1]}" if tail else "."
        return {"state": "died", "message": f"{cause} Resume continues from the latest checkpoint."}

    def _find_process(self) -> psutil.Process | None:
        return next(filter(None, map(find_process, self._records())), None)

    def _records(self) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        """Who works on it, as whoever started it wrote down, and as the trainer itself says."""
        return self.run.job_record(), self.run.status()

    def _require_alive(self, what: str) -> None:
        if not self.folder.is_dir():
            raise JobError(f"{self.folder}: there is no such run folder.")
        if not self.is_alive():
            raise JobError(f"{self.folder}: nothing to {what}: this run is not in progress.")

    def _wait(self, seconds: float) -> bool:
        end = time.monotonic() + seconds
        while self.is_alive():
            if time.monotonic() >= end:
                return False
            time.sleep(0.1)
        return True


def start(
    config: TrainConfig | Mapping[str, Any] | str | Path,
    *,
    allow_parallel: bool = False,
    command: Sequence[str] | None = None,
    environment: Mapping[str, str] | None = None,
) -> Job:
    """Start training detached, in a new run folder, and return at once.

    Args:
        config: a config, its settings as a mapping, or the path of a settings file; checked before anything starts.
        allow_parallel: start although a run of this project is in progress.
        command: what to run instead of the kit's own trainer; `{run}` stands for the run folder.
        environment: variables added to this process's (a Hub token from Colab's secrets, for instance).

    Raises:
        ConfigError: the settings are wrong.
        JobError: a run of the same project is in progress, or the process could not be started.
    """
    checked = read_settings(config)[0]
    logdir = Path(checked.logdir)
    require_writable(logdir, "logdir")
    with hold(logdir / f".{checked.project_name}.starting", UNDER_WAY.format(logdir)):
        running = running_jobs(logdir, checked.project_name)
        if running and not allow_parallel:
            raise JobError(
                f"{running[0].folder}: this project is being trained already. Stop that run first, or wait for it."
            )
        run = RunFolder(RunFolder.create(logdir, checked.project_name).folder.resolve())
        write_atomic(run.config_path, checked.to_json())
        arguments = command or module_command("everydream_kit", ["train", "--config", str(run.config_path)])
        return _launch(run, arguments, environment)


def resume(
    folder: str | Path,
    *,
    changes: Mapping[str, Any] | None = None,
    command: Sequence[str] | None = None,
    environment: Mapping[str, str] | None = None,
) -> Job:
    """Continue a run that was stopped or died, detached, from its latest checkpoint.

    Args:
        folder: of the run.
        changes: settings of a fetched run that a person gives again on this machine.
        command, environment: as `start`.

    Raises:
        ConfigError: a setting of a fetched run has to be given again.
        JobError: the run is still in progress, there is no such folder, nothing was saved yet, or the process could not
            be started.
    """
    folder = Path(folder).resolve()
    job = attach(folder)
    if command is None and not job.is_alive() and not job.run.checkpoints():
        raise JobError(
            f"{folder.name}: nothing was saved yet, so there is nothing to continue from. Start training instead."
        )
    left = give_again(folder, changes or {})
    if left:
        raise ConfigError(f"{', '.join(left)}: give only what {folder.name} requires; nothing else changes here.")
    with hold(job.run.starting_lock_path, UNDER_WAY.format(folder)):
        if job.is_alive():
            raise JobError(f"{folder}: this run is in progress already; attach to it instead of resuming it.")
        job.run.forget_session()  # an old request must not stop the new process at its first step
        arguments = command or module_command("everydream_kit", ["resume", "{run}"])
        return _launch(job.run, arguments, environment)


def attach(folder: str | Path) -> Job:
    """The job of a run folder, in progress or not, whoever started it.

    Raises:
        JobError: there is no run in this folder.
    """
    folder = Path(folder)
    run = RunFolder(folder)
    if not run.config_path.is_file() and not run.status_path.is_file():
        raise JobError(f"{folder}: not a run folder (neither config.json nor status.json is in it).")
    return Job(folder.resolve())


def find_jobs(logdir: str | Path, project_name: str | None = None) -> list[Job]:
    """Runs below a log folder, latest first; with a project name only that project's."""
    return [Job(run.folder.resolve()) for run in reversed(list_runs(logdir, project_name))]


def running_jobs(logdir: str | Path, project_name: str | None = None) -> list[Job]:
    """Those of `find_jobs` that are in progress."""
    return [job for job in find_jobs(logdir, project_name) if job.is_alive()]


def start_module(
    folder: str | Path, module: str, arguments: Sequence[str], *, environment: Mapping[str, str] | None = None
) -> Job:
    """Run `python -m module arguments` detached, with `folder` as its run folder: for drawing, exporting, uploading.

    Raises:
        JobError: the folder's process is still running, or it could not be started.
    """
    folder = Path(folder).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    job = Job(folder)
    if job.is_alive():
        raise JobError(f"{folder}: still running. Wait for it, or stop it.")
    job.run.forget_session()
    return _launch(job.run, module_command(module, arguments), environment, append=False)


def _launch(
    run: RunFolder, arguments: Sequence[str], environment: Mapping[str, str] | None, *, append: bool = True
) -> Job:
    command = [argument.replace("{run}", str(run.folder)) for argument in arguments]
    added = {RUN_FOLDER_VARIABLE: str(run.folder), **(environment or {})}
    process = spawn(command, run.log_path, added, append=append)
    write_object(run.job_path, {**process.to_json(), "command": command})
    return Job(run.folder)
