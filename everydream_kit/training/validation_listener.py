"""The validation listener: when images are measured, and what follows (best checkpoint, warning, early stopping).

Which images is decided in `held_out_images`, the measurement itself is in `validation`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch

from everydream_kit.data.loader import make_loader
from everydream_kit.training.reports import Listener, ObservedRun, StepReport
from everydream_kit.training.step import sizes_of
from everydream_kit.training.validation import (
    LossCurve,
    once_each,
    timestep_grid,
    validate,
    validation_steps,
)

if TYPE_CHECKING:
    from everydream_kit.config.sample_settings import ValidationGroup
    from everydream_kit.data.dataset import Dataset
    from everydream_kit.data.records import Batch
    from everydream_kit.models.family import Conditioning
    from everydream_kit.training.decisions import Decisions
    from everydream_kit.training.held_out_images import ValidationSet
    from everydream_kit.training.run import Run


class Measurement(Protocol):
    """The mean loss of a dataset, with the live weights or the averaged ones."""

    def __call__(self, dataset: Dataset, *, averaged: bool) -> float: ...


@dataclass(eq=False)
class Validator(Listener):
    """Measures every set when it is due, and before the first step.

    Attributes:
        settings: how often and how it is measured, and when the run ends for lack of improvement.
        sets: what is measured.
        decisions: where an early end is requested.
        measure_loss: of the run.
        has_averages: there is an EMA, which is measured as well.
        save_best: called when the deciding set's loss is the lowest so far.
    """

    name = "validator"

    settings: ValidationGroup
    sets: list[ValidationSet]
    decisions: Decisions
    measure_loss: Measurement
    has_averages: bool
    save_best: Callable[[ObservedRun], None]

    def __post_init__(self) -> None:
        self.curves = {entry.tag: LossCurve() for entry in self.sets}

    def on_start(self, run: ObservedRun) -> None:
        if run.position.step == 0:
            self.measure(run, is_start=True)

    def __call__(self, run: ObservedRun, report: StepReport) -> None:
        due = validation_steps(self.settings.validation_every_n_epochs, report.epoch, report.num_steps_in_epoch)
        if report.step_in_epoch in due:
            self.measure(run)

    def measure(self, run: ObservedRun, *, is_start: bool = False) -> None:
        """Measure every set now."""
        run.journal.set_state("validating")
        for entry in self.sets:
            loss = self.measure_loss(entry.dataset, averaged=False)
            curve = self.curves[entry.tag]
            is_best = curve.add(run.position.step, loss)
            run.journal.scalar(entry.tag, loss, run.position.step)
            averaged = {}
            if self.has_averages:
                averaged["ema_loss"] = self.measure_loss(entry.dataset, averaged=True)
                run.journal.scalar(f"{entry.tag}_ema", averaged["ema_loss"], run.position.step)
            run.journal.report("validation", step=run.position.step, set=entry.tag, loss=loss, best=is_best, **averaged)
            if entry.decides:
                self._follow(run, curve, is_best=is_best and not is_start)
        run.journal.set_state("running")

    def _follow(self, run: ObservedRun, curve: LossCurve, *, is_best: bool) -> None:
        if is_best:
            self.save_best(run)
        if curve.is_rising():
            run.journal.warn(
                f"step {run.position.step}: the validation loss has been rising; the best was {curve.best_loss:.5f} at step "
                f"{curve.best_step}. The model is probably overfitting; ckpts/best holds its best weights."
            )
        if curve.should_stop(self.settings.early_stopping_patience):
            self.decisions.ended_early = True
            run.journal.report(
                "stopping early", step=run.position.step, best_step=curve.best_step, best_loss=curve.best_loss
            )

    def state(self) -> dict[str, Any]:
        return {tag: curve.state() for tag, curve in self.curves.items()}

    def restore(self, state: dict[str, Any]) -> None:
        for tag in self.curves.keys() & state.keys():
            self.curves[tag] = LossCurve.restore(state[tag])


def measure_loss(run: Run, dataset: Dataset, settings: ValidationGroup, *, averaged: bool = False) -> float:
    """The mean loss of a dataset on the fixed grid of timesteps, with the run's live weights, or the averaged (EMA) ones.

    Plain settings: center crops, captions as written, no extra noise; the training's own objective.
    """
    plan = replace(
        run.plan_settings,
        batch_size=settings.validation_batch_size or run.plan_settings.batch_size,
        grad_accum=1,
        num_ranks=1,
        resolutions=run.plan_settings.resolutions[:1],
        rated_dropout_percent=None,
    )
    dataset = once_each(dataset)
    loader = make_loader(
        dataset, plan, seed=settings.validation_seed, fixed=True, background=run.config.background, num_workers=0
    )

    learner = run.learner

    def encode(batch: Batch) -> tuple[torch.Tensor, Conditioning]:
        return learner.encode_images(batch, mean_only=True), learner.encode_captions(batch.captions)

    def predict(
        batch: Batch, timesteps: torch.Tensor, conditioning: Conditioning, noisy_latents: torch.Tensor
    ) -> torch.Tensor:
        with learner.precision.autocast():
            return learner.predict(sizes_of(batch), noisy_latents, timesteps, conditioning)

    with loader, run.sync.full_model(averaged=averaged):
        return validate(
            (batch for work in loader for batch in work.batches),
            keys=lambda batch: [dataset.key(draw.image) for draw in batch.planned.draws],
            encode=encode,
            predict=predict,
            objective=learner.objective,
            timesteps=timestep_grid(run.config.timestep_start, run.config.timestep_end),
            seed=settings.validation_seed,
            modules=[learner.model.denoiser, *learner.model.text_encoders],
        ).mean
