"""Reading settings from files and flags: the one way into `TrainConfig` for everything that people wrote.

EveryDream 2's `train.json` loads too, with names that have gone out of use reported together with what replaces them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from everydream_kit.atomic import write_atomic
from everydream_kit.config import RETIRED, VERSION, TrainConfig
from everydream_kit.errors import ConfigError
from everydream_kit.everydream2.importing import SIDE_FILES, import_side_files
from everydream_kit.everydream2.run_file import is_theirs, resolve, translate
from everydream_kit.everydream2.side_files import read_json_object
from everydream_kit.foreign import FOLLOWS, read_origin, require_given, write_origin
from everydream_kit.runs import RunFolder


def load_config(
    path: str | Path | None = None, overrides: dict[str, Any] | None = None
) -> tuple[TrainConfig, list[str]]:
    """Read settings from a JSON file, with overrides (flags) on top; defaults fill the rest.

    Args:
        path: a flat JSON object; EveryDream 2's `train.json` or a run's `config.json`. None: overrides alone.
        overrides: values that win over the file's. So does the side file that one of them names.

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
    try:
        values, warnings = upgrade(values)
        flags, more = translate(overrides or {}, from_file=False)
        warnings += more
        if not is_ours:
            values, more = translate(values, from_file=True)
            warnings += more
        values, more = _import_levels(values, flags, theirs=theirs)
        warnings += more
        return TrainConfig(**values), warnings
    except ConfigError as error:
        raise ConfigError((f"{path}:\n" if path is not None else "") + str(error)) from None


def read_settings(given: TrainConfig | Mapping[str, Any] | str | Path) -> tuple[TrainConfig, list[str]]:
    """Settings in any form that people give them: an object, a mapping, or the path of a file. Else as `load_config`."""
    if isinstance(given, TrainConfig):
        return given, []
    return load_config(None, dict(given)) if isinstance(given, Mapping) else load_config(given)


def _import_levels(values: dict[str, Any], flags: dict[str, Any], *, theirs: bool) -> tuple[dict[str, Any], list[str]]:
    """A settings file and the flags together, each with what its side files say."""
    values = {name: value for name, value in values.items() if not (name in SIDE_FILES and name in flags)}
    reads_default = theirs and "optimizer_config" not in flags
    if flags.get("optimizer") is not None:  # the file's settings of another optimizer do not go with it
        values = {**values, "optimizer": flags["optimizer"]}
    values, warnings = import_side_files(values, theirs=reads_default, must_exist=False)
    flags, more = import_side_files(flags, must_exist=False)
    values, resolved = resolve(values, flags, theirs=theirs)
    return values, [*warnings, *more, *resolved]


def read_changes(changes: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """What is changed on resume: retired names are answered, and side files read, as at the start of a run.

    Returns:
        The changes, and warnings, one sentence each.

    Raises:
        ConfigError: a file is missing or wrong, or a setting trains differently elsewhere and does not exist here.
    """
    values, warnings = translate(changes, from_file=False)
    values, more = import_side_files(values)
    return values, [*warnings, *more]


def with_side_files(config: TrainConfig) -> tuple[TrainConfig, list[str]]:
    """A config with what its side files say in place of their names, for whoever begins a run or plans one.

    Returns:
        The config, and what could not be translated or lost, one sentence each.

    Raises:
        ConfigError: a file is missing, or wrong.
    """
    given = {name: getattr(config, name) for name in config.model_fields_set}
    values, warnings = import_side_files(given)
    return (TrainConfig(**values), warnings) if values != given else (config, [])


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
    given = {name: changes[name] for name in origin.asked if name in changes}
    values, _ = upgrade(read_json_object(RunFolder(folder).config_path))
    waiting = {
        name: value
        for name, value in origin.waiting.items()
        if any(given.get(leader) is not None for leader in FOLLOWS[name])
    }
    config = TrainConfig(**{**values, **waiting, **given})
    write_atomic(RunFolder(folder).config_path, config.to_json())
    write_origin(folder, replace(origin, asked={}, waiting={}, given=sorted({*origin.given, *given})))
    return {name: value for name, value in changes.items() if name not in given}


def upgrade(values: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Bring an older file's names and habits to today's.

    Files of version 1 may name side files; they are read afterwards, as those of any settings are.
    """
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
    none_is_default = is_theirs(values)
    for name, value in values.items():
        if name == "given" or (given is not None and name not in given and value == _default(name)):
            continue
        if name in RETIRED and given is not None:
            warnings.append(f"{name}: no longer used; replaced by {RETIRED[name]}.")
        elif name == "version" or (value is None and given is None and not _accepts_none(name, none_is_default)):
            continue  # EveryDream 2 writes null for "the default"; any other file says null where None was meant
        else:
            kept[name] = value
    return kept, warnings


def _default(name: str) -> Any:
    field = TrainConfig.model_fields.get(name)
    return None if field is None or field.is_required() else field.default


def _accepts_none(name: str, none_is_default: bool) -> bool:
    field = TrainConfig.model_fields.get(name)
    if field is None or field.default is None:
        return True
    return not none_is_default and type(None) in get_args(field.annotation)
