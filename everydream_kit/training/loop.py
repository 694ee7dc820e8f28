"""The training loop, and nothing else. Read it aloud.

A step is one optimizer update over the images of one accumulation window. What a step computes is in `step.py`, what
it is computed with is built in `run_builder.py`, what is reported about it is in the listeners.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from everydream_kit.training.losses import ImageLosses
from everydream_kit.training.position import Position
from everydream_kit.training.reports import Listener, StepReport

if TYPE_CHECKING:
    from everydream_kit.training.control import StopSignal
    from everydream_kit.training.run import Run


def train_loop(run: Run, listeners: Sequence[Listener], stop: StopSignal) -> Position:
    """Train from the run's position to its end, or until someone asks to stop.

    Args:
        run: everything built: model, plan, optimizer ...; its `position` says where to begin.
        listeners: called before and after every step, in this order.
        stop: set by Ctrl-C, SIGTERM, or a request in the run folder; the step in progress is finished.

    Returns:
        Where the run stands now.

    Raises:
        NonFiniteLossError: a loss or a gradient became NaN or infinite; nothing was updated in that step.
        MemoryLimitError: the device ran out of memory.
    """
    learner, clock = run.learner, time.perf_counter()
    before = [listener.before_step for listener in listeners if isinstance(listener, Listener)]  # or a plain function
    for work in run.batches():
        step = run.position.step
        learning_rates = learner.set_learning_rates(step)
        for before_step in before:
            before_step(run, work)
        losses = ImageLosses()
        for batch in work.batches:
            losses.add(batch, learner.backward(batch, work, step))
        update = learner.update_weights(step)  # on the device, which skips it where something is not finite
        losses = run.ranks.gather(losses)  # read while the device updates
        learner.refuse_non_finite(losses, update, step)
        learner.update_ema(step + 1)
        run.position = run.position.after(work)

        seconds = time.perf_counter() - clock - work.encoding_seconds
        report = StepReport.make(
            run.position.step,
            work,
            losses,
            learning_rates,
            gradient_norm=update.gradient_norm,
            gradient_scale=learner.precision.gradient_scale,
            seconds=seconds,
        )
        for listener in listeners:
            listener(run, report)
        if run.sync.sync_ranks(stop.is_set()):
            break
        clock = time.perf_counter()
    return run.position
