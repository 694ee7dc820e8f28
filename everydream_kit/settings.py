"""Reading settings from files and flags: the one way into `TrainConfig` for everything that people wrote.

EveryDream 2's `train.json` loads too, with names that have gone out of use reported together with what replaces them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from everydream_kit.config import RETIRED, VERSION, TrainConfig
from everydream_kit.errors import ConfigError


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
        ConfigError: the file is not there, is no JSON object, names an unknown setting, or a value is wrong. All
            problems at once.
    """
    values = read_json_object(Path(path)) if path is not None else {}
    values, warnings = _upgrade(values)
    values.update(overrides or {})
    prefix = f"{path}:\n" if path is not None else ""
    try:
        return TrainConfig(**values), warnings
    except ConfigError as error:
        raise ConfigError(prefix + str(error)) from None


def read_json_object(path: Path, setting: str = "") -> dict[str, Any]:
    """A settings file's object.

    Args:
        setting: the parameter that names the file, for messages; none for the settings of a run themselves.

    Raises:
        ConfigError: the file is not there, no text, no JSON, or no object; line and column are named.
    """
    place = f"{setting}: {path}" if setting else str(path)
    if not path.is_file():
        raise ConfigError(f"{place}: there is no such settings file. Give the path of a JSON file.")
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{place}: not a text file in UTF-8 ({error.reason} at byte {error.start}).") from error
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"{place}, line {error.lineno}, column {error.colno}: not valid JSON: {error.msg}. Nothing was started."
        ) from error
    if not isinstance(values, dict):
        raise ConfigError(f"{place}: holds a JSON {type(values).__name__}, but settings are an object {{...}}.")
    return values


def _upgrade(values: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Bring an older file's names and habits to today's."""
    version = values.get("version", VERSION)
    if not isinstance(version, int) or version > VERSION:
        raise ConfigError(
            f"version: this file was written by a newer EveryDream Kit (layout {version!r}). Upgrade the kit."
        )
    given = values.get("given")
    kept: dict[str, Any] = {}
    warnings = []
    for name, value in values.items():
        if name == "given" or (given is not None and name not in given and value == _default(name)):
            continue
        if name in RETIRED:
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
