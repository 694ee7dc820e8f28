"""The events of a fetched run: which of them are kept.

Panels, plans and cards read `events.jsonl` and trust the trainer that wrote it. Of a fetched run's events only those are
kept that say how the training went, with values of the right kind; files and folders of the other machine mean nothing here.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from everydream_kit.atomic import open_atomic
from everydream_kit.errors import CheckpointError
from everydream_kit.strict_json import iterate_json_lines

KEPT_KINDS = frozenset({"dataset", "loss", "epoch", "validation", "warning", "resumed", "stopped", "finished", "error"})
COUNTS = frozenset({"step", "epoch", "images", "pictures", "problems", "num_steps", "steps", "seed", "memory_bytes"})
NUMBERS = frozenset({"loss", "minutes", "encoding_minutes", "images_per_second", "gradient_norm", "time"})
TEXTS = frozenset({"message", "reason", "tag", "kind"})
NEEDS_STEP = frozenset({"loss", "epoch", "validation"})
MAX_TEXT = 2000
MAX_COUNT = 2**53


def write_clean_events(source: Path, target: Path) -> None:
    """Write those of the events that can be used into a run's `events.jsonl`.

    Raises:
        CheckpointError: the file cannot be read.
    """
    with open_atomic(target) as file:
        for event in iterate_json_lines(source, error=CheckpointError):
            cleaned = clean_event(event)
            if cleaned is not None:
                file.write(json.dumps(cleaned, ensure_ascii=False).encode("utf-8", errors="replace") + b"\n")


def clean_event(event: dict[str, Any]) -> dict[str, Any] | None:
    """An event with the values that are of their kind; None where it is of no use then."""
    kind = event.get("kind")
    if not isinstance(kind, str) or kind not in KEPT_KINDS:
        return None
    cleaned = {name: value for name, value in event.items() if _is_usable(name, value)}
    return cleaned if kind not in NEEDS_STEP or ("step" in cleaned and "loss" in cleaned) else None


def _is_usable(name: str, value: Any) -> bool:
    if name in COUNTS:
        return _is_count(value)
    if name in NUMBERS:
        return value is None or _is_number(value)
    if name in TEXTS:
        return (
            isinstance(value, str) and len(value) <= MAX_TEXT and all(one.isprintable() or one == "\n" for one in value)
        )
    if name == "lr":
        return _is_number(value) or (isinstance(value, dict) and all(map(_is_number, value.values())))
    return False


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= MAX_COUNT


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
