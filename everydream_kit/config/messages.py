"""Validation errors in words: the name, the rule, the value.

A value of a union is wrong for each of its branches. Those whose kind it has say their rule, words that are allowed next
to them are named, and where it has no branch's kind all of them are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from everydream_kit.config.declaration import Knob

if TYPE_CHECKING:
    from pydantic import ValidationError
    from pydantic.fields import FieldInfo
    from pydantic_core import ErrorDetails


def describe(error: ValidationError, fields: Mapping[str, FieldInfo]) -> str:
    """Pydantic's errors, one a line: the name, the rule, the value."""
    lines: dict[str, None] = {}
    by_name: dict[str, list[ErrorDetails]] = {}
    for problem in error.errors():
        if problem["type"] == "value_error":
            lines[str(problem["ctx"]["error"])] = None
        else:
            by_name.setdefault(str(problem["loc"][0]), []).append(problem)
    for name, problems in by_name.items():
        if problems[0]["type"] == "missing":
            cure = ". Name a model: a folder, a file, a Hub id, or embedded" if name == "resume_ckpt" else ""
            lines[f"{name}: required, and not given{cure}"] = None
        else:
            lines |= dict.fromkeys(_of_its_branches(name, problems, fields.get(name)))
    return "\n".join(lines)


def value_problem(name: str, problem: ErrorDetails) -> str:
    """One of pydantic's errors about a value in our words: the name, the rule, the value."""
    message = problem["msg"].replace("Input should be", "must be").replace("Value should", "must")
    return f"{name}: {message} (got {problem['input']!r})"


def _of_its_branches(name: str, problems: list[ErrorDetails], field: FieldInfo | None) -> list[str]:
    """A line for each entry of a list that is wrong, else one for the value."""
    inside = [problem for problem in problems if len(problem["loc"]) > 2]
    if inside:
        return [value_problem(name, problem) for problem in inside]
    other_kinds = ("_type", "_parsing", "literal_error")
    of_its_kind = [problem for problem in problems if not problem["type"].endswith(other_kinds)]
    if not of_its_kind:
        wanted = " or ".join(dict.fromkeys(problem["msg"].removeprefix("Input should be ") for problem in problems))
        return [f"{name}: must be {wanted} (got {problems[0]['input']!r})"]
    if of_its_kind[0]["type"] == "string_pattern_mismatch" and (unit := _unit(field)):
        return [f"{name}: must be {unit} (got {of_its_kind[0]['input']!r})"]
    words = [
        problem["msg"].removeprefix("Input should be ") for problem in problems if problem["type"] == "literal_error"
    ]
    rules = [value_problem(name, problem) for problem in of_its_kind]
    return [rule.replace(" (got ", f", or {' or '.join(words)} (got ", 1) if words else rule for rule in rules]


def _unit(field: FieldInfo | None) -> str:
    entries = [] if field is None else field.metadata
    return next((entry.unit for entry in entries if isinstance(entry, Knob)), "")
