"""An action: something that a person can do, as one library function. Its signature and its docstring are the record.

The command line makes flags from the record, the panels take choices, defaults and help from it, and a background task
calls it by its name. Which actions there are is in `actions/table.py`.
"""

from __future__ import annotations

import importlib
import inspect
import re
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

Kind = Literal["bool", "int", "float", "text"]
Progress = Callable[..., None]
"""Called with (done, total), or with (done, total, what is being done)."""
PROGRESS = "progress"
_SEQUENCES = (list, tuple, Sequence, Iterable)
_ENTRY = re.compile(r"(\w+(?:, \w+)*): (.*)", re.DOTALL)


@dataclass(frozen=True)
class Argument:
    """One argument of an action.

    Attributes:
        name: of the function's argument.
        flag: its name on the command line; empty for one that is given by its position.
        opposite: flag that means false; empty where there is none.
        kind: of one value.
        many: several values are taken.
        required: it must be given.
        default: of the function.
        choices: allowed words; empty: any value.
        help: what it means, from the docstring.
    """

    name: str
    flag: str
    opposite: str
    kind: Kind
    many: bool
    required: bool
    default: Any
    choices: tuple[str, ...]
    help: str


@dataclass(frozen=True)
class Action:
    """A library function that a person calls: on the command line, in a panel, or in the background.

    Attributes:
        summary: what it does, in a line.
        function: where it is, as `module:name` below the package; it is imported when it is needed.
        flags: names on the command line that differ from the argument's; an argument that has one is no longer given by
            position.
        opposites: for arguments that are true or false, the flag that means false.
        skip: arguments that only code gives.
    """

    summary: str
    function: str
    flags: Mapping[str, str] = field(default_factory=dict)
    opposites: Mapping[str, str] = field(default_factory=dict)
    skip: tuple[str, ...] = ()

    def load(self) -> Callable[..., Any]:
        """The function itself."""
        module, _, name = self.function.partition(":")
        function: Callable[..., Any] = getattr(importlib.import_module(f"everydream_kit.{module}"), name)
        return function

    @property
    def description(self) -> str:
        """What it does, from the docstring, without its sections."""
        return re.split(r"\n(?=(?:Args|Raises|Returns|Yields):)", inspect.getdoc(self.load()) or self.summary)[
            0
        ].strip()

    @cached_property
    def arguments(self) -> dict[str, Argument]:
        """What a person can give, by name, in the order of the signature."""
        function = self.load()
        helps = read_argument_docs(inspect.getdoc(function) or "")
        parameters = {
            name: parameter
            for name, parameter in inspect.signature(function).parameters.items()
            if name != PROGRESS and name not in self.skip
        }
        given = types.SimpleNamespace(__annotations__={name: one.annotation for name, one in parameters.items()})
        hints = get_type_hints(given, function.__globals__)  # types of skipped arguments may not be imported
        return {name: self._describe(one, hints[name], helps.get(name, "")) for name, one in parameters.items()}

    def call(self, given: Mapping[str, Any], progress: Progress | None = None) -> Any:
        """Do it.

        Args:
            given: values by the names of the arguments; the function's defaults hold for the others.
            progress: called with how much is done, where the function reports it.

        Raises: as the function.
        """
        function = self.load()
        reports = progress is not None and PROGRESS in inspect.signature(function).parameters
        return function(**given, **({PROGRESS: progress} if reports else {}))

    def _describe(self, parameter: inspect.Parameter, annotation: Any, text: str) -> Argument:
        name = parameter.name
        by_position = parameter.kind is not inspect.Parameter.KEYWORD_ONLY and name not in self.flags
        options = [option for option in _union(annotation) if option is not type(None)]
        values = [value for option in options for value in _members(option)]
        return Argument(
            name=name,
            flag="" if by_position else self.flags.get(name, name),
            opposite=self.opposites.get(name, ""),
            kind=_kind(values),
            many=any(get_origin(option) in _SEQUENCES for option in options),
            required=parameter.default is inspect.Parameter.empty,
            default=None if parameter.default is inspect.Parameter.empty else parameter.default,
            choices=tuple(str(word) for value in values if get_origin(value) is Literal for word in get_args(value)),
            help=text,
        )


def text_of(result: Any) -> str:
    """What an action returned, for reading: a report's text, a file a line, or the thing itself."""
    if isinstance(result, list):
        return "\n".join(map(text_of, result))
    return str(getattr(result, "text", result))


def read_argument_docs(docstring: str) -> dict[str, str]:
    """The entries of a docstring's `Args:` by name, each as one line without its full stop.

    Args:
        docstring: in Google style; `a, b: text` speaks of both.
    """
    section = re.search(r"^Args:\n((?:[ ]+.*\n?|\n)+)", docstring, re.MULTILINE)
    entries = re.split(r"\n(?= {4}\S)", section[1].rstrip()) if section else []
    found = {}
    for entry in entries:
        parts = _ENTRY.fullmatch(entry.strip())
        if parts:
            words = " ".join(parts[2].split()).removesuffix(".")
            found.update(dict.fromkeys(parts[1].split(", "), words))
    return found


def _union(annotation: Any) -> Iterator[Any]:
    if get_origin(annotation) in (Union, types.UnionType):
        for option in get_args(annotation):
            yield from _union(option)
    else:
        yield annotation


def _members(option: Any) -> Iterator[Any]:
    """Types of the values of a sequence, or the option itself."""
    if get_origin(option) in _SEQUENCES:
        yield from _union(get_args(option)[0])
    else:
        yield option


def _kind(values: list[Any]) -> Kind:
    simple: dict[Any, Kind] = {bool: "bool", int: "int", float: "float"}
    return next((simple[value] for value in values if value in simple), "text")
