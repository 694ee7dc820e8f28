"""Unpacking an uploaded archive, and how many files it holds."""

from __future__ import annotations

import zipfile
from pathlib import Path


def unpack_upload(archive: Path, target: Path) -> Path:
    """Unpack an uploaded archive, safely, as a folder that was not there before. Returns that folder.

    Raises:
        DataError, DiskSpaceError: as `data.sources.unpack_archive`.
    """
    from everydream_kit.data.sources import unpack_archive

    unpacked = unpack_archive(archive, archive.parent)
    target.parent.mkdir(parents=True, exist_ok=True)
    free = target
    number = 2
    while free.exists():
        free = target.with_name(f"{target.name}-{number}")
        number += 1
    unpacked.replace(free)
    return free


def count_entries(archive: Path) -> int:
    """Files in a .zip, from its directory; 0 where it cannot be read (unpacking says why)."""
    try:
        with zipfile.ZipFile(archive) as file:
            return sum(not entry.is_dir() for entry in file.infolist())
    except (zipfile.BadZipFile, OSError, NotImplementedError):
        return 0
