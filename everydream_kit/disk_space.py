"""How much room a disk has: the one place that asks, and the words for a disk that will not do."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path

from everydream_kit.errors import ConfigError

_UNITS = (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3))


def free_disk(folder: Path) -> int:
    """Free bytes on the disk that a folder is on, or will be on.

    Raises:
        OSError: the disk does not answer.
    """
    return shutil.disk_usage(existing_folder(folder)).free


def known_free_disk(folder: Path) -> int | None:
    """The same; None where the disk does not answer."""
    with suppress(OSError):
        return free_disk(folder)
    return None


def lack_of_room(folder: Path, needed: int) -> str | None:
    """Why a folder cannot take this many bytes, for a message; None where it can.

    Raises:
        OSError: the disk does not answer.
    """
    place = existing_folder(folder)
    usage = shutil.disk_usage(place)
    if not usage.total or not os.access(place, os.W_OK):
        return f"nothing can be written in {place}: it is read-only, belongs to somebody else, or is not a disk"
    if needed <= usage.free:
        return None
    return f"{compare_sizes(needed, usage.free)} in {place}"


def require_place(folder: Path, name: str) -> None:
    """Refuse a folder that cannot be made or takes no files, before the work whose result goes there. Makes nothing.

    Args:
        name: of the argument, for the message.

    Raises:
        ConfigError: a file stands in its way, or nothing can be written there.
    """
    try:
        place = existing_folder(folder)
        problem = lack_of_room(folder, 0) if place.is_dir() else f"{place} is a file"
    except (OSError, ValueError) as error:
        raise ConfigError(f"{name}: {folder} cannot be used ({getattr(error, 'strerror', error)}).") from error
    if problem is not None:
        raise ConfigError(f"{name}: {folder} cannot be made ({problem}). Give another place.")


def make_place(folder: Path, name: str) -> None:
    """Make a folder for a result where it is missing. Raises: ConfigError: as `require_place`."""
    require_place(folder, name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{name}: {folder} cannot be made ({error.strerror}). Give another place.") from error


def compare_sizes(needed: int, free: int) -> str:
    """`needs 40.2 MB, and 39.9 MB are free`: in one unit each, with digits enough to show the difference."""
    for digits in range(1, 4):
        texts = _size(needed, digits), _size(free, digits)
        if texts[0] != texts[1]:
            break
    else:
        texts = f"{needed:,} B", f"{free:,} B"
    return f"needs {texts[0]}, and {texts[1]} are free"


def _size(num_bytes: int, digits: int) -> str:
    for unit, factor in _UNITS:
        if num_bytes >= factor:
            return f"{num_bytes / factor:.{digits}f} {unit}"
    return f"{num_bytes} B"


def existing_folder(folder: Path) -> Path:
    """The folder, or the nearest one above that is there."""
    folder = Path(os.path.abspath(folder))
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder
