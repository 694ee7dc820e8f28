"""A run, built and ready: what it trains on, what it trains, and where it stands.

What a step computes is the learner's (`step`), where its processes meet is `sync`, what is written of it is taken by
`run_snapshot`, and how its parts are made is in `run_builder`. Here are the batches, the position and the end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from everydream_kit.data.loader import make_loader
from everydream_kit.training.position import Position

if TYPE_CHECKING:
    from everydream_kit.config import TrainConfig
    from everydream_kit.data.cache import LatentCache
    from everydream_kit.data.dataset import Dataset
    from everydream_kit.data.epoch_plan import PlanSettings
    from everydream_kit.data.records import StepBatches
    from everydream_kit.runs import RunFolder
    from everydream_kit.training.decisions import Decisions
    from everydream_kit.training.file_hashes import OpenFile
    from everydream_kit.training.held_out_images import ValidationSet
    from everydream_kit.training.journal import Journal
    from everydream_kit.training.ranks import Ranks
    from everydream_kit.training.reports import Listener
    from everydream_kit.training.step import Learner, Schedules, Weights
    from everydream_kit.training.sync import RankSync


@dataclass
class Run:
    """Everything that one training run consists of. The loop changes `position` alone.

    Attributes:
        num_steps: estimated: with ratings or fractional multipliers, epochs differ by a few steps.
        make_schedules: the learning rates of a run of so many steps.
        write_model: writes a checkpoint's model files into a folder, with these weights of what is trained.
        loader_options: of `make_loader`, beyond what the run itself knows.
        validation_sets: what the loss is measured on; none: it is not measured.
    """

    config: TrainConfig
    folder: RunFolder
    journal: Journal
    ranks: Ranks
    seed: int
    dataset: Dataset
    plan_settings: PlanSettings
    num_steps: int
    make_schedules: Callable[[int], Schedules]
    learner: Learner
    sync: RankSync
    write_model: Callable[[Path, Weights, OpenFile], None]
    latent_cache: LatentCache | None = None
    loader_options: dict[str, Any] = field(default_factory=dict)
    validation_sets: list[ValidationSet] = field(default_factory=list)
    plugins: list[Any] = field(default_factory=list)
    listeners: list[Listener] = field(default_factory=list)
    position: Position = field(default_factory=Position)

    def __post_init__(self) -> None:
        self.resolve_steps(self.num_steps)

    def resolve_steps(self, num_steps: int) -> None:
        """Set how many steps the run has; schedules that end with it follow."""
        self.num_steps = num_steps
        self.learner.schedules = self.make_schedules(num_steps)

    @property
    def decisions(self) -> Decisions:
        """What listeners decide."""
        return self.learner.decisions

    def is_complete(self) -> bool:
        """Whether nothing is left to do."""
        by_epochs = self.position.epoch >= self.config.max_epochs
        by_steps = self.config.max_steps is not None and self.position.step >= self.config.max_steps
        return by_epochs or by_steps or self.decisions.ended_early

    def batches(self) -> Iterator[StepBatches]:
        """The work of each optimizer step from the run's position to its end. Epochs without an image are skipped."""
        loader = make_loader(
            self.dataset,
            self.plan_settings,
            seed=self.seed,
            start_epoch=self.position.epoch,
            start_step=self.position.step_in_epoch,
            num_epochs=self.config.max_epochs - self.position.epoch,
            rank=self.ranks.rank,
            latent_cache=self.latent_cache,
            pin_memory=self.ranks.device.type == "cuda",
            **self.loader_options,
        )
        num_reported = 0
        try:
            for work in loader:
                for problem in loader.problems[num_reported:]:  # the loader has logged them; these are the run's events
                    self.journal.report("warning", message=str(problem))
                num_reported = len(loader.problems)
                yield work
                if self.position.step_in_epoch == 0 and work.num_empty_after:
                    self.journal.note(_skipped_epochs(work))
                if self.is_complete():
                    return
        finally:
            loader.close()


def _skipped_epochs(work: StepBatches) -> str:
    first, last = work.epoch + 2, work.epoch + 1 + work.num_empty_after
    which = f"Epoch {first} has" if first == last else f"Epochs {first} to {last} have"
    return f"{which} no image, since multiply is so small, and the run passes over them."
