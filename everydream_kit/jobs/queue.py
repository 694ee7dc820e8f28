"""A queue: several configs, trained one after the other by one detached process.

The queue's file holds the settings of each entry and what became of it; `python -m everydream_kit.jobs FILE` takes the
first queued entry until there is none. So entries are added, moved and removed while it works, by whoever can write
the file; a lock next to it keeps two writers apart.
"""

from __future__ import annotations

import contextlib
import json
import logging
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from everydream_kit.config import TrainConfig
from everydream_kit.errors import JobError
from everydream_kit.jobs.job import FINAL_STATES, Job, running_jobs, start
from everydream_kit.jobs.process import may_be_running, spawn, write_object
from everydream_kit.jobs.safe_python import module_command
from everydream_kit.locks import hold
from everydream_kit.runs import Status
from everydream_kit.settings import read_settings
from everydream_kit.strict_json import kind_of, read_json, read_small_object

logger = logging.getLogger(__name__)
Result = TypeVar("Result")
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
        """Its entries, in order. Raises: JobError if the file is broken."""
        entries: list[dict[str, Any]] = self._read()["entries"]
        return entries

    def is_alive(self) -> bool:
        """Whether a process works through it now."""
        return may_be_running(read_small_object(self.path.with_suffix(".job.json"))) is True

    def add(self, config: Config) -> str:
        """Put a config at the end; a running queue gets to it.

        Returns:
            The entry's id.

        Raises:
            ConfigError: the settings are wrong.
        """
        entry = new_entry(read_settings(config)[0])
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
            JobError: it is no longer queued, or is not there.
        """
        with self._edit() as plan:
            entries = plan["entries"]
            number = _find(entries, entry_id)
            if entries[number]["state"] != "waiting":
                raise JobError("Only queued entries can be moved.")
            waiting = [i for i, entry in enumerate(entries) if entry["state"] == "waiting"]
            place = waiting[min(len(waiting) - 1, max(0, waiting.index(number) + by))]
            entries.insert(place, entries.pop(number))

    def start(self, *, command: Sequence[str] | None = None, environment: Mapping[str, str] | None = None) -> None:
        """Work through the waiting entries, detached. A run that fails does not keep the next from starting.

        Args:
            command: what to run instead of the kit's own trainer; see `start`.
            environment: variables added to this process's.

        Raises:
            JobError: nothing is queued, or the queue is running already.
        """
        with hold(
            self.path.with_suffix(".starting"), f"{self.path}: another start is under way. Try again in a moment."
        ):
            if self.is_alive():
                raise JobError(f"{self.path}: this queue is running already.")
            with self._edit() as plan:
                _resolve(plan["entries"])
                if not any(entry["state"] == "waiting" for entry in plan["entries"]):
                    raise JobError("The queue is empty. Add settings first.")
                plan["command"] = list(command) if command else None
            self.path.with_suffix(".stop").unlink(missing_ok=True)
            process = spawn(
                module_command("everydream_kit.jobs", [str(self.path)]),
                self.path.with_suffix(".log"),
                environment,
                append=True,
            )
            write_object(self.path.with_suffix(".job.json"), process.to_json())

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
        busy = f"{self.path}: another process is changing this queue. Try again in a moment."
        with hold(self.path.with_suffix(".editing"), busy, wait_seconds=LOCK_WAIT_SECONDS):
            plan = self._read()
            yield plan
            write_object(self.path, plan)

    def _read(self) -> dict[str, Any]:
        """The plan; an empty one where there is no file yet. Raises: JobError if the file is broken."""
        plan = {"command": None, "entries": [], **read_json(self.path, error=JobError, missing={})}
        problem = _problem_of(plan)
        if problem:
            raise JobError(f"{self.path}: {problem}. Fix it, or delete the file to start a new queue.")
        return plan

    def _set(self, entry_id: str, **changes: Any) -> None:
        with self._edit() as plan, contextlib.suppress(JobError):
            plan["entries"][_find(plan["entries"], entry_id)].update(changes)

    def _take_next(self) -> dict[str, Any] | None:
        """The first waiting entry, which starts now; None where there is none, or the queue is to stop."""
        with self._edit() as plan:
            _resolve(plan["entries"])  # whatever else counts as active is left of a process that was killed
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
        JobError: there are none, or this queue is running already.
    """
    entries = [new_entry(read_settings(config)[0]) for config in configs]
    if not entries:
        raise JobError("An empty queue: give at least one config.")
    queue = Queue(Path(path).resolve())
    if queue.is_alive():
        raise JobError(f"{queue.path}: this queue is running already.")
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
    """Work through a queue file; the body of the queue's own process.

    While somebody edits the file into something broken, the queue waits; the run in progress is not disturbed.
    """
    queue = Queue(path)
    while (entry := _once_fixed(queue, queue._take_next)) is not None:
        values = entry_settings(entry)
        try:
            _wait_while(lambda: _is_busy(entry) and not queue._is_to_stop())
            if queue._is_to_stop():
                _note(queue, entry["id"], state="waiting")
                break
            job = start(values, command=entry["command"])
        except JobError as error:
            _note(queue, entry["id"], state="failed", message=str(error))
            continue
        _note(queue, entry["id"], state="running", run=str(job.folder))
        if queue._is_to_stop():  # it came while the process was being started
            with contextlib.suppress(JobError):
                job.stop()
        status = job.watch()
        _note(queue, entry["id"], state=status["state"], message=status.get("message", ""))


def _note(queue: Queue, entry_id: str, **changes: Any) -> None:
    _once_fixed(queue, lambda: queue._set(entry_id, **changes))


def _once_fixed(queue: Queue, use: Callable[[], Result]) -> Result:
    """Use the queue's file as soon as it can be read. What is wrong with it is logged once.

    Raises:
        JobError: it cannot be read, and the queue is to stop.
    """
    has_warned = False
    while True:
        try:
            return use()
        except JobError as problem:
            if queue._is_to_stop():
                raise
            if not has_warned:
                has_warned = True
                logger.warning("%s The queue waits until the file can be read again.", problem)
            time.sleep(POLL_SECONDS)


def _is_busy(entry: Mapping[str, Any]) -> bool:
    """Whether a run of the entry's project is in progress, started by somebody else."""
    return bool(running_jobs(entry["settings"]["logdir"], entry["settings"]["project_name"]))


def _wait_while(condition: Callable[[], bool]) -> None:
    while condition():
        time.sleep(POLL_SECONDS)


def _resolve(entries: list[dict[str, Any]]) -> None:
    """Say what became of entries whose queue was ended from outside."""
    for entry in entries:
        if entry["state"] in ACTIVE:
            status = Job(Path(entry["run"])).status() if entry["run"] else Status(state="waiting", alive=False)
            if not status["alive"]:
                entry["state"] = status["state"] if status["state"] in (*FINAL_STATES, "waiting") else "died"


def _find(entries: Sequence[Mapping[str, Any]], entry_id: str) -> int:
    for number, entry in enumerate(entries):
        if entry["id"] == entry_id:
            return number
    raise JobError("This entry is no longer in the queue.")


def _problem_of(plan: Mapping[str, Any]) -> str:
    """What is wrong with a queue's file that somebody edited; empty if nothing is."""
    if not isinstance(plan["entries"], list):
        return f"entries: holds {kind_of(plan['entries'])} where a list [...] is expected"
    command = plan["command"]
    if command is not None and not (isinstance(command, list) and all(isinstance(word, str) for word in command)):
        return "command: must be null or a list of texts"
    problems = ((number, _problem_of_entry(entry)) for number, entry in enumerate(plan["entries"], start=1))
    return next((f"entry {number}: {problem}" for number, problem in problems if problem), "")


def _problem_of_entry(entry: Any) -> str:
    if not isinstance(entry, dict):
        return f"holds {kind_of(entry)} where an object {{...}} is expected"
    for name in ("id", "state"):
        if not isinstance(entry.get(name), str):
            return f"{name} must be a text"
    settings = entry.get("settings")
    given = settings.get("given") if isinstance(settings, dict) else None
    if not isinstance(settings, dict) or not isinstance(given, list) or not set(map(str, given)) <= settings.keys():
        return 'settings must be an object whose list "given" names settings in it'
    if not isinstance(entry.get("run"), str | None):
        return "run must be null or the path of a run folder"
    return ""
