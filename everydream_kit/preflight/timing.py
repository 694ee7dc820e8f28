"""The first measured steps of a run correct what was estimated at once: one line in the log, one event for whoever
watches.

Where the run folder holds a `plan.json` (whoever starts a run may put one there), it is corrected and logged next to
the estimate.
"""

from __future__ import annotations

import statistics

from everydream_kit.preflight.units import cost, duration
from everydream_kit.training.reports import Listener, ObservedRun, StepReport

WARM_UP_STEPS = 2
MEASURED_STEPS = 8


class MeasuredPlan(Listener):
    """Times the steps after the first two of this session and reports once what the rest will take, by their median."""

    def __init__(self) -> None:
        self._seconds: list[float] = []

    def __call__(self, run: ObservedRun, report: StepReport) -> None:
        enough = WARM_UP_STEPS + MEASURED_STEPS
        if len(self._seconds) < enough:
            self._seconds.append(report.seconds)
            if len(self._seconds) == enough:
                self._report(run, report, statistics.median(self._seconds[WARM_UP_STEPS:]))

    def _report(self, run: ObservedRun, report: StepReport, seconds_per_step: float) -> None:
        left = max(0, run.num_steps - report.step) * seconds_per_step
        plan = run.folder.plan()  # made before the run, or nothing
        usd = (plan.get("price") or {}).get("usd_per_hour")
        estimated = (plan.get("step_seconds") or {}).get("seconds")
        words = f"{seconds_per_step:.2f} s a step: about {duration(left)} of training left"
        if usd is not None:
            words += f", about {cost(usd * left / 3600)}"
        if estimated is not None:
            words += f" (the estimate was {estimated:.2f} s a step)"
        run.journal.note(words)
        run.journal.report(
            "plan",
            step=report.step,
            seconds_per_step=round(seconds_per_step, 4),
            seconds_left=round(left, 1),
            cost_left_usd=None if usd is None else round(usd * left / 3600, 4),
            estimated_seconds_per_step=estimated,
            line=words,
        )
