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

SAMPLE_NAME = re.compile(r"gs(\d+)-(\d+)(-ema(?=-))?(?:-(.*))?\.jpg")
Point = tuple[int, float]
"""(optimizer step, value)."""


@dataclass(frozen=True)
class Sample:
    """A sample image of a run.

    Attributes:
        path: the file.
        step: it was generated at.
        index: number of its prompt, from 0.
        is_averaged: by the averaged (EMA) weights.
        prompt: as its text file has it, or what the file name holds of it.
    """

    path: Path
    step: int
    index: int
    is_averaged: bool
    prompt: str

    @property
    def words(self) -> str:
        """For people: the prompt, with whose weights it was generated."""
        return f"{self.prompt} (EMA)" if self.is_averaged else self.prompt


@dataclass
class RunView:
    """Curves, samples and messages of one run.

    Attributes:
        folder: the run folder.
        loss, validation: points in order of steps.
        learning_rates: points for each trained part.
        averaged_validation: the same losses, with the averaged (EMA) weights.
        memory: memory in bytes, as the trainer measures it.
        messages: warnings and errors, oldest first.
        saved: checkpoint folders in order of saving.
        bad_lines: lines of the events that cannot be read and are skipped.
    """

    folder: Path
    loss: list[Point] = field(default_factory=list)
    validation: list[Point] = field(default_factory=list)
    learning_rates: dict[str, list[Point]] = field(default_factory=dict)
    averaged_validation: list[Point] = field(default_factory=list)
    memory: list[Point] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)
    saved: list[str] = field(default_factory=list)
    bad_lines: int = 0
    _offset: int = 0
    _prompts: dict[str, str] = field(default_factory=dict)

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

    @cached_property
    def has_gpu(self) -> bool:
        """Whether the run is on a GPU, so that its memory is worth a chart."""
        return not str(read_small_object(self.folder / "environment.json").get("device", "cpu")).startswith("cpu")

    def samples(self) -> list[Sample]:
        """Sample images, by step and prompt. The prompt of a file is read once."""
        found = []
        for path in (self.folder / "samples").glob("gs*.jpg"):
            match = SAMPLE_NAME.fullmatch(path.name)
            if match is None:
                continue
            if path.name not in self._prompts and (prompt := _first_line(path.with_suffix(".txt"))):
                self._prompts[path.name] = prompt
            prompt = self._prompts.get(path.name) or match[4] or path.stem
            found.append(Sample(path, int(match[1]), int(match[2]), bool(match[3]), prompt))
        return sorted(found, key=lambda sample: (sample.step, sample.index, sample.is_averaged))

    def sample_steps(self) -> dict[int, list[Path]]:
        """Sample images by the step they were generated at."""
        found: dict[int, list[Path]] = {}
        for sample in self.samples():
            found.setdefault(sample.step, []).append(sample.path)
        return found

    def _take(self, event: dict[str, Any]) -> None:
        kind = event.get("kind")
        if kind == "loss":
            self._add(self.loss, event["step"], event.get("loss"))
            rates = event.get("lr")
            self._add(self.memory, event["step"], event.get("memory_bytes"))
            for part, rate in (rates if isinstance(rates, dict) else {"lr": rates}).items():
                self._add(self.learning_rates.setdefault(part, []), event["step"], rate)
        elif kind == "validation":
            self._add(self.validation, event["step"], event.get("loss"))
            self._add(self.averaged_validation, event["step"], event.get("ema_loss"))
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


def _first_line(path: Path) -> str:
    """The prompt that stands next to a sample; an empty text where there is none."""
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            return file.readline().strip()
    except OSError:
        return ""


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
