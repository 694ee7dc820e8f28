"""How much room a disk has: the one place that asks."""

from __future__ import annotations

import os
import shutil
from pathlib import Path


def free_disk(folder: Path) -> int:
    """Free bytes on the disk that a folder is on, or will be on.

    Raises:
        OSError: the disk does not answer.
    """
    folder = Path(os.path.abspath(folder))
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free
