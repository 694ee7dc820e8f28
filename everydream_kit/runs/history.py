"""What a run has written so far: its curves, messages and samples, read piece by piece.

Only what was added to `events.jsonl` since the last look is read, so a long run costs no more per look than a short one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TypeVar

from everydream_kit.runs import layout
from everydream_kit.runs.run_folder import RunFolder
from everydream_kit.runs.schema import Event
from everydream_kit.strict_json import JsonLines

Point = tuple[int, float]
"""(optimizer step, value)."""
Value = TypeVar("Value")


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
class RunHistory:
    """Curves and messages of one run.

    Attributes:
        run: the run folder.
        loss, validation: points in order of steps.
        learning_rates: points for each trained part.
        averaged_validation: the same losses, with the averaged (EMA) weights.
        memory: memory in bytes, as the trainer measures it.
        messages: warnings and errors, oldest first.
    """

    run: RunFolder
    loss: list[Point] = field(default_factory=list)
    validation: list[Point] = field(default_factory=list)
    learning_rates: dict[str, list[Point]] = field(default_factory=dict)
    averaged_validation: list[Point] = field(default_factory=list)
    memory: list[Point] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)
    _read: JsonLines = field(default_factory=JsonLines, repr=False)
    _prompts: dict[str, str] = field(default_factory=dict, repr=False)

    def update(self) -> bool:
        """Read what is new. Returns whether anything was."""
        before = self._read.num_bytes
        for event in self.run.events(report=self._read):
            self._add(event)
        return self._read.num_bytes > before

    @cached_property
    def max_epochs(self) -> int | None:
        """Epochs that the run was started with, or None where its settings do not say."""
        value = self.run.settings().get("max_epochs")
        return value if isinstance(value, int) else None

    @cached_property
    def has_gpu(self) -> bool:
        """Whether the run is on a GPU, so that its memory is worth a chart."""
        return not str(self.run.environment().get("device", "cpu")).startswith("cpu")

    def samples(self) -> list[Sample]:
        """Sample images, by step and prompt. The prompt of a file is read once."""
        found = []
        for path in self.run.samples():
            name = layout.SAMPLE_NAME.fullmatch(path.name)
            assert name is not None  # `samples` lists no others
            if path.name not in self._prompts and (prompt := _first_line(path.with_suffix(".txt"))):
                self._prompts[path.name] = prompt
            prompt = self._prompts.get(path.name) or name["prompt"] or path.stem
            found.append(Sample(path, int(name["step"]), int(name["index"]), bool(name["averaged"]), prompt))
        return sorted(found, key=lambda sample: (sample.step, sample.index, sample.is_averaged))

    def _add(self, event: Event) -> None:
        kind, step = event["kind"], event.get("step")
        if kind in ("loss", "validation") and step is None:
            self._read.bad.append(f"{self.run.events_path}, line {self._read.num_lines}: a {kind} without a step")
        elif kind == "loss" and step is not None:
            _add_point(self.loss, step, event.get("loss"))
            _add_point(self.memory, step, event.get("memory_bytes"))
            rates = event.get("lr")
            for part, rate in (rates if isinstance(rates, dict) else {"lr": rates}).items():
                _add_point(self.learning_rates.setdefault(part, []), step, rate)
        elif kind == "validation" and step is not None:
            _add_point(self.validation, step, event.get("loss"))
            _add_point(self.averaged_validation, step, event.get("ema_loss"))
        elif kind in ("warning", "error"):
            self.messages.append(event.get("message", ""))


def _first_line(path: Path) -> str:
    """The prompt in a sample's text file; an empty text where there is none."""
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            return file.readline().strip()
    except OSError:
        return ""


def _add_point(points: list[Point], step: int, value: float | None) -> None:
    while points and points[-1][0] >= step:  # a resumed run goes back to its checkpoint
        points.pop()
    if value is not None:
        points.append((step, float(value)))


def thin(values: Sequence[Value], most: int = 300) -> list[Value]:
    """At most so many of them, evenly taken, the first and the last always."""
    if len(values) <= most:
        return list(values)
    return [values[round(number * (len(values) - 1) / (most - 1))] for number in range(most)]
