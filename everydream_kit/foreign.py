"""Settings that somebody else wrote: which of them a fetched run may bring, and which are requested again here.

A run that is fetched from the Hub brings its `config.json`. The settings that shape the training travel; those that
name code, folders, repositories or services do not: they stay in `origin.json` of the run folder until a person gives
each one again on this machine. While one is missing, every reader of the run's settings stops with one message. So the
command line, jobs, the queue and the panels obey without a check of their own.

Not here: fetching (`export.hub.fetch`), reading settings (`settings`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from everydream_kit.atomic import write_atomic
from everydream_kit.config import EMBEDDED_MODEL, TrainConfig, facts
from everydream_kit.errors import ConfigError
from everydream_kit.runs import RunFolder
from everydream_kit.strict_json import read_json

VERSION = 1

ASKED: dict[str, str] = {name: one.names for name, one in facts().items() if one.names and not one.decided_here}
"""Settings that name code, paths, repositories or services, each with what it names. A value that is the default, or
that `_HARMLESS` finds harmless, travels all the same."""

TRAVELS = frozenset(name for name, one in facts().items() if not one.names)
"""Settings that a fetched config may bring: they shape the training and name nothing outside it."""

DECIDED_HERE = frozenset(name for name, one in facts().items() if one.decided_here)
"""Settings that whoever fetches the run decides."""

FOLLOWS = {name: one.follows for name, one in facts().items() if one.follows}
"""Settings that are valid together with others only: they wait where one of these is asked for, until one is given."""

OPTIMIZER_MODULES = frozenset({"torch.optim", "bitsandbytes.optim", "pytorch_optimizer"})
"""Modules whose classes a fetched config may name as its optimizer."""

_REPEATED_GROUP = re.compile(r"\)[*+?{]|\\[1-9]")
"""A repetition of a group can hold another repetition; such patterns can take years to match."""
MAX_REPETITIONS = 4
MAX_PATTERN = 200
SHOWN_CHARACTERS = 120


@dataclass(frozen=True)
class Origin:
    """Where a run folder came from, and what a person still has to give again.

    Attributes:
        source: `hf://owner/name`.
        commit: the repository's state that was fetched.
        reference: how the person named it: `source`, perhaps with `@branch-or-commit`.
        asked: settings that are missing, each with its value in the fetched config.
        waiting: settings that come back when the one that they follow is given (`FOLLOWS`).
        given: names that were given again on this machine.
    """

    source: str
    commit: str
    reference: str
    asked: dict[str, Any] = field(default_factory=dict)
    waiting: dict[str, Any] = field(default_factory=dict)
    given: list[str] = field(default_factory=list)


def split_settings(values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Divide a fetched config's values into what travels, what is requested again, and what follows from that.

    Unknown names travel: the config's own check reports them.
    """
    asked = {name: value for name, value in values.items() if name in ASKED and not _may_travel(name, value)}
    waiting = {
        name: values[name]
        for name, leaders in FOLLOWS.items()
        if name in values and not asked.keys().isdisjoint(leaders)
    }
    skipped = {*asked, *waiting, *DECIDED_HERE}
    return {name: value for name, value in values.items() if name not in skipped}, asked, waiting


def _may_travel(name: str, value: Any) -> bool:
    declared = TrainConfig.model_fields[name]
    if not declared.is_required() and value == declared.default and type(value) is type(declared.default):
        return True
    return name in _HARMLESS and _HARMLESS[name](value)


def _is_known_optimizer(value: Any) -> bool:
    return isinstance(value, str) and ("." not in value or value.rpartition(".")[0] in OPTIMIZER_MODULES)


def _is_plain_optimizer_config(value: Any) -> bool:
    """An object whose optimizers are known ones and whose freezing patterns are plain."""
    if not isinstance(value, dict):
        return False
    sections = [section for section in value.values() if isinstance(section, dict)]
    optimizers = [section["optimizer"] for section in sections if section.get("optimizer") is not None]
    freezing = value.get("unet_freezing") or {}
    patterns = list(freezing.values()) if isinstance(freezing, dict) else [freezing]
    return all(map(_is_known_optimizer, optimizers)) and all(p is None or is_plain_patterns(p) for p in patterns)


def is_plain_patterns(value: Any) -> bool:
    """Whether a value is a list of names or of patterns that match in no time."""
    return isinstance(value, list) and all(
        isinstance(one, str)
        and len(one) <= MAX_PATTERN
        and not _REPEATED_GROUP.search(one)
        and sum(map(one.count, "*+?{")) <= MAX_REPETITIONS
        for one in value
    )


def _names_no_folder(value: Any) -> bool:
    """A validation config without datasets of its own."""
    names = ("manual_data_root", "val_data_root", "extra_manual_datasets")
    return isinstance(value, dict) and not any(value.get(name) for name in names)


_HARMLESS: dict[str, Callable[[Any], bool]] = {
    "resume_ckpt": lambda value: value == EMBEDDED_MODEL,
    "optimizer": _is_known_optimizer,
    "optimizer_config": _is_plain_optimizer_config,
    "unet_optimizer": _is_known_optimizer,
    "text_encoder_optimizer": _is_known_optimizer,
    "lora_targets": is_plain_patterns,
    "unet_train_layers": is_plain_patterns,
    "unet_freeze_layers": is_plain_patterns,
    "ema_device": lambda value: value in ("cpu", "cuda"),
    "validation_config": _names_no_folder,
}


def write_origin(folder: Path, origin: Origin) -> None:
    """Mark a run folder."""
    text = json.dumps({"version": VERSION, **asdict(origin)}, indent=1, ensure_ascii=False)
    write_atomic(RunFolder(folder).origin_path, text + "\n")


def read_origin(folder: Path) -> Origin | None:
    """The mark of a run folder; None for a run that was made here.

    Raises:
        ConfigError: the mark is damaged. It counts as a mark all the same.
    """
    path = RunFolder(folder).origin_path
    content = read_json(path, error=ConfigError, missing=None)
    if content is None:
        return None
    for name, kind in {**dict.fromkeys(("source", "commit", "reference"), str), "asked": dict, "waiting": dict}.items():
        if not isinstance(content.get(name), kind):
            raise ConfigError(f"{path}: damaged, {name} is missing. Fetch the run again into another logdir.")
    listed = content.get("given")
    names = listed if isinstance(listed, list) else []
    given = [name for name in names if isinstance(name, str) and name in ASKED]
    kept = {name: content[name] for name in ("source", "commit", "reference", "asked")}
    waiting = {name: value for name, value in content["waiting"].items() if name in FOLLOWS}
    return Origin(**kept, waiting=waiting, given=given)


def require_given(origin: Origin, names: Collection[str] = ()) -> None:
    """Make sure that nothing has to be given any more.

    Args:
        names: settings that a person gives now.

    Raises:
        ConfigError: something is missing; the message lists it and says how to give it.
    """
    missing = [name for name in ASKED if name in origin.asked and name not in names]
    if missing:
        raise ConfigError(_describe(origin, missing, names))


def _describe(origin: Origin, missing: list[str], given: Collection[str]) -> str:
    width = max(map(len, missing))
    lines = [f"  {name:<{width}}  {ASKED[name]} (there: {shown(origin.asked[name])})" for name in missing]
    flags = " ".join(f"--{name} VALUE" for name in [*(n for n in given if n in origin.asked), *missing])
    optional = [name for name in missing if name not in ("resume_ckpt", "data_root")]
    off = f" To go without one, give its default: {', '.join(map(_off, optional))}." if optional else ""
    return "\n".join(
        [
            f"{origin.source} comes from the Hub, and a fetched run does not decide about code, folders, repositories or "
            f"services here. Give {len(missing)} of its settings again:",
            *lines,
            f"Then resume: everydream resume {origin.reference} {flags}",
            f'In Python: edk.resume("{origin.reference}", changes={{...}}). In a panel: under Settings.{off}',
        ]
    )


def _off(name: str) -> str:
    default = TrainConfig.model_fields[name].default
    text = {None: "none", False: "off"}.get(default) if not isinstance(default, (list, str)) else None
    return f"--{name} {text if text is not None else default}"


def shown(value: Any) -> str:
    """A stranger's value on one line: quoted, without control characters, cut."""
    text = json.dumps(value, ensure_ascii=False)
    text = "".join(one if one.isprintable() else f"\\u{ord(one):04x}" for one in text)
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}…"
