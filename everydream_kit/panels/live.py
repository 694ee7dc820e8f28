"""What a run has told so far, read piece by piece from its folder: the numbers behind the live view.

Only what was added to `events.jsonl` since the last look is read, so a long run costs no more per look than a short
one. No widgets here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from everydream_kit.errors import KitError
from everydream_kit.strict_json import parse_json
from everydream_kit.workspace import read_small_object

Point = tuple[int, float]
"""(optimizer step, value)."""


@dataclass
class RunView:
    """Curves, samples and messages of one run.

    Attributes:
        folder: the run folder.
        loss, validation: points in order of steps.
        learning_rates: points for each trained part.
        messages: warnings and errors, oldest first.
        saved: checkpoint folders in order of saving.
        bad_lines: lines of the events that cannot be read and are skipped.
    """

    folder: Path
    loss: list[Point] = field(default_factory=list)
    validation: list[Point] = field(default_factory=list)
    learning_rates: dict[str, list[Point]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    saved: list[str] = field(default_factory=list)
    bad_lines: int = 0
    _offset: int = 0

    def update(self) -> bool:
        """Read what is new. Returns whether anything was."""
        path = self.folder / "events.jsonl"
        try:
            with path.open("rb") as file:
                file.seek(self._offset)
                text = file.read()
        except FileNotFoundError:
            return False
        whole = text[: text.rfind(b"\n") + 1]  # the last line may still be being written
        self._offset += len(whole)
        for line in whole.splitlines():
            try:
                self._take(parse_json(line, str(path), allow_nan=True))
            except (KitError, KeyError, TypeError, ValueError):  # a line that a full disk or a kill cut off
                self.bad_lines += 1
        return bool(whole)

    @cached_property
    def max_epochs(self) -> int | None:
        """Epochs that the run was started with, or None where its settings do not say."""
        value = read_small_object(self.folder / "config.json").get("max_epochs")
        return value if isinstance(value, int) else None

    def sample_steps(self) -> dict[int, list[Path]]:
        """Sample pictures by the step they were drawn at."""
        found: dict[int, list[Path]] = {}
        for path in sorted((self.folder / "samples").glob("gs*.jpg")):
            match = re.match(r"gs(\d+)", path.name)
            if match:
                found.setdefault(int(match[1]), []).append(path)
        return dict(sorted(found.items()))

    def _take(self, event: dict[str, Any]) -> None:
        kind = event.get("kind")
        if kind == "loss":
            self._add(self.loss, event["step"], event.get("loss"))
            rates = event.get("lr")
            for part, rate in (rates if isinstance(rates, dict) else {"lr": rates}).items():
                self._add(self.learning_rates.setdefault(part, []), event["step"], rate)
        elif kind == "validation":
            self._add(self.validation, event["step"], event.get("loss"))
        elif kind == "saved":
            self.saved.append(str(event.get("path", "")))
        elif kind in ("warning", "error"):
            self.messages.append(str(event.get("message", "")))

    @staticmethod
    def _add(points: list[Point], step: int, value: float | None) -> None:
        while points and points[-1][0] >= step:  # a resumed run goes back to its checkpoint
            points.pop()
        if value is not None:
            points.append((step, float(value)))


def thin(points: list[Point], most: int = 300) -> list[Point]:
    """At most so many points, evenly taken, the last one always."""
    if len(points) <= most:
        return points
    stride = len(points) / most
    return [points[int(i * stride)] for i in range(most - 1)] + [points[-1]]


def smooth(points: list[Point], weight: float = 0.9) -> list[Point]:
    """Exponential moving average with bias correction, as TensorBoard draws it."""
    result, average, scale = [], 0.0, 0.0
    for step, value in points:
        average = weight * average + (1 - weight) * value
        scale = weight * scale + (1 - weight)
        result.append((step, average / scale))
    return result
