"""Every parameter of a training run, declared once.

A parameter is one annotated field: name, type, range and default in the line, its effect in the docstring below, a
`Knob` with what else a person needs to know, and `Facts` for the code. The command line, the JSON file, the widget form,
`docs/parameters.md` and the error messages are all made from these declarations (`params.py` walks them); adding a
parameter is one edit in the module of its group.

Groups are mixin classes: seen from outside a `TrainConfig` is flat (`TrainConfig(lr=1e-6)`, `--lr 1e-6`,
`"lr": 1e-6`), and the class that declares a field is its group. A config is frozen; values derived from it (total
steps, the resolved seed) live on the run.

| module | holds |
|---|---|
| `declaration` | what a declaration is made of: `Group`, `Knob`, `Facts` |
| `*_settings` | the parameters, by group |
| `groups` | all groups together, without rules |
| `rules` | rules about several settings at once |
| `names` | names that are no parameters, and what to write instead |
| `messages` | validation errors in words |

Not here: reading them from files and flags (`settings`).
"""

from __future__ import annotations

import json
from typing import Any

from pydantic import ValidationError, model_validator

from everydream_kit.config.base_model_settings import EMBEDDED_MODEL
from everydream_kit.config.declaration import Facts, Group, Knob, facts_of
from everydream_kit.config.groups import AllGroups
from everydream_kit.config.messages import describe, value_problem
from everydream_kit.config.names import OTHER_TRAINERS, RETIRED, closest_setting, describe_unknown
from everydream_kit.config.rules import (
    combination_problems,
    config_warnings,
    family_warnings,
    frozen_in_half,
    measures_losses,
    mixes_precision,
    settings_without_meaning,
    wants_auto_optimizer,
)
from everydream_kit.errors import ConfigError

__all__ = [
    "EMBEDDED_MODEL",
    "GROUPS",
    "OTHER_TRAINERS",
    "RETIRED",
    "VERSION",
    "Facts",
    "Group",
    "Knob",
    "TrainConfig",
    "config_warnings",
    "default_of",
    "facts",
    "family_warnings",
    "frozen_in_half",
    "measures_losses",
    "mixes_precision",
    "nearest_name",
    "settings_without_meaning",
    "value_problem",
    "wants_auto_optimizer",
]

VERSION = 2
"""Of the saved file's layout. `settings.load_config` upgrades older files. 2: what side files say are settings."""


class TrainConfig(AllGroups):
    """All settings of one training run. See `docs/parameters.md` for each.

    Raises:
        ConfigError: from the constructor, with every problem on a line of its own.
    """

    def __init__(self, **values: Any) -> None:
        known = type(self).model_fields
        unknown = [name for name in values if name not in known]
        problems = [describe_unknown(name, known) for name in unknown]
        try:
            super().__init__(**{name: value for name, value in values.items() if name not in unknown})
        except ValidationError as error:
            problems.append(describe(error, known))
        if problems:
            raise ConfigError("\n".join(problems))

    @model_validator(mode="after")
    def _check_combinations(self) -> TrainConfig:
        problems = combination_problems(self)
        if problems:
            raise ValueError("\n".join(problems))
        return self

    @property
    def resolutions(self) -> tuple[int, ...]:
        """Area classes, ascending, each once."""
        values = self.resolution if isinstance(self.resolution, list) else [self.resolution]
        return tuple(sorted(set(values)))

    def replace(self, **changes: Any) -> TrainConfig:
        """A copy with some settings changed, validated as a whole."""
        kept = {name: getattr(self, name) for name in self.model_fields_set}
        return TrainConfig(**{**kept, **changes})

    def to_json(self) -> str:
        """The file form: flat, every parameter, with the layout's version. `load_config` reads it back.

        `given` lists what was said rather than left at its default: `optimizer_config` fills in what was not said.
        """
        head = {"version": VERSION, "given": sorted(self.model_fields_set)}
        return json.dumps({**head, **self.model_dump(mode="json")}, indent=2, ensure_ascii=False)


GROUPS: tuple[type[Group], ...] = tuple(base for base in AllGroups.__bases__ if issubclass(base, Group))
"""In the order in which forms and the reference page show them."""


def nearest_name(name: str) -> str | None:
    """The parameter that this name means in other trainers, or looks most like; None if it means nothing."""
    return closest_setting(name, TrainConfig.model_fields)


def default_of(name: str) -> Any:
    """The default of a parameter, for functions that offer the same choice: it stands in the declaration only."""
    return TrainConfig.model_fields[name].default


_FACTS = {name: one for group in GROUPS for name, one in facts_of(group.model_fields).items()}


def facts() -> dict[str, Facts]:
    """The facts of every parameter, by name."""
    return _FACTS
