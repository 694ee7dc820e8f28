"""Turns the side files that settings name (`optimizer_config`, `validation_config`) into settings of their own.

Where a thing is given twice, what stands in the settings themselves wins over the side file that they name, and a flag's
side file wins over a settings file, as flags do. In EveryDream 2's own files it is the other way around for the schedule:
there `base` of its optimizer file decides it. Every value that loses is reported.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from everydream_kit.config import facts
from everydream_kit.everydream2.optimizer_file import import_optimizer_file
from everydream_kit.everydream2.validation_file import import_validation_file

SIDE_FILES: dict[str, Callable[[Any], tuple[dict[str, Any], list[str]]]] = {
    "optimizer_config": import_optimizer_file,
    "validation_config": import_validation_file,
}
"""Settings that name a side file, each with its importer."""
DEFAULT_OPTIMIZER_FILE = "optimizer.json"
"""What EveryDream 2 reads in the working folder where nothing else is named; without it, it goes by its defaults."""
OPTIMIZER_FIRST = ("lr_scheduler", "lr_warmup_steps", "lr_decay_steps")
"""What the optimizer file's `base` decides before the run's own settings, there."""
GO_WITH_THE_OPTIMIZER = ("optimizer_args", *(name for name, one in facts().items() if one.optimizer_argument))
"""Settings that only some optimizers take: where another optimizer is given, the file's are not used."""


def import_side_files(
    values: Mapping[str, Any], *, theirs: bool = False, must_exist: bool = True
) -> tuple[dict[str, Any], list[str]]:
    """Settings with what their side files say, in place of the files' names.

    Args:
        values: what was given, by name.
        theirs: it is a settings file of EveryDream 2: its order holds, and its default file is read.
        must_exist: a file that is not there is an error; else its name stays, and whoever begins the run reports it.

    Returns:
        The settings, and what could not be translated or lost, one sentence each.

    Raises:
        ConfigError: a file is missing, or wrong.
    """
    kept, notes = dict(values), []
    if theirs:
        notes += _find_default_file(kept)
    for setting, read in SIDE_FILES.items():
        source = kept.get(setting)
        if not isinstance(source, str | Path | dict):
            continue  # not given; or of a wrong type, which the config's own check reports
        if isinstance(source, str | Path) and not must_exist and not Path(source).exists():
            continue
        imported, more = read(source)
        del kept[setting]
        notes += [*more, *_merge(kept, imported, setting, theirs=theirs)]
    return kept, notes


def _find_default_file(values: dict[str, Any]) -> list[str]:
    """Name EveryDream 2's default optimizer file where it is there, and forget it where it is not."""
    named = values.get("optimizer_config")
    if named not in (None, DEFAULT_OPTIMIZER_FILE):
        return []
    if Path(DEFAULT_OPTIMIZER_FILE).is_file():
        values["optimizer_config"] = DEFAULT_OPTIMIZER_FILE
        if named is None:
            return [f"optimizer_config: {DEFAULT_OPTIMIZER_FILE} of the working folder is used, as in EveryDream 2."]
        return []
    values.pop("optimizer_config", None)
    if named is None:
        return []
    return [f"optimizer_config: {DEFAULT_OPTIMIZER_FILE} is not there; the defaults are used, as in EveryDream 2."]


def _merge(kept: dict[str, Any], imported: dict[str, Any], setting: str, *, theirs: bool) -> list[str]:
    """Copy a side file's values into the settings, except into those that were given."""
    notes = []
    if "optimizer" in imported and kept.get("optimizer") not in (None, imported["optimizer"]):
        for name in GO_WITH_THE_OPTIMIZER:
            if imported.pop(name, None) is not None and kept.get(name) is None:
                notes.append(f"{name}: that of {setting} is not used, since optimizer {kept['optimizer']} is given.")
    for name, value in imported.items():
        own = kept.get(name)
        if own is not None and own != value and not (theirs and name in OPTIMIZER_FIRST):
            notes.append(f"{name}: {own} is used, not {value} of {setting}.")
            continue
        if own is not None and own != value:
            notes.append(f"{name}: {value} of {setting} is used, not {own}, as in EveryDream 2.")
        kept[name] = value
    return notes
