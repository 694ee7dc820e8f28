"""Reading the two side files of a run, `optimizer.json` and `validation.json`, as strictly as the main settings.

Both are EveryDream 2's formats: notes under "doc", "documentation", "comment" or "_..." are allowed, and
everything else must be known.
"""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from everydream_kit.config import Group, value_problem
from everydream_kit.errors import ConfigError
from everydream_kit.strict_json import read_json


class Section(Group):
    """Base of every section of a side file: as strict as the settings themselves."""


SectionT = TypeVar("SectionT", bound=Section)


def is_comment(name: str) -> bool:
    """Whether a key of a settings file is a note for people, as EveryDream 2's and its fork's files carry them."""
    return name.startswith("_") or name.lower() in ("comment", "comments", "doc", "documentation")


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


def read_section(source: str | Path | dict[str, Any], schema: type[SectionT], setting: str) -> SectionT:
    """Read and check one side file.

    Args:
        source: path of a JSON file, or the object itself.
        schema: what it should look like.
        setting: the parameter that names it, for messages.

    Raises:
        ConfigError: no such file, not JSON, an unknown name or a wrong value. All problems at once, one a line.
    """
    values = _without_comments(source if isinstance(source, dict) else read_json_object(Path(source), setting))
    try:
        text = json.dumps(values)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{setting}: holds something that JSON cannot hold: {error}") from error
    try:
        return schema.model_validate_json(text)
    except ValidationError as error:
        where = f" ({source})" if isinstance(source, str | Path) else ""
        lines = dict.fromkeys(_describe(problem, schema, setting) for problem in error.errors())
        raise ConfigError("\n".join(line + where for line in lines)) from None


def _without_comments(values: dict[str, Any]) -> dict[str, Any]:
    """The settings of a file and of its sections, without the notes for people."""
    return {
        name: {key: inner for key, inner in value.items() if not is_comment(key)} if isinstance(value, dict) else value
        for name, value in values.items()
        if not is_comment(name)
    }


def _describe(problem: Any, schema: type[Section], setting: str) -> str:
    place = [str(part) for part in problem["loc"]]
    name = ".".join([setting, *place])
    if problem["type"] == "extra_forbidden":
        near = difflib.get_close_matches(place[-1].lower(), _sibling_names(schema, place), n=1)
        return f"{name}: unknown setting" + (f"; did you mean {near[0]}?" if near else "")
    if problem["type"] == "value_error":
        return f"{name}: {problem['ctx']['error']}"
    return value_problem(name, problem)


def _sibling_names(schema: type[BaseModel], place: list[str]) -> list[str]:
    """The names allowed in the section that the last part of `place` stands in."""
    for part in place[:-1]:
        field = schema.model_fields.get(part)
        candidates = [field.annotation] if field is not None else []
        candidates += list(getattr(candidates[0], "__args__", ())) if candidates else []
        sections = [one for one in candidates if isinstance(one, type) and issubclass(one, BaseModel)]
        if not sections:
            return []
        schema = sections[0]
    return list(schema.model_fields)
