"""Detached processes: starting one, recognising it later, and the small files that say which it was.

A process is known by host, id and start time together: ids are used again, start times are not. Not here: what the
processes do.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from everydream_kit.errors import JobError
from everydream_kit.workspace import write_whole

LOCK_SECONDS = 30.0
"""A start lock older than this was left by a process that died while starting."""

_children: dict[int, subprocess.Popen[bytes]] = {}
"""Processes started by this interpreter, kept so that they can be reaped when they end."""

_exit_codes: dict[int, int] = {}


def spawn(
    command: Sequence[str], log: Path, environment: Mapping[str, str] | None, *, append: bool
) -> subprocess.Popen[bytes]:
    """Start a detached process in a session of its own, with its output in a file.

    Raises:
        JobError: the command cannot be started.
    """
    reap()
    variables = {**os.environ, "PYTHONUNBUFFERED": "1", **(environment or {})}
    try:
        with log.open("ab" if append else "wb") as output:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=variables, start_new_session=True
            )
    except OSError as error:
        raise JobError(f"{command[0]}: could not be started: {error}") from error
    _children[process.pid] = process
    return process


def identify(pid: int) -> dict[str, Any]:
    """What `find_process` needs to know one of our processes again, as a record for a JSON file."""
    try:
        start_time = psutil.Process(pid).create_time()
    except psutil.NoSuchProcess:  # it has ended already
        start_time = 0.0
    return {"pid": pid, "start_time": start_time, "host": platform.node()}


def find_process(pid: int, start_time: float | None) -> psutil.Process | None:
    """The living process of this id, if it is the one that started then (seconds since 1970; None: not known)."""
    reap()
    try:
        process = psutil.Process(pid)
        if process.status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD):
            return None
        if start_time is not None and abs(process.create_time() - start_time) > 2.0:
            return None
    except psutil.NoSuchProcess:
        return None
    return process


def reap() -> None:
    """Collect those of our processes that have ended, so that they do not stay as zombies."""
    for pid, process in list(_children.items()):
        if process.poll() is not None:
            _exit_codes[pid] = process.returncode
            del _children[pid]


def exit_code(pid: int | None) -> int | None:
    """How a process of ours ended, or None if it is not ours or not known."""
    reap()
    return _exit_codes.get(pid) if pid is not None else None


@contextlib.contextmanager
def start_lock(path: Path) -> Iterator[None]:
    """Hold a lock file while starting, so that two clicks at once start one run."""
    with contextlib.suppress(OSError):
        if time.time() - path.stat().st_mtime > LOCK_SECONDS:
            path.unlink()
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except FileExistsError as error:
        raise JobError(f"{path.parent}: another start is under way. Try again in a moment.") from error
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def read_object(path: Path) -> dict[str, Any]:
    """The object in a small file that another process may be replacing; nothing there reads as {}."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def write_object(path: Path, value: Mapping[str, Any]) -> None:
    """Replace a small JSON file, whole."""
    write_whole(path, json.dumps(value, indent=1))
