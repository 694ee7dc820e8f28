"""Detached processes: starting one, recognising it later, and the small files that say which it was.

A process is known by host, id and start time together: ids are used again, start times are not. Not here: what the
processes do.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import platform
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import psutil

from everydream_kit.errors import JobError
from everydream_kit.jobs.safe_python import safe_environment
from everydream_kit.workspace import write_whole

logger = logging.getLogger(__name__)

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
    variables = safe_environment({**os.environ, "PYTHONUNBUFFERED": "1", **(environment or {})})
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
    """Hold a lock file, so that two clicks at once start one run. The system takes it from a holder that dies.

    Raises:
        JobError: someone else holds it.
    """
    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_held = not _has_name(file, path)  # its holder took it away before we had the lock
        except BlockingIOError:
            is_held = True
        except OSError as error:
            logger.warning("%s: this disk keeps no locks (%s): start one run at a time.", path.parent, error)
            is_held = False
        if is_held:
            raise JobError(f"{path.parent}: another start is under way. Try again in a moment.")
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _has_name(file: BinaryIO, path: Path) -> bool:
    """Whether an open file is the one that is found under this path now."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


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
