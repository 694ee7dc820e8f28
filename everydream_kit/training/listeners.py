"""Which listeners a run has, in the order in which they are called.

The order matters: the log comes before whatever may take long, validation before saving (it decides what is best), saving
before the requests from outside.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from everydream_kit.data.epoch_plan import plan_epoch
from everydream_kit.data.report import write_undersized
from everydream_kit.training.checkpoint_saving import Saver, SavingRules, Uploader
from everydream_kit.training.control import ControlFile, StopSignal
from everydream_kit.training.live import LiveSettingsReader
from everydream_kit.training.plugins import PluginListener
from everydream_kit.training.reports import (
    BestEffort,
    ImageTable,
    Listener,
    LossLog,
    ObservedRun,
    ProgressBar,
    StatusFile,
    StepReport,
)
from everydream_kit.training.run_snapshot import Snapshots
from everydream_kit.training.sampling_listener import Sampler
from everydream_kit.training.validation_listener import Validator, measure_loss

if TYPE_CHECKING:
    from everydream_kit.training.run import Run


def build_listeners(run: Run, stop: StopSignal) -> list[Listener]:
    """The run's listeners; none but the main process has any."""
    config = run.config
    if not run.ranks.is_main:
        return []
    sampler = build_sampler(run, stop)
    saver = build_saver(run, stop)
    listeners: list[Listener] = [
        LossLog(config.log_step),
        BestEffort(ImageTable()),
        StatusFile(),
        BestEffort(ProgressBar()),
        BestEffort(UndersizedList()),
    ]
    if config.write_schedule:
        listeners.append(BestEffort(ScheduleWriter()))
    if config.load_settings_every_epoch:
        listeners.append(BestEffort(LiveSettingsReader(sampler, saver, run.decisions)))
    if run.plugins:
        listeners.append(PluginListener(run.plugins, run.learner))
    if run.validation_sets:
        listeners.append(
            Validator(
                config,
                run.validation_sets,
                run.decisions,
                measure_loss=partial(measure_loss, run, settings=config),
                has_averages=run.learner.ema is not None,
                save_best=saver.save_best,
            )
        )
    control = ControlFile(stop, {"save": saver.save, "sample": sampler.draw})
    listeners += [sampler, saver, BestEffort(control)]
    return listeners


def build_sampler(run: Run, stop: StopSignal) -> Sampler:
    """What generates samples while training, with the live weights, the averaged ones, or both."""
    config = run.config
    averaged = run.learner.ema is not None and config.ema_sample_ema_model
    return Sampler(
        Path(config.sample_prompts),
        run.sync,
        every_n_steps=config.sample_steps,
        before_training=config.sample_before_training,
        live=not averaged or config.ema_sample_nonema_model,
        averaged=averaged,
        stop=stop,
    )


def build_saver(run: Run, stop: StopSignal | None = None) -> Saver:
    """What saves checkpoints and single files, by the rules of the config."""
    config = run.config
    precision = "fp32" if config.save_full_precision else "fp16"
    return Saver(
        SavingRules.of(config),
        Snapshots(run),
        keep_last_n=config.keep_last_n,
        keep_all_resume_state=config.save_optimizer,
        prepend_last=not config.no_prepend_last,
        single_files=None if config.no_save_ckpt else Path(config.save_ckpt_dir or "."),
        write_single_file=lambda source, target: _export(source, target, precision),
        uploader=build_uploader(run),
        stop=stop,
    )


def build_uploader(run: Run) -> Uploader | None:
    """Uploads checkpoints to the Hub while training continues; a problem there is a warning and never stops the run.

    Raises:
        HubError: the repository cannot be written to. Better known before training than after.
    """
    config = run.config
    if config.push_to is None:
        return None
    from everydream_kit.export.hub import HubUploader, check_hub_access

    access = check_hub_access(config.push_to)

    def report(kind: str, step: int, message: str) -> None:
        if kind == "warning":
            run.journal.warn(message)
        else:
            run.journal.report(kind, step=step, message=message)

    return HubUploader(access.repo_id, config.push_every, report=report)


class UndersizedList(Listener):
    """Writes `undersized_images.txt` at the start: images that have to be enlarged for their bucket, and how much."""

    def on_start(self, run: ObservedRun) -> None:
        write_undersized(run.folder.undersized_path, run.dataset, run.plan_settings)


class ScheduleWriter(Listener):
    """Writes each epoch's plan before it is run: `ep<N>_batch_schedule.txt`, and a ledger of uses in `ep<N>_uses.txt`."""

    def on_start(self, run: ObservedRun) -> None:
        self._write(run, run.position.epoch)

    def __call__(self, run: ObservedRun, report: StepReport) -> None:
        if report.epoch_ended and not run.is_complete():
            self._write(run, run.position.epoch)

    def _write(self, run: ObservedRun, epoch: int) -> None:
        plan = plan_epoch(run.dataset, run.plan_settings, epoch)
        plan.write_schedule(run.folder.schedule_path(epoch), run.dataset)
        plan.write_ledger(run.folder.uses_path(epoch), run.dataset)


def _export(source: Path, target: Path, precision: str) -> None:
    from everydream_kit.export.single_file_export import export_checkpoint

    export_checkpoint(source, target, precision=precision)
