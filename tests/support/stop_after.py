"""A listener that stops a run at a known step."""

from __future__ import annotations

from everydream_kit.training.listeners import Listener, StepReport
from everydream_kit.training.run import Run


class StopAfter(Listener):
    """Asks the run to stop after some step, as the Stop button does."""

    def __init__(self, step: int) -> None:
        self.step = step

    def __call__(self, run: Run, report: StepReport) -> None:
        if report.step == self.step:
            run.folder.request("stop")
