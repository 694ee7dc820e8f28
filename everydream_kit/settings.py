"""Reading settings from files and flags: the one way into `TrainConfig` for everything that people wrote.

EveryDream 2's `train.json` loads too, with names that have gone out of use reported together with what replaces them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from everydream_kit.atomic import write_atomic
from everydream_kit.config import RETIRED, VERSION, TrainConfig
from everydream_kit.errors import ConfigError
from everydream_kit.everydream2 import is_theirs, resolve, translate
from everydream_kit.foreign import FOLLOWS, read_origin, require_given, write_origin
from everydream_kit.strict_json import read_json


def load_config(
    path: str | Path | None = None, overrides: dict[str, Any] | None = None
) -> tuple[TrainConfig, list[str]]:
    """Read settings from a JSON file, with overrides (flags) on top; defaults fill the rest.

    Args:
        path: a flat JSON object; EveryDream 2's `train.json` or a run's `config.json`. None: overrides alone.
        overrides: values that win over the file's.

    Returns:
        The config, and warnings about names that have gone out of use (one sentence each).

    Raises:
        ConfigError: the file is not there, is not a JSON object, names an unknown setting, or a value is wrong. All
            problems at once. Or it is the file of a fetched run that a person has not completed yet.
    """
    if path is not None and (origin := read_origin(Path(path).parent)) is not None:
        require_given(origin)
    values = read_json_object(Path(path)) if path is not None else {}
    is_ours, theirs = "version" in values, is_theirs(values)
    values, warnings = upgrade(values)
    try:
        flags, more = translate(overrides or {}, from_file=False)
        warnings += more
        if is_ours:
            values.update(flags)
        else:
            values, more = translate(values, from_file=True)
            warnings += more
            values, more = resolve(values, flags, theirs=theirs)
            warnings += more
        return TrainConfig(**values), warnings
    except ConfigError as error:
        raise ConfigError((f"{path}:\n" if path is not None else "") + str(error)) from None


def give_again(folder: Path, changes: Mapping[str, Any]) -> dict[str, Any]:
    """Complete the settings of a fetched run with what a person gives on this machine.

    Args:
        folder: a run folder, fetched or made here.
        changes: values by name; those that the run does not wait for are not touched.

    Returns:
        The rest of the changes.

    Raises:
        ConfigError: a setting is still missing, or a value is wrong. Nothing was changed.
    """
    origin = read_origin(folder)
    if origin is None or not origin.asked:
        return dict(changes)
    require_given(origin, changes)
    given = {name: changes[name] for name in origin.asked}
    values, _ = upgrade(read_json_object(folder / "config.json"))
    waiting = {name: value for name, value in origin.waiting.items() if given.get(FOLLOWS[name]) is not None}
    config = TrainConfig(**{**values, **waiting, **given})
    write_atomic(folder / "config.json", config.to_json())
    write_origin(folder, replace(origin, asked={}, waiting={}, given=sorted({*origin.given, *given})))
    return {name: value for name, value in changes.items() if name not in given}


def read_json_object(path: Path, setting: str = "") -> dict[str, Any]:
    """A settings file's object.

    Args:
        setting: the parameter that names the file, for messages; none for the settings of a run themselves.

    Raises:
        ConfigError: the file is not there, no text, no JSON, or no object; line and column are named.
    """
    place = f"{setting}: {path}" if setting else str(path)
    try:
        values: dict[str, Any] = read_json(path, error=ConfigError, name=place)
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(f"{place}: there is no such settings file. Give the path of a JSON file.") from None
    return values


def upgrade(values: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Bring an older file's names and habits to today's."""
    version = values.get("version", VERSION)
    if type(version) is not int or version > VERSION:
        raise ConfigError(
            f"version: this file was written by a newer EveryDream Kit (layout {version!r}). Upgrade the kit."
        )
    given = values.get("given")
    if given is not None and not (isinstance(given, list) and all(isinstance(name, str) for name in given)):
        raise ConfigError("given: must be a list of setting names. Remove it from the file.")
    kept: dict[str, Any] = {}
    warnings = []
    for name, value in values.items():
        if name == "given" or (given is not None and name not in given and value == _default(name)):
            continue
        if name in RETIRED and given is not None:
            warnings.append(f"{name}: no longer used; replaced by {RETIRED[name]}.")
        elif name == "version" or (value is None and given is None and not _accepts_none(name)):
            continue  # EveryDream 2 writes null for "the default"; a file of ours says null where None was meant
        else:
            kept[name] = value
    return kept, warnings


def _default(name: str) -> Any:
    field = TrainConfig.model_fields.get(name)
    return None if field is None or field.is_required() else field.default


def _accepts_none(name: str) -> bool:
    field = TrainConfig.model_fields.get(name)
    return field is None or field.default is None
