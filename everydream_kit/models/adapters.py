"""Small checkpoints: a LoRA or learned tokens, and the name of the base that they belong to.

`save_model` writes such a folder for a model that has an adapter (megabytes instead of the whole model), and
`load_model` and `open_model` read it like any other: the first with a live adapter, to train on; the second with the
adapter merged.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from everydream_kit.errors import ModelError
from everydream_kit.models.model_files import read_json
from everydream_kit.runs.layout import ADAPTER_FILE

BASE_FIELDS = ("source", "revision", "subfolder", "variant", "family", "prediction_type", "vae")
KEPT_FIELDS = ("family", "prediction_type", "vae")
"""Of a base that somebody names in place of another: what the training took it for still holds."""

AdapterBase = Mapping[str, Any] | str | Path
"""A base that is named in place of the one that a small checkpoint names: its path or Hub id, or `load_model`'s
arguments by name, with `source`."""


def is_adapter_folder(folder: Path) -> bool:
    return (folder / ADAPTER_FILE).is_file()


def write_adapter_file(folder: Path, origin: dict[str, Any], fingerprint: str | None, **parts: Any) -> None:
    """Note what lies in the folder and which base it needs.

    Args:
        origin: how to load the base.
        fingerprint: of its weights (`fingerprints.py`), where it is known.
    """
    content = {"version": 1, "base": origin, "base_fingerprint": fingerprint, **parts}
    (folder / ADAPTER_FILE).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def read_adapter_file(folder: Path) -> dict[str, Any]:
    """The note that `write_adapter_file` wrote.

    Raises:
        ModelError: it does not name its base.
    """
    content = read_json(folder / ADAPTER_FILE)
    base = content.get("base")
    if not isinstance(base, dict) or not isinstance(base.get("source"), str):
        raise ModelError(f"{folder / ADAPTER_FILE}: does not name the base model that the adapter belongs to.")
    wrong = [name for name, value in base.items() if name not in BASE_FIELDS or not isinstance(value, str)]
    if wrong:
        raise ModelError(f"{folder / ADAPTER_FILE}: says {shown_name(wrong[0])} of its base, which means nothing here.")
    if is_adapter_folder(Path(base["source"]).expanduser()):
        raise ModelError(
            f"{folder / ADAPTER_FILE}: its base {base['source']} is an adapter too. An adapter's base is a full model."
        )
    return content


def base_to_open(note: Mapping[str, Any], own_base: AdapterBase | None) -> dict[str, Any]:
    """`open_model`'s arguments for the base of a small checkpoint: the one that is named instead, or its own."""
    if own_base is None:
        return dict(note["base"])
    named = dict(own_base) if isinstance(own_base, Mapping) else {"source": str(own_base)}
    return {**{name: note["base"][name] for name in KEPT_FIELDS if name in note["base"]}, **named}


@contextmanager
def explaining_base(folder: Path, note: Mapping[str, Any], source: str) -> Iterator[None]:
    """What goes wrong with a base is reported as that: nobody who gave the checkpoint has named the base.

    Raises:
        ModelError: the base cannot be used; the message says whose base it is, and how to name another.
    """
    try:
        yield
    except ModelError as problem:
        raise ModelError(
            f"{folder}: the base model of this {kind_of_adapter(note)}, {source}, cannot be used: "
            f"{str(problem).rstrip('.')}. If it is somewhere else now, name it with --base (in Python: adapter_base)."
        ) from problem


def kind_of_adapter(note: Mapping[str, Any]) -> str:
    """For messages."""
    return "LoRA" if "lora" in note else "learned word"


def shown_name(name: str) -> str:
    """A name from a file, for messages."""
    return repr(name[:60])
