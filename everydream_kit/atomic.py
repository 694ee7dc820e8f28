"""The one writer of files that must be complete or absent: a random temporary name, synced, renamed.

A reader, a kill or a power cut sees the old content or the new one and nothing between. The temporary file has a random
name and is created exclusively (`O_EXCL`), so nobody can prepare a symbolic link there that is written through. It stands
in the target's folder, since a rename works inside one file system only.

A killed process leaves its temporary file behind. Its name says which process made it, so `sweep` removes those of
processes that are gone, and no others.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from everydream_kit.errors import ConfigError, may_pass
from everydream_kit.identity import Process, is_running, this_process

PREFIX, SUFFIX = ".edk-", ".tmp"
FOREIGN_SECONDS = 24 * 3600.0
"""A temporary file of another machine, whose processes cannot be looked up, counts as left behind after this."""
_FLAGS = os.O_CREAT | os.O_EXCL | os.O_RDWR | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
_WINDOWS_TRIES, _WINDOWS_PAUSE_SECONDS = 40, 0.05
"""Windows refuses to replace a file while somebody reads it."""


def write_atomic(path: str | os.PathLike[str], content: str | bytes, *, make_folder: bool = False) -> None:
    """Replace a small file, or create it.

    Args:
        path: a symbolic link there is replaced, not followed.
        content: text is written as UTF-8, with line ends as they are.
        make_folder: create the folder if it is missing.

    Raises:
        OSError: it could not be written; the old content is untouched and no temporary file is left.
    """
    path = Path(path)
    if make_folder:
        path.parent.mkdir(parents=True, exist_ok=True)
    with open_atomic(path) as file:
        file.write(content.encode("utf-8", "surrogateescape") if isinstance(content, str) else content)


@contextmanager
def open_atomic(path: str | os.PathLike[str], *, replace: bool = True, durable: bool = True) -> Iterator[BinaryIO]:
    """A new binary file that takes its name when the block ends well, and disappears when it does not.

    Args:
        path: its final name.
        replace: False: a file that has this name by then stays, and that is a FileExistsError.
        durable: wait until the bytes are on the disk before the rename.

    Raises:
        OSError: it could not be written.
    """
    path = Path(path)
    temporary, descriptor = create_temporary(path.parent)
    try:
        with os.fdopen(descriptor, "w+b") as file:
            yield file
            file.flush()
            if durable:
                os.fsync(file.fileno())
        put_in_place(temporary, path, replace=replace)
    except BaseException:
        with contextlib.suppress(OSError):  # the first error is the one to report
            temporary.unlink()
        raise


def require_writable(folder: Path, setting: str) -> None:
    """Make a folder where it is missing, and write and remove a file in it. What killed processes left there goes.

    A full disk is not refused: there may be room again while training continues.

    Raises:
        ConfigError: it cannot be written; the setting that names it is named.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe, descriptor = create_temporary(folder)
        try:
            os.write(descriptor, b"x")
        finally:
            os.close(descriptor)
            probe.unlink()
    except (OSError, ValueError) as error:
        if may_pass(error):
            return
        cause = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"{setting}: {folder} cannot be written ({cause}). Give a folder that you can write to. Nothing was started."
        ) from error
    sweep(folder)


def create_temporary(folder: Path) -> tuple[Path, int]:
    """A new, empty temporary file in this folder, and its descriptor. Raises: OSError."""
    while True:
        path = temporary_path(folder)
        try:
            return path, os.open(path, _FLAGS, 0o666)  # as `open` does: the umask decides
        except FileExistsError:  # one chance in 2**64
            continue


def temporary_path(folder: Path) -> Path:
    """A random name in this folder that `sweep` knows, for writers that open files by themselves."""
    owner = this_process()
    return folder / f"{PREFIX}{owner.place}-{owner.pid}-{owner.started}-{secrets.token_hex(8)}{SUFFIX}"


def put_in_place(temporary: Path, path: Path, *, replace: bool = True) -> None:
    """Give a finished temporary file its final name; it keeps the permissions of the file that it replaces.

    Raises:
        FileExistsError: `replace` is False, and there is one.
        OSError: the rename failed.
    """
    with contextlib.suppress(OSError):  # there is none, or the file system has no permissions
        held = path.lstat()
        if stat.S_ISREG(held.st_mode):
            os.chmod(temporary, stat.S_IMODE(held.st_mode))
    if not replace:
        _put_where_nothing_is(temporary, path)
        return
    for left in range(_WINDOWS_TRIES if os.name == "nt" else 1, 0, -1):
        try:
            os.replace(temporary, path)
            return
        except PermissionError:
            if left == 1 or path.is_dir():
                raise
            time.sleep(_WINDOWS_PAUSE_SECONDS)


def ends_with_line_end(path: Path) -> bool:
    """Whether a file of lines can be appended to: it is empty, or ends with a newline."""
    with path.open("rb") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return True
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


def sweep(folder: str | os.PathLike[str]) -> list[Path]:
    """Remove temporary files and folders of processes that are gone. Returns what was removed."""
    removed = []
    with contextlib.suppress(OSError):  # no folder, or none that can be listed: nothing of ours is in it
        for path in Path(folder).glob(f"{PREFIX}*{SUFFIX}"):
            if _is_left_behind(path):
                if stat.S_ISDIR(path.lstat().st_mode):
                    shutil.rmtree(path)
                else:
                    path.unlink()
                removed.append(path)
    return removed


def _is_left_behind(path: Path) -> bool:
    parts = path.name.removeprefix(PREFIX).removesuffix(SUFFIX).split("-")
    mode = path.lstat().st_mode
    if len(parts) != 4 or not (parts[1].isdigit() and (stat.S_ISREG(mode) or stat.S_ISDIR(mode))):
        return False  # not one of ours
    place, pid, started, _ = parts
    if place and place == this_process().place:
        return is_running(Process(place, int(pid), started)) is False
    return time.time() - path.lstat().st_mtime > FOREIGN_SECONDS


def _put_where_nothing_is(temporary: Path, path: Path) -> None:
    """A hard link fails where the name exists, so no other writer can come between look and rename."""
    try:
        os.link(temporary, path, follow_symlinks=False)
    except FileExistsError:
        raise
    except (OSError, NotImplementedError) as problem:  # a file system without hard links
        if isinstance(problem, OSError) and problem.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
            raise
        if os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from None
        os.replace(temporary, path)
        return
    temporary.unlink()
