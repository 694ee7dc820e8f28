"""Locks between processes: one holder at a time, and the system takes the lock from a holder that dies.

The work is done by `filelock` (flock on Linux and macOS, LockFile on Windows). Here is what it means for us: errors in
words, and disks without locks, on which a run starts all the same.
"""

from __future__ import annotations

import errno
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from everydream_kit.errors import JobError

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.02
_NO_LOCKS = {
    getattr(errno, name) for name in ("ENOLCK", "ENOSYS", "ENOTSUP", "EOPNOTSUPP", "EINVAL") if hasattr(errno, name)
}


@contextmanager
def hold(path: Path, refusal: str, *, wait_seconds: float = 0.0) -> Iterator[None]:
    """Hold a lock file. The file stays; what counts is the lock on it.

    Args:
        path: the lock file; its folder must exist.
        refusal: the message where someone else holds it.
        wait_seconds: how long to wait for another holder.

    Raises:
        JobError: someone else holds it, or the folder cannot be written.
    """
    lock = _acquire(path, refusal, wait_seconds)
    try:
        yield
    finally:
        if lock is not None:
            lock.release()


def is_held(path: Path) -> bool:
    """Whether a process holds this lock now. Where the disk has no locks: False."""
    if not path.is_file():
        return False
    try:
        lock = _acquire(path, "", 0.0)
    except JobError:
        return True
    if lock is not None:
        lock.release()
    return False


def _acquire(path: Path, refusal: str, wait_seconds: float) -> FileLock | None:
    lock = FileLock(path, timeout=wait_seconds, thread_local=False)
    try:
        with (
            warnings.catch_warnings()
        ):  # where flock is missing it says that it takes a marker file instead, which is right
            warnings.filterwarnings("ignore", ".*flock not supported.*")
            lock.acquire(poll_interval=POLL_SECONDS)
    except Timeout:
        raise JobError(refusal) from None
    except (NotImplementedError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in _NO_LOCKS:
            raise JobError(f"{path.parent}: cannot be written: {error.strerror or error}.") from error
        logger.warning(f"{path.parent}: this disk keeps no locks ({error}): start one run at a time.")
        return None
    return lock
