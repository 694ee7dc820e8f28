"""The notebooks as files: a checkout has them in `notebooks/`, an installed wheel in its data folder."""

from __future__ import annotations

import shutil
import sysconfig
from pathlib import Path

from everydream_kit.errors import DataError

INSTALLED = Path("share") / "everydream_kit" / "notebooks"
"""Below the environment's data folder; `[options.data_files]` in setup.cfg puts them there."""


def find_notebooks() -> list[Path]:
    """The notebooks that belong to this installation, in order.

    Raises:
        DataError: there are none.
    """
    places = [Path(__file__).parents[1] / "notebooks", Path(sysconfig.get_path("data")) / INSTALLED]
    for place in places:
        if found := sorted(place.glob("*.ipynb")):
            return found
    raise DataError(
        f"The notebooks are missing: neither {places[0]} nor {places[1]} has them. "
        "Install the kit again: pip install --force-reinstall --no-deps everydream-kit"
    )


def copy_notebooks(folder: str | Path) -> tuple[list[Path], list[Path]]:
    """Copy the notebooks into a folder. A file that already exists stays: it may hold somebody's work.

    Returns:
        (copied, kept).

    Raises:
        DataError: the notebooks are missing, or the folder cannot be made.
    """
    notebooks, folder = find_notebooks(), Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{folder}: cannot be made ({error.strerror}). Give another folder.") from error
    copied, kept = [], []
    for notebook in notebooks:
        target = folder / notebook.name
        if target.exists():
            kept.append(target)
        else:
            shutil.copyfile(notebook, target)
            copied.append(target)
    return copied, kept
