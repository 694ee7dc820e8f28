"""Stages that end by the clock: a schedule of elapsed time, with checkpoints, and continuing after a stop."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import torch


class Stage:
    """One training stage with a budget in minutes; only time spent in the loop counts against it.

    A time budget instead of a step budget, since cores that are shared with other work drift by a factor of two: the
    stage then ends on time with fewer steps and a schedule that still reached its end.
    """

    def __init__(self, folder: Path, name: str, minutes: float, save_every_minutes: float = 4.0) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"{name}.pt"
        self.log_path = folder / f"{name}.jsonl"
        self.budget_seconds = minutes * 60
        self.save_every_seconds = save_every_minutes * 60
        self.spent_before = 0.0
        self.step = 0
        self.started = self.saved = time.monotonic()
        self.progress = 0.0

    def load(self) -> dict[str, Any] | None:
        """The last checkpoint's payload, or None for a fresh start."""
        if not self.path.exists():
            return None
        state = torch.load(self.path, weights_only=True)
        self.spent_before, self.step = state["spent_seconds"], state["step"]
        self.started = self.saved = time.monotonic()
        self.progress = self.own_progress
        return state["payload"]

    @property
    def spent_seconds(self) -> float:
        return self.spent_before + time.monotonic() - self.started

    @property
    def own_progress(self) -> float:
        """0 at the start, 1 at the end of the budget, by this process's clock; `progress` is what all agreed on."""
        return min(1.0, self.spent_seconds / self.budget_seconds)

    def is_save_due(self) -> bool:
        return time.monotonic() - self.saved > self.save_every_seconds

    def save(self, payload: dict[str, Any]) -> None:
        """Write to a temporary name, then rename, so that a stop in the middle leaves the checkpoint before."""
        alongside = self.path.with_suffix(".writing")
        torch.save({"payload": payload, "spent_seconds": self.spent_seconds, "step": self.step}, alongside)
        os.replace(alongside, self.path)
        self.saved = time.monotonic()

    def log(self, **values: float | str) -> None:
        line = {"step": self.step, "minutes": round(self.spent_seconds / 60, 2), **values}
        with self.log_path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)


class Ema:
    """An exponential moving average of a model's weights, with the usual warm-up of its decay."""

    def __init__(self, model: torch.nn.Module, decay: float) -> None:
        self.decay = decay
        self.weights = {name: value.detach().clone() for name, value in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: torch.nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                self.weights[name].lerp_(value, 1 - decay)
