"""The position of a run: four numbers. Everything else that a resumed run needs is weights, optimizer state, and the config.

`step` counts optimizer updates from the run's beginning, `epoch` and `step_in_epoch` say the same thing in terms of the
epoch plan, so that a resumed run asks the plan for the next step and replays nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from everydream_kit.data.records import StepBatches


@dataclass(frozen=True)
class Position:
    """A place between two optimizer steps.

    Attributes:
        step: optimizer steps done.
        epoch: epochs ended; those without an image count.
        step_in_epoch: optimizer steps done of the current epoch.
        images: images trained on, each use counted.
    """

    step: int = 0
    epoch: int = 0
    step_in_epoch: int = 0
    images: int = 0

    def after(self, work: StepBatches) -> Position:
        """The place after this step."""
        epoch_ended = work.step + 1 == work.num_steps
        return Position(
            step=self.step + 1,
            epoch=work.epoch + 1 + work.num_empty_after if epoch_ended else work.epoch,
            step_in_epoch=0 if epoch_ended else work.step + 1,
            images=self.images + work.num_images,
        )
