"""What is reported about a run while it trains: one report a step, and the listeners that write it down.

A `Listener` is called after every optimizer step with a `StepReport`. It does not edit settings and may carry state of its
own that is saved with the run's. Here are the listeners that write to the run folder: `events.jsonl`, `status.json`,
TensorBoard, and the progress bar. Sampling, saving and validation are listeners as well, in files of their own.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from everydream_kit.runs.resume_state import number_of
from everydream_kit.training.memory_measures import memory_in_use

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from everydream_kit.config import TrainConfig
    from everydream_kit.data.dataset import Dataset
    from everydream_kit.data.epoch_plan import PlanSettings
    from everydream_kit.data.records import Batch, StepBatches
    from everydream_kit.runs import RunFolder
    from everydream_kit.training.journal import Journal
    from everydream_kit.training.losses import ImageLosses
    from everydream_kit.training.position import Position
    from everydream_kit.training.ranks import Ranks


@dataclass(frozen=True)
class StepReport:
    """What happened in one optimizer step.

    Attributes:
        step: optimizer steps done, this one included.
        epoch: the epoch this step belonged to, from 0.
        step_in_epoch, num_steps_in_epoch: its place there, from 0.
        epoch_ended: it was the last one of its epoch.
        losses: one loss an image.
        learning_rates: of each trained part, as applied in this step.
        gradient_norm: L2 norm of all gradients before clipping, or None where nobody wanted it.
        num_images: images over all processes.
        num_epochs_ended: since the step before; more than one where epochs without an image follow.
        batches: the step's micro-batches of this process.
        seconds: from the end of the step before, loader included; saving, sampling and encoding not.
        encoding_seconds: what went into latents that are in the cache from now on.
    """

    step: int
    epoch: int
    step_in_epoch: int
    num_steps_in_epoch: int
    epoch_ended: bool
    losses: ImageLosses
    learning_rates: dict[str, float]
    gradient_norm: float | None
    gradient_scale: float | None
    num_images: int
    seconds: float
    encoding_seconds: float = 0.0
    num_epochs_ended: int = 0
    batches: Sequence[Batch] = field(default=(), repr=False, compare=False)

    @classmethod
    def make(
        cls,
        step: int,
        work: StepBatches,
        losses: ImageLosses,
        learning_rates: dict[str, float],
        *,
        gradient_norm: float | None,
        gradient_scale: float | None,
        seconds: float,
    ) -> StepReport:
        """The report of the step that has just been done.

        Args:
            step: optimizer steps done, this one included.
        """
        epoch_ended = work.step + 1 == work.num_steps
        return cls(
            step=step,
            epoch=work.epoch,
            step_in_epoch=work.step,
            num_steps_in_epoch=work.num_steps,
            epoch_ended=epoch_ended,
            num_epochs_ended=1 + work.num_empty_after if epoch_ended else 0,
            losses=losses,
            learning_rates=learning_rates,
            gradient_norm=gradient_norm,
            gradient_scale=gradient_scale,
            num_images=work.num_images,
            seconds=seconds,
            encoding_seconds=work.encoding_seconds,
            batches=work.batches,
        )


class ObservedRun(Protocol):
    """What listeners read of a run (`training.run.Run`). They change nothing of it.

    Those that need more are given it when they are made: the saver snapshots, the sampler the model, the validator a measurement.
    What a listener may decide about the run is in `Decisions`.
    """

    @property
    def config(self) -> TrainConfig: ...
    @property
    def folder(self) -> RunFolder: ...
    @property
    def journal(self) -> Journal: ...
    @property
    def ranks(self) -> Ranks: ...
    @property
    def seed(self) -> int: ...
    @property
    def dataset(self) -> Dataset: ...
    @property
    def plan_settings(self) -> PlanSettings: ...
    @property
    def num_steps(self) -> int: ...
    @property
    def position(self) -> Position: ...
    def is_complete(self) -> bool: ...


class Listener:
    """Receives the reports of a run. Every method is optional; `state` and `restore` carry what must survive a resume."""

    name = ""
    """Key of its state in the checkpoint; empty where it has none."""

    def on_start(self, run: ObservedRun) -> None:
        """Before the first step (again after a resume)."""

    def before_step(self, run: ObservedRun, work: StepBatches) -> None:
        """Before each step, when its images are loaded."""

    def __call__(self, run: ObservedRun, report: StepReport) -> None:
        """After each step."""

    def before_finish(self, run: ObservedRun) -> None:
        """As `on_finish`, before that of any listener: what was trained is saved before anything else can fail."""

    def on_finish(self, run: ObservedRun) -> None:
        """After the last step, or after a stop that was asked for. Not after an error."""

    def close(self) -> None:
        """In every case, at the very end: give back files and threads."""

    def state(self) -> dict[str, Any]:
        """What a resumed run needs, as JSON values."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Take up a saved state."""


class BestEffort(Listener):
    """A listener that a run can do without: where it cannot read or write, because a disk is full or gone, the run
    continues."""

    def __init__(self, listener: Listener) -> None:
        self.listener = listener
        self.name = listener.name
        self._has_warned = False

    def on_start(self, run: ObservedRun) -> None:
        self._try(run, self.listener.on_start, run)

    def before_step(self, run: ObservedRun, work: StepBatches) -> None:
        self._try(run, self.listener.before_step, run, work)

    def __call__(self, run: ObservedRun, report: StepReport) -> None:
        self._try(run, self.listener, run, report)

    def before_finish(self, run: ObservedRun) -> None:
        self._try(run, self.listener.before_finish, run)

    def on_finish(self, run: ObservedRun) -> None:
        self._try(run, self.listener.on_finish, run)

    def close(self) -> None:
        with contextlib.suppress(OSError):  # reported at the last step
            self.listener.close()

    def state(self) -> dict[str, Any]:
        return self.listener.state()

    def restore(self, state: dict[str, Any]) -> None:
        self.listener.restore(state)

    def _try(self, run: ObservedRun, report: Callable[..., object], *arguments: object) -> None:
        try:
            report(*arguments)
        except OSError as problem:
            if not self._has_warned:
                self._has_warned = True
                run.journal.warn(
                    f"{type(self.listener).__name__} cannot read or write: {problem}. Training continues without."
                )


class Averages:
    """Running sums between two points of a log."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.loss_sum, self.images, self.seconds, self.encoding_seconds, self.steps = 0.0, 0, 0.0, 0.0, 0

    def add(self, report: StepReport) -> None:
        self.loss_sum += report.losses.mean * report.num_images
        self.images += report.num_images
        self.seconds += report.seconds
        self.encoding_seconds += report.encoding_seconds
        self.steps += 1

    @property
    def loss(self) -> float:
        return self.loss_sum / max(1, self.images)

    @property
    def images_per_second(self) -> float:
        return self.images / self.seconds if self.seconds else 0.0


class LossLog(Listener):
    """Loss, learning rates and speed to `events.jsonl` and TensorBoard, every `log_step` steps and at each epoch's end."""

    name = "loss_log"

    def __init__(self, log_step: int) -> None:
        self.log_step = log_step
        self.since_log, self.epoch = Averages(), Averages()

    def __call__(self, run: ObservedRun, report: StepReport) -> None:
        self.since_log.add(report)
        self.epoch.add(report)
        if report.step % self.log_step == 0 or report.epoch_ended:
            self._log_point(run, report)
        if report.epoch_ended:
            minutes = self.epoch.seconds / 60
            run.journal.report(
                "epoch",
                step=report.step,
                epoch=report.epoch,
                loss=self.epoch.loss,
                minutes=minutes,
                encoding_minutes=self.epoch.encoding_seconds / 60,
            )
            run.journal.scalar("loss/epoch", self.epoch.loss, report.step)
            run.journal.scalar("performance/minutes per epoch", minutes, report.step)
            self.epoch.clear()

    def _log_point(self, run: ObservedRun, report: StepReport) -> None:
        average, memory = self.since_log, memory_in_use(run.ranks.device)
        run.journal.report(
            "loss",
            step=report.step,
            epoch=report.epoch,
            loss=average.loss,
            lr=report.learning_rates,
            images_per_second=round(average.images_per_second, 3),
            memory_bytes=memory,
            gradient_norm=report.gradient_norm,
        )
        rates = ", ".join(f"lr {part} {rate:.4g}" for part, rate in report.learning_rates.items())
        run.journal.note(
            f"step {report.step}, epoch {report.epoch + 1}: loss {average.loss:.4f}, {rates}, "
            f"{average.images_per_second:.2f} images/s"
        )
        run.journal.scalar("loss/log_step", average.loss, report.step)
        for part, rate in report.learning_rates.items():
            run.journal.scalar(f"hyperparameter/lr {part.replace('_', ' ')}", rate, report.step)
        if report.gradient_scale is not None:
            run.journal.scalar("hyperparameter/grad scale", report.gradient_scale, report.step)
        if report.gradient_norm is not None:
            run.journal.scalar("optimizer/gradient norm", report.gradient_norm, report.step)
        run.journal.scalar("performance/images per second", average.images_per_second, report.step)
        run.journal.scalar("performance/vram", memory / 2**20, report.step)
        average.clear()

    def state(self) -> dict[str, Any]:
        # copies: the checkpoint is written in the background, while the sums continue
        return {name: dict(vars(getattr(self, name))) for name in ("since_log", "epoch")}

    def restore(self, state: dict[str, Any]) -> None:
        for averages, saved in ((self.since_log, state["since_log"]), (self.epoch, state["epoch"])):
            vars(averages).update({name: number_of(saved, name) for name in vars(averages)})


class StatusFile(Listener):
    """`status.json`: where the run is now, for everyone who watches; at most four times a second."""

    def __init__(self, interval_seconds: float = 0.25) -> None:
        self.interval_seconds = interval_seconds
        self._last_written = -math.inf
        self._speed: float | None = None

    def on_start(self, run: ObservedRun) -> None:
        run.journal.set_state("running")

    def __call__(self, run: ObservedRun, report: StepReport) -> None:
        speed = report.seconds
        self._speed = speed if self._speed is None else 0.9 * self._speed + 0.1 * speed
        if time.monotonic() - self._last_written < self.interval_seconds and report.step < run.num_steps:
            return
        self._last_written = time.monotonic()
        remaining = max(0, run.num_steps - report.step)
        run.journal.set_state(
            "running",
            step=report.step,
            epoch=report.epoch,
            loss=report.losses.mean,
            images_per_second=round(report.num_images / self._speed, 3) if self._speed else None,
            eta_seconds=round(remaining * self._speed, 1),
            memory_bytes=memory_in_use(run.ranks.device),
        )


class ProgressBar(Listener):
    """A bar on the terminal with loss, images per second and the time left; plain lines where there is no terminal."""

    def __init__(self) -> None:
        self._bar: Any = None

    def on_start(self, run: ObservedRun) -> None:
        from tqdm import tqdm

        self._bar = tqdm(
            total=run.num_steps,
            initial=run.position.step,
            unit="step",
            dynamic_ncols=True,
            mininterval=0.5 if os.isatty(2) else 10.0,
            smoothing=0.1,
        )

    def __call__(self, run: ObservedRun, report: StepReport) -> None:
        speed = report.num_images / report.seconds if report.seconds else 0.0
        self._bar.set_description(f"epoch {report.epoch + 1}", refresh=False)
        self._bar.set_postfix_str(f"loss {report.losses.mean:.4f}, {speed:.1f} images/s", refresh=False)
        self._bar.update()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


class ImageTable(Listener):
    """Mean loss and count of each image over an epoch: `losses/ep<N>.json`, highest first, the worst twenty apart."""

    name = "picture_table"

    def __init__(self, num_worst: int = 20) -> None:
        self.num_worst = num_worst
        self._rows: dict[str, list[Any]] = {}  # by the image's key: sum of losses, uses, path

    def __call__(self, run: ObservedRun, report: StepReport) -> None:
        losses = report.losses
        for image, loss, path in zip(losses.images, losses.losses, losses.paths, strict=True):
            row = self._rows.setdefault(run.dataset.key(image), [0.0, 0, path])
            row[0] += loss
            row[1] += 1
        if report.epoch_ended:
            try:
                self._write(run, report.epoch)
            finally:
                self._rows.clear()

    def _write(self, run: ObservedRun, epoch: int) -> None:
        means = sorted(((total / count, path, count) for total, count, path in self._rows.values()), reverse=True)
        rows = [{"path": path, "mean_loss": round(mean, 6), "count": count} for mean, path, count in means]
        path = run.folder.losses_path(epoch)
        path.parent.mkdir(exist_ok=True)
        with path.open("w", encoding="utf-8") as file:
            json.dump({"epoch": epoch, "worst": rows[: self.num_worst], "images": rows}, file, indent=1)

    def state(self) -> dict[str, Any]:
        return {"rows": {key: list(row) for key, row in self._rows.items()}}

    def restore(self, state: dict[str, Any]) -> None:
        rows = {
            key: (float(total), int(count), str(path)) for key, (total, count, path) in state.get("rows", {}).items()
        }
        if not all(count > 0 and math.isfinite(total) for total, count, _ in rows.values()):
            raise ValueError("rows: not those of images")
        self._rows = {key: list(row) for key, row in rows.items()}
