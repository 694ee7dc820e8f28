"""A queue: several configs, trained one after the other by one detached process.

The queue's file holds the settings of each entry and what became of it; `python -m everydream_kit.jobs FILE` works
through it.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from everydream_kit.config import TrainConfig
from everydream_kit.errors import JobError
from everydream_kit.jobs.job import Job, as_config, start
from everydream_kit.jobs.process import find_process, identify, read_object, spawn, start_lock, write_object


@dataclass(frozen=True)
class Queue:
    """Several configs, trained one after the other by a detached process.

    Attributes:
        path: the queue's file: of each entry its settings, run folder and state (waiting, running, or how it ended).
    """

    path: Path

    @property
    def entries(self) -> list[dict[str, Any]]:
        return list(read_object(self.path).get("entries", []))

    def is_alive(self) -> bool:
        record = read_object(self.path.with_suffix(".job.json"))
        return bool(record.get("pid")) and find_process(record["pid"], record.get("start_time")) is not None

    def stop(self) -> None:
        """Stop the run in progress (it saves) and start no further one."""
        self.path.with_suffix(".stop").touch()
        for entry in self.entries:
            if entry["state"] == "running" and entry.get("run"):
                with contextlib.suppress(JobError):  # it may end at this very moment
                    Job(Path(entry["run"])).stop()


def start_queue(
    configs: Sequence[TrainConfig | Mapping[str, Any] | str | Path],
    path: str | Path,
    *,
    command: Sequence[str] | None = None,
    environment: Mapping[str, str] | None = None,
) -> Queue:
    """Train several configs one after the other, detached. All are checked before the first one starts.

    A run that fails does not keep the next from starting.

    Raises:
        ConfigError: one of the settings is wrong.
        JobError: there are none, or this queue is at work already.
    """
    checked = [as_config(config) for config in configs]
    if not checked:
        raise JobError("An empty queue: give at least one config.")
    path = Path(path).resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    queue = Queue(path)
    with start_lock(path.with_suffix(".starting")):
        if queue.is_alive():
            raise JobError(f"{path}: this queue is at work already.")
        path.with_suffix(".stop").unlink(missing_ok=True)
        entries = [{"settings": json.loads(config.to_json()), "state": "waiting", "run": None} for config in checked]
        write_object(path, {"entries": entries, "command": list(command) if command else None})
        process = spawn(
            [sys.executable, "-m", "everydream_kit.jobs", str(path)],
            path.with_suffix(".log"),
            environment,
            append=True,
        )
        write_object(path.with_suffix(".job.json"), identify(process.pid))
    return queue


def run_queue(path: Path) -> None:
    """Work through a queue file; the body of the queue's own process."""
    queue = Queue(path)
    plan = read_object(path)
    for number, entry in enumerate(plan["entries"]):
        if path.with_suffix(".stop").exists():
            break
        values = {name: entry["settings"][name] for name in entry["settings"]["given"]}
        try:
            job = start(values, command=plan["command"])
        except JobError as error:
            _set_entry(queue, number, state="failed", message=str(error))
            continue
        _set_entry(queue, number, state="running", run=str(job.folder))
        status = job.watch()
        _set_entry(queue, number, state=status["state"], message=status.get("message", ""))


def _set_entry(queue: Queue, number: int, **changes: Any) -> None:
    plan = read_object(queue.path)
    plan["entries"][number].update(changes)
    write_object(queue.path, plan)
