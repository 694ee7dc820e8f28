"""Detached processes: starting one, recognizing it later, and the small files that say which it was.

A process is known by boot, id and start (`identity`): ids are used again, and clocks move. Without a sure identity
nothing is signalled. Not here: what the processes do.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from everydream_kit.atomic import write_atomic
from everydream_kit.errors import JobError
from everydream_kit.hosts import count_cores
from everydream_kit.identity import Process, identify, is_running
from everydream_kit.jobs.safe_python import safe_environment

THREADS_VARIABLE = "OMP_NUM_THREADS"
"""torch's threads spin while they wait for each other: one that shares its core with the notebook and its page holds up all
of them. So detached processes leave one core to whoever started them, unless the variable says otherwise."""

_children: dict[Process, subprocess.Popen[bytes]] = {}
"""Processes started by this interpreter, kept so that they can be reaped when they end."""

_exit_codes: dict[Process, int] = {}


def spawn(command: Sequence[str], log: Path, environment: Mapping[str, str] | None, *, append: bool) -> Process:
    """Start a detached process in a session of its own, with its output in a file.

    Raises:
        JobError: the command cannot be started.
    """
    reap()
    given = {**os.environ, "PYTHONUNBUFFERED": "1", **(environment or {})}
    variables = safe_environment({THREADS_VARIABLE: str(max(1, count_cores() - 1)), **given})
    try:
        with log.open("ab" if append else "wb") as output:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=variables, start_new_session=True
            )
    except OSError as error:
        raise JobError(f"{command[0]}: could not be started: {error}") from error
    known = identify(process.pid)
    _children[known] = process
    return known


def find_process(record: Mapping[str, Any]) -> psutil.Process | None:
    """The living process that a record names, ready to be signalled; None where there is none, or none for certain."""
    reap()
    known = Process.from_json(record)
    if known is None or not is_running(known):
        return None
    try:
        process = psutil.Process(known.pid)  # from here on psutil itself sees to it that the id is not used again
    except psutil.NoSuchProcess:
        return None
    return process if is_running(known) else None


def may_be_running(record: Mapping[str, Any]) -> bool | None:
    """Whether the process of a record is there: True, False, or None where nobody can know that from here."""
    reap()
    known = Process.from_json(record)
    return False if known is None else is_running(known)


def reap() -> None:
    """Collect those of our processes that have ended, so that they do not stay as zombies."""
    for known, process in list(_children.items()):
        if process.poll() is not None:
            _exit_codes[known] = process.returncode
            del _children[known]


def exit_code(record: Mapping[str, Any]) -> int | None:
    """How the process of a record ended, or None if it is not ours or not known."""
    reap()
    known = Process.from_json(record)
    return None if known is None else _exit_codes.get(known)


def write_object(path: Path, value: Mapping[str, Any]) -> None:
    """Replace a small JSON file atomically."""
    write_atomic(path, json.dumps(value, indent=1))
