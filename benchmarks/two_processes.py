"""Two processes next to one: what adding up the gradients costs, sent during the backward pass or after it.

The two train copies of the embedded base on batches of their own, in three kinds of turns: both, sending during the backward
pass, as a run does; both, sending after it; and the first alone, while the second waits. On a CPU the gradients go through
memory, so this says how much of the sending is hidden and what the bookkeeping costs, and nothing of a network between GPUs.

    OMP_NUM_THREADS=1 torchrun --standalone --nproc_per_node 2 benchmarks/two_processes.py [--rounds 9] [--steps 2]
"""

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
import time
from pathlib import Path

from step_overhead import make_run

from everydream_kit.data.records import StepBatches
from everydream_kit.preflight.rehearsal import make_batch
from everydream_kit.training.gradient_sums import GradientSums
from everydream_kit.training.step import Learner

DURING, AFTER, ALONE = "both, sent during", "both, sent after", "one alone"


class SentAfter(GradientSums):
    """Sends nothing before the backward pass has ended."""

    def watch(self) -> None:
        pass


def take_steps(learner: Learner, batch_size: int, resolution: int, steps: int) -> None:
    batch = make_batch((resolution, resolution), batch_size, with_moments=True)
    work = StepBatches(0, 0, 1, batch_size, batch_size, [batch])
    for step in range(steps):
        learner.set_learning_rates(step)
        learner.backward(batch, work, step)
        learner.update_weights(step)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("rounds", 9), ("steps", 2), ("resolution", 128), ("batch_size", 4)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        run = make_run(Path(folder), options.resolution, options.batch_size)
        learner, ranks = run.learner, run.ranks
        ways = {DURING: learner.gradient_sums, AFTER: SentAfter(learner.parameters(), ranks), ALONE: None}
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(1 + options.rounds):  # the first finds the order of the gradients
            for name, sums in ways.items():
                learner.gradient_sums = sums
                ranks.barrier()
                started = time.perf_counter()
                if name != ALONE or ranks.is_main:
                    take_steps(learner, options.batch_size, options.resolution, options.steps)
                ranks.barrier()
                seconds[name].append((time.perf_counter() - started) / options.steps)
    if ranks.is_main:
        alone = seconds[ALONE][1:]
        for name, values in seconds.items():
            ratios = [one / other for one, other in zip(values[1:], alone, strict=True)]
            print(
                f"{name:20}{statistics.median(values[1:]):8.3f} s a step{statistics.median(ratios):8.2f} times one alone"
            )


if __name__ == "__main__":
    main()
