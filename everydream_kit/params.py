"""Walks the declaration in `config`, for everything that shows parameters: command line, form, reference page.

`parameters()` lists them as plain records in the order of their declaration. `parse_text` turns what a person typed
into a value, and `check_value` says what is wrong with one value. Nothing here knows any parameter by name.
"""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal, get_args

from pydantic import ConfigDict, TypeAdapter, ValidationError

from everydream_kit.config import EMBEDDED_MODEL, GROUPS, Facts, Group, Knob, TrainConfig, facts
from everydream_kit.config.declaration import FamilyName, TrainingKind
from everydream_kit.errors import ConfigError
from everydream_kit.strict_json import parse_json

PAGE_COLUMNS = 100

Kind = Literal["bool", "int", "float", "choice", "text", "object"]
_KINDS: dict[str, Kind] = {"boolean": "bool", "integer": "int", "number": "float", "string": "text"}
"""By the type in a JSON schema; any other is an object."""
_BOUNDS = ("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum", "multipleOf")


@dataclass(frozen=True)
class Parameter:
    """One parameter, as a form or a page sees it.

    Attributes:
        name: as in the file and on the command line.
        kind: which control suits it. `object` is a list or mapping, typed as JSON.
        default: the default value; None together with `required` means that there is none.
        required: it must be given.
        optional: None is allowed and means off, or "by itself".
        minimum, maximum: bounds, or None. `exclusive_minimum`, `exclusive_maximum`: the bound itself is not allowed.
        multiple_of: the value must be a multiple of this.
        choices: allowed words; for a number these are words allowed next to numbers, such as `auto`.
        many: a list of such values is accepted as well.
        entries: the kind of each value of a list.
        help: its effect, in words.
        group: title of its group.
        knob: unit, memory, when to change it, basic or not.
        facts: what it affects, when it may change, which trainings it has a meaning for.
    """

    name: str
    kind: Kind
    default: Any
    required: bool
    optional: bool
    minimum: float | None
    maximum: float | None
    exclusive_minimum: bool
    exclusive_maximum: bool
    multiple_of: float | None
    choices: tuple[str, ...]
    many: bool
    entries: Kind
    help: str
    group: str
    knob: Knob
    facts: Facts

    @property
    def range_text(self) -> str:
        """The allowed values in words, such as `above 0, up to 1` or `mse, huber`."""
        words = []
        if self.minimum is not None:
            words.append(("above " if self.exclusive_minimum else "from ") + format_value(self.minimum))
        if self.maximum is not None:
            words.append(("below " if self.exclusive_maximum else "to ") + format_value(self.maximum))
        if self.multiple_of is not None:
            words.append(f"in steps of {format_value(self.multiple_of)}")
        if self.choices:
            words.append((" or " if words else "") + ", ".join(self.choices))
        return " ".join(words).replace("  ", " ")


@lru_cache(maxsize=1)
def parameters() -> tuple[Parameter, ...]:
    """Every parameter of `TrainConfig`, in the order of declaration."""
    schemas = TrainConfig.model_json_schema()["properties"]
    return tuple(_describe_field(name, schemas[name], group) for group in GROUPS for name in group.model_fields)


def parameter(name: str) -> Parameter:
    """The parameter of this name.

    Raises:
        ConfigError: there is none.
    """
    for record in parameters():
        if record.name == name:
            return record
    raise ConfigError(f"{name}: unknown setting")


def group_title(group: type[Group]) -> str:
    """The group's name, from the first words of its docstring (`Data: which images ...` gives `Data`)."""
    return (group.__doc__ or "").split(":")[0].split(".")[0].strip()


def parse_text(name: str, texts: str | list[str]) -> Any:
    """Turn what was typed for a parameter into a value. Ranges are checked by `TrainConfig`, not here.

    Args:
        name: the parameter.
        texts: one text, or several where the parameter takes a list. `none` and the empty text mean None where None is
            allowed; a text that begins with a bracket is JSON.

    Raises:
        ConfigError: the text cannot be read as a value of this parameter.
    """
    record = parameter(name)
    if isinstance(texts, list) and (len(texts) > 1 or (record.kind == "object" and not _looks_like_json(texts))):
        return [_parse_one(record, text, many=True) for text in texts]
    text = texts[0] if isinstance(texts, list) else texts
    return _parse_one(record, text)


def check_value(name: str, value: Any) -> str | None:
    """What is wrong with a value for this parameter alone, as one sentence, or None if nothing is."""
    given = {} if name == "resume_ckpt" else {"resume_ckpt": EMBEDDED_MODEL}
    try:
        TrainConfig(**given, **{name: value})
    except ConfigError as error:
        own = [line for line in str(error).splitlines() if line.startswith(f"{name}:")]
        return own[0].removeprefix(f"{name}: ") if own else None
    return None


def format_value(value: Any) -> str:
    """A value as a person would type it: `1e-06` as `1e-6`, None as `none`, True as `on`."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, float) and value.is_integer() and abs(value) >= 1:
        return str(int(value))
    if isinstance(value, float):
        return f"{value:g}".replace("e-0", "e-").replace("e+0", "e")
    return value if isinstance(value, str) else json.dumps(value)


def reference_page() -> str:
    """`docs/parameters.md`: every parameter with effect, range, unit, cost in memory, and when to change it."""
    lines = [
        "# Parameters",
        "",
        "<!-- Made from everydream_kit/config by `everydream parameters`; a test compares. Do not edit. -->",
        "",
        *_sentences(
            'Each one is a command-line flag (`--name value`), a key of the JSON file (`"name": value`), an argument of '
            "`TrainConfig(name=value)` and a control of the training panel. `none` means off, or chosen by the kit. "
            "Parameters in **bold** are the basic ones."
        ),
    ]
    title = None
    for record in parameters():
        if record.group != title:
            title = record.group
            lines += ["", f"## {title}"]
        lines += ["", *_reference_entry(record)]
    return "\n".join(lines) + "\n"


def _reference_entry(record: Parameter) -> list[str]:
    heading = f"`{record.name}`"
    default = "required" if record.required else f"default {format_value(record.default)}"
    facts = [default, record.range_text]
    if record.knob.unit:
        facts.append(f"unit: {record.knob.unit}")
    lines = [
        f"### {'**' + heading + '**' if record.knob.basic else heading}",
        "",
        *_sentences(" · ".join(fact for fact in facts if fact)),
        "",
        *_sentences(record.help),
        "",
    ]
    points = [f"Memory: {record.knob.memory}."]
    if record.knob.when:
        points.append(f"When to change it: {record.knob.when}.")
    points += _reference_facts(record.facts)
    return [*lines, *(line for point in points for line in _sentences(point, "- ", "  "))]


def _sentences(text: str, first: str = "", rest: str = "") -> list[str]:
    """Markdown lines of a text: one sentence a line, of at most PAGE_COLUMNS."""
    lines: list[str] = []
    for sentence in re.split(r"(?<=[.!?]) (?=[A-Z`(])", text):
        indent = rest if lines else first
        lines += textwrap.wrap(
            sentence,
            PAGE_COLUMNS,
            initial_indent=indent,
            subsequent_indent=rest,
            break_long_words=False,
            break_on_hyphens=False,
        )
    return lines


CHANGE_WORDS = {"never": "a new run only", "resume": "on resume", "live": "on resume, and while a run trains"}
EFFECT_WORDS = {"memory": "device memory", "speed": "images per second", "result": "the trained weights"}


def _reference_facts(stated: Facts) -> list[str]:
    affects = ", ".join(EFFECT_WORDS[one] for one in stated.affects) or "nothing that is trained"
    lines = [f"Affects: {affects}. Can be changed: {CHANGE_WORDS[stated.change]}."]
    if len(stated.kinds) < len(get_args(TrainingKind)):
        lines.append(f"Only with training_kind {' or '.join(stated.kinds)}.")
    if len(stated.families) < len(get_args(FamilyName)):
        lines.append(f"Only with models of {', '.join(stated.families)}.")
    if stated.needs:
        lines.append(f"Only with {' or '.join(f'`{name}`' for name in stated.needs)}.")
    if stated.unless:
        lines.append(f"Without effect with {' or '.join(f'`{name}`' for name in stated.unless)}.")
    return lines


def _describe_field(name: str, schema: Mapping[str, Any], group: type[Group]) -> Parameter:
    """The record of a field, from its JSON schema; a union's branches in the order of declaration."""
    field = group.model_fields[name]
    branches = [one for one in schema.get("anyOf", [schema]) if one["type"] != "null"]
    bounds = {key: value for one in reversed(branches) for key, value in one.items() if key in _BOUNDS}
    low, high = (bounds.get(inside, bounds.get(outside)) for inside, outside in (_BOUNDS[:2], _BOUNDS[2:4]))
    step = bounds.get("multipleOf")
    words = [one.get("enum", [one["const"]] if "const" in one else []) for one in branches]
    kinds: list[Kind] = [
        _KINDS.get(one["type"], "object") for one, choices in zip(branches, words, strict=True) if not choices
    ]
    simple = [kind for kind in kinds if kind != "object"]
    return Parameter(
        name=name,
        kind=simple[0] if simple else "object" if kinds else "choice",
        default=None if field.is_required() else field.default,
        required=field.is_required(),
        optional=len(branches) < len(schema.get("anyOf", [schema])),
        minimum=None if low is None else float(low),
        maximum=None if high is None else float(high),
        exclusive_minimum="exclusiveMinimum" in bounds,
        exclusive_maximum="exclusiveMaximum" in bounds,
        multiple_of=None if step is None else float(step),
        choices=tuple(str(choice) for several in words for choice in several),
        many=any(one["type"] == "array" for one in branches),
        entries=_kind_of_entries(branches),
        help=" ".join((field.description or "").split()),
        group=group_title(group),
        knob=next((entry for entry in field.metadata if isinstance(entry, Knob)), Knob()),
        facts=facts()[name],
    )


def _kind_of_entries(branches: Sequence[Mapping[str, Any]]) -> Kind:
    """The kind of a list's values by the schema of the list, where there is one; texts where they may be of several."""
    types = [one["items"].get("type", "string") for one in branches if one["type"] == "array"]
    return _KINDS.get(types[0], "object") if types else "text"


def _looks_like_json(texts: list[str]) -> bool:
    return len(texts) == 1 and texts[0].lstrip()[:1] in ("[", "{")


def _parse_one(record: Parameter, text: str, *, many: bool = False) -> Any:
    stripped = text.strip()
    if record.optional and stripped.lower() in ("none", "null", "") and not many:
        return None
    if stripped[:1] in ("[", "{") and (record.kind == "object" or record.many or record.kind == "text"):
        try:
            return parse_json(stripped, record.name, expect=None, error=ConfigError)
        except ConfigError as error:
            if record.kind == "object":
                is_entry = record.many and check_value(record.name, [stripped]) is None
                cure = " It takes texts, one after the other; one that begins with a bracket in a JSON list: "
                raise ConfigError(f"{error}{cure}{json.dumps([stripped])}" if is_entry else str(error)) from error
    if many and record.kind == "object":
        return _parse_scalar(replace(record, kind=record.entries), stripped) if record.entries == "float" else text
    if record.kind == "text":
        return text
    if record.kind == "object":
        raise ConfigError(f"{record.name}: give it as JSON, in {{...}} or [...] (got {text!r})")
    return _parse_scalar(record, stripped)


def _parse_scalar(record: Parameter, text: str) -> Any:
    if text in record.choices:
        return text
    if record.kind == "bool":
        text = {"on": "true", "off": "false"}.get(text.lower(), text)
    scalar: Any = {"bool": bool, "int": int, "float": float}.get(record.kind, str)
    try:
        return TypeAdapter(scalar, config=ConfigDict(strict=False)).validate_python(text)
    except ValidationError as error:
        wanted = {"bool": "on or off", "int": "a whole number", "float": "a number"}[record.kind]
        also = f" or {', '.join(record.choices)}" if record.choices else ""
        cure = "; several are given with spaces between" if record.many and "," in text else ""
        raise ConfigError(f"{record.name}: must be {wanted}{also} (got {text!r}){cure}") from error
