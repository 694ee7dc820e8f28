"""When a checkpoint is saved, under which name, and which ones stay.

Saving happens in the background: the weights are copied to host memory between two steps, and a thread writes the copy
while training continues. Where host memory is short, or nothing follows that could continue meanwhile, it is written at
once.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import psutil

from everydream_kit.errors import DiskSpaceError, KitError, may_pass
from everydream_kit.runs import Checkpoint, layout
from everydream_kit.runs.layout import checkpoint_name
from everydream_kit.training.checkpoints import (
    RESUMABLE_KEPT,
    drop_resume_state,
    remove_checkpoint,
    write_checkpoint,
)
from everydream_kit.training.reports import Listener, ObservedRun, StepReport

if TYPE_CHECKING:
    from everydream_kit.config import TrainConfig
    from everydream_kit.training.run_snapshot import Snapshot, Snapshots

DEFAULT_MINUTES = 20.0
"""Saving interval where no rule is given, as in EveryDream 2."""

ROOM_PATIENCE_SECONDS = 1800.0
"""How long the end of a run waits for room on a full disk."""
ROOM_PATIENCE_SECONDS_WITH_OTHERS = 300.0
"""The same where other processes wait for this one, which NCCL lets them for ten minutes."""
ROOM_INTERVAL_SECONDS = 5.0
"""Before the next try."""
WORTH_A_WARNING = 0.1
"""Share of a run's time that it may wait for its checkpoints before it says so."""
NOT_WORTH_A_WARNING_SECONDS = 10.0
"""Seconds of waiting below which nothing is said: the first save of a run comes soon after its first step."""


class Uploader(Protocol):
    """Uploads complete checkpoints in the background (`export/hub`)."""

    def submit(self, folder: Path, step: int, *, last: bool = False) -> bool: ...

    def close(self) -> Any: ...


@dataclass
class SavingRules:
    """When to save. None switches a rule off."""

    every_n_minutes: float | None = None
    every_n_epochs: int | None = None
    every_n_steps: int | None = None
    from_n_epochs: int = 0

    @classmethod
    def of(cls, config: TrainConfig) -> SavingRules:
        """Rules from the settings; twenty minutes where none is given."""
        minutes, epochs, steps = config.ckpt_every_n_minutes, config.save_every_n_epochs, config.save_every_n_steps
        if minutes is None and epochs is None and steps is None:
            minutes = DEFAULT_MINUTES
        return cls(minutes, epochs, steps, config.save_ckpts_from_n_epochs)

    def due(self, report: StepReport, minutes_since_save: float) -> bool:
        """Whether a checkpoint should be saved after this step."""
        if self.every_n_minutes is not None and minutes_since_save >= self.every_n_minutes:
            return True
        if self.every_n_steps is not None and report.step % self.every_n_steps == 0:
            return True
        if not report.epoch_ended or self.every_n_epochs is None:
            return False
        epochs_ended = report.epoch + report.num_epochs_ended
        is_reached = epochs_ended // self.every_n_epochs > report.epoch // self.every_n_epochs
        return is_reached and epochs_ended >= self.from_n_epochs


@dataclass(eq=False)
class Saver(Listener):
    """Saves by rule, on request, and at the end; prunes what is not kept.

    Attributes:
        rules: when.
        snapshots: of the run.
        keep_last_n: how many live-weight checkpoints stay (the best and the last are not counted out); None: all.
        keep_all_resume_state: every checkpoint stays resumable.
        prepend_last: name the final checkpoint `last-...`.
        single_files: folder for single-file checkpoints, or None.
        write_single_file: turns a checkpoint folder into a single file.
        uploader: given each complete checkpoint, or None.
        stop: asked for while the end waits for room, it ends the waiting; or None.
        clock: seconds from any moment on.
    """

    rules: SavingRules
    snapshots: Snapshots
    keep_last_n: int | None = None
    keep_all_resume_state: bool = False
    prepend_last: bool = True
    single_files: Path | None = None
    write_single_file: Callable[[Path, Path], Any] | None = None
    uploader: Uploader | None = None
    stop: threading.Event | None = None
    clock: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        self._files_of: dict[str, list[Path]] = {}  # by checkpoint: single files that this run wrote
        self._unfinished: Path | None = None  # the last checkpoint, while its single file waits for room
        self._to_upload: tuple[Path, int] | None = None  # the last checkpoint and its step, until its samples are made
        self.saved_steps: list[int] = []
        self._began = self._last_save = self.clock()
        self._writer: threading.Thread | None = None
        self._failure: KitError | None = None
        self._waited = 0.0
        self._has_warned = False

    def on_start(self, run: ObservedRun) -> None:
        for event in run.folder.events("saved"):
            files = event.get("files")
            if isinstance(files, list) and files:
                self._files_of[Path(str(event.get("path"))).name] = [Path(str(file)) for file in files]
        self._began = self._last_save = self.clock()

    def __call__(self, run: ObservedRun, report: StepReport) -> None:
        self._report_failure(run)
        if self.rules.due(report, (self.clock() - self._last_save) / 60) and not run.is_complete():
            self.save(run)
            self._warn_of_pending(run)

    def save(self, run: ObservedRun, *, ends: bool = False) -> None:
        """Save a checkpoint of the run as it stands, in the background where there is memory for a copy of it.

        Args:
            ends: nothing comes after this one, so it is waited for.

        Raises:
            DiskSpaceError: only for the one at the end; before, it is a warning and training continues.
        """
        self.wait()
        final = ends and run.is_complete()
        prefix = "last-" if final and self.prepend_last else ""
        name = checkpoint_name(run.config.project_name, run.position.epoch, run.position.step, prefix=prefix)
        started = self.clock()
        snapshot = self.snapshots.take(copy=not ends and _memory_allows(self.snapshots.num_bytes()))
        self._last_save = self.clock()
        last = run.is_complete()  # now: while it is written in the background, the run may end
        if ends or not snapshot.copied:
            self._write(run, snapshot, name, last, ends)
            self._report_failure(run, fatal=ends)
        else:
            self._writer = threading.Thread(target=self._write, args=(run, snapshot, name, last, False), name="saver")
            self._writer.start()
        self._waited += self.clock() - started

    def save_best(self, run: ObservedRun) -> None:
        """Keep the weights as they stand as `ckpts/best`, in place of the best so far."""
        self.wait()
        snapshot = self.snapshots.take(copy=False)
        folder = run.folder.checkpoint(layout.BEST).folder
        try:
            write_checkpoint(folder, snapshot.write_model, expected_bytes=snapshot.model_bytes)
        except (DiskSpaceError, OSError) as problem:
            run.journal.warn(
                f"{problem} Training continues; the best weights so far, of step {snapshot.step}, are not kept."
            )
            return
        run.journal.report("saved", step=snapshot.step, path=str(folder), files=[], best=True)

    def before_finish(self, run: ObservedRun) -> None:
        """Save. Where the disk is full or gone, wait for it: what was trained is nowhere else.

        Other failures are not waited for. A single file that fails leaves a complete checkpoint, so it ends in a warning.

        Raises:
            DiskSpaceError: there was no room for too long, or somebody asked to stop meanwhile.
        """
        run.journal.set_state("saving")
        kept = "The trained state stays in memory, {}, and is saved as soon as there is space. Stopping discards it."
        self._patiently(run, lambda: self.save(run, ends=True), kept)
        name, self._unfinished = self._unfinished, None
        if name is None:
            return
        kept = f"The checkpoint {name} is complete. Writing its single file is retried {{}}, until there is space or you stop."
        try:
            self._patiently(run, lambda: self._write_single_files_again(run, name), kept)
        except (KitError, OSError) as problem:
            self._warn_of_single_file(run, name, problem)

    def on_finish(self, run: ObservedRun) -> None:
        """Upload the last checkpoint, with the samples that were made of it."""
        if self.uploader is not None and self._to_upload is not None:
            self.uploader.submit(*self._to_upload, last=run.is_complete())

    def _patiently(self, run: ObservedRun, save: Callable[[], None], kept: str) -> None:
        """Save; retry while the failure may be temporary, until the time is up or a stop is requested."""
        patience = ROOM_PATIENCE_SECONDS if run.ranks.num_ranks == 1 else ROOM_PATIENCE_SECONDS_WITH_OTHERS
        end = self.clock() + patience
        was_stopped = self._is_stopped()
        has_warned = False
        while True:
            try:
                return save()
            except (KitError, OSError) as problem:
                if not may_pass(problem) or self.clock() >= end or (self._is_stopped() and not was_stopped):
                    raise
                if not has_warned:
                    has_warned = True
                    run.journal.warn(f"{problem} {kept.format(f'for {patience / 60:.0f} minutes from now')}")
            time.sleep(ROOM_INTERVAL_SECONDS)

    def _is_stopped(self) -> bool:
        return self.stop is not None and self.stop.is_set()

    def wait(self) -> None:
        """Wait for a save in progress."""
        if self._writer is not None:
            started = self.clock()
            self._writer.join()
            self._waited += self.clock() - started
            self._writer = None

    def close(self) -> None:
        self.wait()
        if self.uploader is not None:
            self.uploader.close()

    def _write(self, run: ObservedRun, snapshot: Snapshot, name: str, last: bool, ends: bool) -> None:
        folder = run.folder.checkpoint(name).folder
        started = self.clock()
        try:
            write_checkpoint(
                folder,
                snapshot.write_model,
                tensors=snapshot.resume_tensors,
                state=snapshot.state,
                expected_bytes=snapshot.num_bytes,
            )
            if snapshot.write_ema is not None:
                write_checkpoint(run.folder.checkpoint(name).averaged.folder, snapshot.write_ema)
        except KitError as error:
            self._failure = error
            return
        except OSError as error:  # a disk that is gone: nothing of it can be asked
            self._failure = DiskSpaceError(f"{folder}: could not be written: {error}.")
            self._failure.__cause__ = error
            return
        self.saved_steps.append(snapshot.step)
        files: list[Path] = []
        try:
            files = self._write_single_files(folder)
        except (KitError, OSError) as error:  # the checkpoint is complete all the same
            self._unfinished = folder
            if not (ends and may_pass(error)):
                self._unfinished = None
                self._warn_of_single_file(run, folder, error)
        run.journal.report(
            "saved",
            step=snapshot.step,
            path=str(folder),
            files=[str(path) for path in files],
            seconds=round(self.clock() - started, 3),
            waited_seconds=round(self._waited, 3),  # of training, for all checkpoints so far
        )
        self._prune(run)
        if ends:
            self._to_upload = (folder, snapshot.step)
        elif self.uploader is not None:
            self.uploader.submit(folder, snapshot.step, last=last)

    def _write_single_files(self, folder: Path) -> list[Path]:
        if self.single_files is None or self.write_single_file is None:
            return []
        self.single_files.mkdir(parents=True, exist_ok=True)
        checkpoint = Checkpoint.at(folder)
        written = []
        for source in (one for one in (checkpoint, checkpoint.averaged) if one.exists):
            target = self._single_file_path(folder, source.name)
            self.write_single_file(source.folder, target)
            written.append(target)
        self._files_of[folder.name] = written
        return written

    def _single_file_path(self, folder: Path, stem: str) -> Path:
        """Where a single file goes: never over one of another run, whose project and step may be the same."""
        assert self.single_files is not None
        own = {path.absolute() for path in self._files_of.get(folder.name, [])}
        path, number = self.single_files / f"{stem}.safetensors", 1
        while os.path.lexists(path) and path.absolute() not in own:
            number += 1
            path = self.single_files / f"{stem}-{number}.safetensors"
        return path

    def _write_single_files_again(self, run: ObservedRun, folder: Path) -> None:
        files = self._write_single_files(folder)
        run.journal.report("saved", step=run.position.step, path=str(folder), files=[str(path) for path in files])

    def _warn_of_single_file(self, run: ObservedRun, folder: Path, problem: Exception) -> None:
        run.journal.warn(
            f"{problem} The checkpoint {folder} is complete; only its single file is missing. Write it with: "
            f"everydream export {folder}"
        )

    def _prune(self, run: ObservedRun) -> None:
        """Latest last: the two latest stay resumable, `keep_last_n` stay at all."""
        live = run.folder.checkpoints(averaged=False)
        if not self.keep_all_resume_state:
            for checkpoint in live[:-RESUMABLE_KEPT]:
                drop_resume_state(checkpoint)
        if self.keep_last_n is not None:
            for checkpoint in live[: -self.keep_last_n]:
                for one in (checkpoint, checkpoint.averaged):
                    if one.exists:
                        remove_checkpoint(one)
                for file in self._files_of.pop(checkpoint.name, []):
                    with contextlib.suppress(OSError):  # the folder of single files may be gone
                        file.unlink()

    def _warn_of_pending(self, run: ObservedRun) -> None:
        """Once, where saving costs more than a tenth of the run."""
        share = self._waited / max(self.clock() - self._began, 1e-9)
        if self._has_warned or self._waited < NOT_WORTH_A_WARNING_SECONDS or share <= WORTH_A_WARNING:
            return
        self._has_warned = True
        run.journal.warn(
            f"Training has waited {self._waited:.0f} s for its checkpoints, {share:.0%} of its time so far. Save less often "
            "(ckpt_every_n_minutes, save_every_n_epochs, save_every_n_steps), or put logdir on a faster disk."
        )

    def _report_failure(self, run: ObservedRun, *, fatal: bool = False) -> None:
        failure, self._failure = self._failure, None
        if failure is None:
            return
        if fatal or not isinstance(failure, DiskSpaceError):
            raise failure
        run.journal.warn(f"{failure} Training continues and saves again later.")


def _memory_allows(num_bytes: int) -> bool:
    """Room for one more copy of the weights in host memory, with half as much again to spare."""
    return int(psutil.virtual_memory().available) > 1.5 * num_bytes
