"""A queue: several configs, trained one after the other by one detached process.

The queue's file holds the settings of each entry and what became of it; `python -m everydream_kit.jobs FILE` takes the
first waiting entry until there is none. So entries are added, moved and removed while it works, by whoever can write the
file; a lock beside it keeps two writers apart.
"""

from __future__ import annotations

import contextlib
import json
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from everydream_kit.config import TrainConfig
from everydream_kit.errors import JobError
from everydream_kit.jobs.job import FINAL_STATES, Job, as_config, running_jobs, start
from everydream_kit.jobs.process import find_process, identify, read_object, spawn, start_lock, write_object
from everydream_kit.jobs.safe_python import module_command

Config = TrainConfig | Mapping[str, Any] | str | Path
LOCK_WAIT_SECONDS = 5.0
POLL_SECONDS = 0.5
ACTIVE = ("starting", "running")
"""States of an entry that is being worked on."""


@dataclass(frozen=True)
class Queue:
    """Several configs, trained one after the other by a detached process.

    Attributes:
        path: the queue's file: of each entry its id, settings, run folder and state: waiting, starting, running, or how
            it ended.
    """

    path: Path

    @property
    def entries(self) -> list[dict[str, Any]]:
        return list(read_object(self.path).get("entries", []))

    def is_alive(self) -> bool:
        """Whether a process works through it now."""
        record = read_object(self.path.with_suffix(".job.json"))
        return bool(record.get("pid")) and find_process(record["pid"], record.get("start_time")) is not None

    def add(self, config: Config) -> str:
        """Put a config at the end; a queue at work comes to it.

        Returns:
            The entry's id.

        Raises:
            ConfigError: the settings are wrong.
        """
        entry = new_entry(as_config(config))
        with self._edit() as plan:
            plan["entries"].append(entry)
        return str(entry["id"])

    def remove(self, entry_id: str) -> None:
        """Take an entry out. The run in progress is stopped, not removed.

        Raises:
            JobError: it is being trained, or is not there.
        """
        with self._edit() as plan:
            number = _find(plan["entries"], entry_id)
            if plan["entries"][number]["state"] in ACTIVE:
                raise JobError("This entry is being trained. Stop the run first.")
            del plan["entries"][number]

    def move(self, entry_id: str, by: int) -> None:
        """Move a waiting entry among the waiting ones: -1 is one place earlier.

        Raises:
            JobError: it does not wait any more, or is not there.
        """
        with self._edit() as plan:
            entries = plan["entries"]
            number = _find(entries, entry_id)
            if entries[number]["state"] != "waiting":
                raise JobError("Only waiting entries can be moved.")
            waiting = [i for i, entry in enumerate(entries) if entry["state"] == "waiting"]
            place = waiting[min(len(waiting) - 1, max(0, waiting.index(number) + by))]
            entries.insert(place, entries.pop(number))

    def start(self, *, command: Sequence[str] | None = None, environment: Mapping[str, str] | None = None) -> None:
        """Work through the waiting entries, detached. A run that fails does not keep the next from starting.

        Args:
            command: what to run instead of the kit's own trainer; see `start`.
            environment: variables added to this process's.

        Raises:
            JobError: nothing waits, or the queue is at work already.
        """
        with start_lock(self.path.with_suffix(".starting")):
            if self.is_alive():
                raise JobError(f"{self.path}: this queue is at work already.")
            with self._edit() as plan:
                _settle(plan["entries"])
                if not any(entry["state"] == "waiting" for entry in plan["entries"]):
                    raise JobError("Nothing waits in the queue. Add settings first.")
                plan["command"] = list(command) if command else None
            self.path.with_suffix(".stop").unlink(missing_ok=True)
            process = spawn(
                module_command("everydream_kit.jobs", [str(self.path)]),
                self.path.with_suffix(".log"),
                environment,
                append=True,
            )
            write_object(self.path.with_suffix(".job.json"), identify(process.pid))

    def stop(self) -> None:
        """Stop the run in progress (it saves) and start no further one."""
        self.path.with_suffix(".stop").touch()
        for entry in self.entries:
            if entry["state"] == "running" and entry.get("run"):
                with contextlib.suppress(JobError):  # it may end at this very moment
                    Job(Path(entry["run"])).stop()

    @contextlib.contextmanager
    def _edit(self) -> Iterator[dict[str, Any]]:
        """The plan, to be changed; written back when the block ends well."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with _patiently(self.path.with_suffix(".editing")):
            plan = {"command": None, "entries": [], **read_object(self.path)}
            yield plan
            write_object(self.path, plan)

    def _set(self, entry_id: str, **changes: Any) -> None:
        with self._edit() as plan, contextlib.suppress(JobError):
            plan["entries"][_find(plan["entries"], entry_id)].update(changes)

    def _take_next(self) -> dict[str, Any] | None:
        """The first waiting entry, which starts now; None where there is none, or the queue is to stop."""
        with self._edit() as plan:
            _settle(plan["entries"])  # whatever else counts as active is left of a process that was killed
            for entry in plan["entries"]:
                if entry["state"] == "waiting" and not self._is_to_stop():
                    entry["state"] = "starting"
                    return {**entry, "command": plan["command"]}
        return None

    def _is_to_stop(self) -> bool:
        return self.path.with_suffix(".stop").exists()


def start_queue(
    configs: Sequence[Config],
    path: str | Path,
    *,
    command: Sequence[str] | None = None,
    environment: Mapping[str, str] | None = None,
) -> Queue:
    """Train several configs one after the other, detached. All are checked before the first one starts.

    What the queue's file held before is replaced.

    Raises:
        ConfigError: one of the settings is wrong.
        JobError: there are none, or this queue is at work already.
    """
    entries = [new_entry(as_config(config)) for config in configs]
    if not entries:
        raise JobError("An empty queue: give at least one config.")
    queue = Queue(Path(path).resolve())
    if queue.is_alive():
        raise JobError(f"{queue.path}: this queue is at work already.")
    with queue._edit() as plan:
        plan["entries"] = entries
    queue.start(command=command, environment=environment)
    return queue


def new_entry(config: TrainConfig) -> dict[str, Any]:
    """A waiting entry of a queue's file."""
    return {
        "id": uuid.uuid4().hex[:8],
        "settings": json.loads(config.to_json()),
        "state": "waiting",
        "run": None,
        "message": "",
    }


def entry_settings(entry: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that were given for an entry, without the defaults."""
    return {name: entry["settings"][name] for name in entry["settings"]["given"]}


def run_queue(path: Path) -> None:
    """Work through a queue file; the body of the queue's own process."""
    queue = Queue(path)
    while (entry := queue._take_next()) is not None:
        values = entry_settings(entry)
        try:
            _wait_while(lambda: _is_busy(entry) and not queue._is_to_stop())
            if queue._is_to_stop():
                queue._set(entry["id"], state="waiting")
                break
            job = start(values, command=entry["command"])
        except JobError as error:
            queue._set(entry["id"], state="failed", message=str(error))
            continue
        queue._set(entry["id"], state="running", run=str(job.folder))
        if queue._is_to_stop():  # it came while the process was being started
            with contextlib.suppress(JobError):
                job.stop()
        status = job.watch()
        queue._set(entry["id"], state=status["state"], message=status.get("message", ""))


def _is_busy(entry: Mapping[str, Any]) -> bool:
    """Whether a run of the entry's project is in progress, started by somebody else."""
    return bool(running_jobs(entry["settings"]["logdir"], entry["settings"]["project_name"]))


def _wait_while(condition: Callable[[], bool]) -> None:
    while condition():
        time.sleep(POLL_SECONDS)


def _settle(entries: list[dict[str, Any]]) -> None:
    """Say what became of entries whose queue was ended from outside."""
    for entry in entries:
        if entry["state"] in ACTIVE:
            status = Job(Path(entry["run"])).status() if entry["run"] else {"state": "waiting", "alive": False}
            if not status["alive"]:
                entry["state"] = status["state"] if status["state"] in (*FINAL_STATES, "waiting") else "died"


def _find(entries: Sequence[Mapping[str, Any]], entry_id: str) -> int:
    for number, entry in enumerate(entries):
        if entry["id"] == entry_id:
            return number
    raise JobError("This entry is not in the queue any more.")


@contextlib.contextmanager
def _patiently(path: Path) -> Iterator[None]:
    """Hold a lock file, waiting for whoever holds it now."""
    end = time.monotonic() + LOCK_WAIT_SECONDS
    with contextlib.ExitStack() as stack:
        while True:
            try:
                stack.enter_context(start_lock(path))
                break
            except JobError:
                if time.monotonic() >= end:
                    raise
                time.sleep(0.02)
        yield
