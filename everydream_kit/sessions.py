"""The life of a run: starting, resuming, ending, whatever happens in between.

A session is one process's work on a run folder. However it ends (finished, stopped, failed), `status.json` says so and the
folder holds every complete checkpoint; an error never triggers a save.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from everydream_kit import __version__
from everydream_kit.atomic import write_atomic
from everydream_kit.config import TrainConfig, config_warnings, facts
from everydream_kit.errors import CheckpointError, ConfigError, JobError, KitError
from everydream_kit.foreign import read_origin
from everydream_kit.identity import Process, is_running
from everydream_kit.locks import hold
from everydream_kit.plain_text import PlainFormatter
from everydream_kit.preflight.auto_settings import memory_check, resolve_auto_settings
from everydream_kit.preflight.timing import MeasuredPlan
from everydream_kit.runs import DEFAULT_LOGDIR, ENDED_STATES, Checkpoint, RunFolder, find_run
from everydream_kit.runs.layout import RUN_FOLDER_VARIABLE
from everydream_kit.runs.resume_state import RESTORE_ERRORS, State
from everydream_kit.runs.run_folder import FOREIGN_HEARTBEAT_SECONDS, is_fresh
from everydream_kit.settings import give_again, load_config, read_changes, read_settings, with_side_files
from everydream_kit.start_folder import KEY as START_FOLDER_KEY
from everydream_kit.start_folder import read_start_folder, with_paths_from
from everydream_kit.training.caching import require_output_folders
from everydream_kit.training.checkpoints import choose_checkpoint, load_resume_tensors, sweep, sweep_dead_runs
from everydream_kit.training.control import StopSignal, signals_stop
from everydream_kit.training.journal import Journal
from everydream_kit.training.listeners import build_listeners
from everydream_kit.training.loop import train_loop
from everydream_kit.training.memory_measures import explain_out_of_memory, is_out_of_memory
from everydream_kit.training.optimizers import restore_optimizer
from everydream_kit.training.progress import StopRequested
from everydream_kit.training.ranks import Ranks
from everydream_kit.training.reports import Listener
from everydream_kit.training.resuming import refuse_other_training, resolve_position, warn_of_rates
from everydream_kit.training.run import Run
from everydream_kit.training.run_builder import build_run
from everydream_kit.training.sharding import divide_optimizer_state
from everydream_kit.training.speed_choice import CHOSEN as CHOSEN_BY_SPEED
from everydream_kit.training.speed_choice import SpeedTrial
from everydream_kit.training.start_checks import check_start
from everydream_kit.training.summary import library_versions

ORPHANS_SECONDS = 20.0
"""How long a session waits for the lock of a run whose process is gone."""


def train(
    config: TrainConfig | dict[str, Any] | str | Path,
    *,
    listeners: Sequence[Listener] = (),
    resume_from: RunFolder | str | Path | None = None,
) -> RunFolder:
    """Train, in this process, and return the run's folder when it has ended.

    Args:
        config: settings, or the path of a settings file.
        listeners: called after every step, after the kit's own.
        resume_from: continue with this run instead of starting a new one.

    Raises:
        KitError: a setting, the dataset or the model cannot be used, or training had to end; the message says how to
            continue.
    """
    if resume_from is not None:
        return resume(resume_from.folder if isinstance(resume_from, RunFolder) else resume_from, listeners=listeners)
    config = as_config(config)
    check_start(config)
    ranks = Ranks.find(config.gpuid)
    if ranks.is_main:
        sweep_dead_runs(config.logdir)
    folder = _new_folder(config, ranks)
    with _hold_folder(folder, ranks):
        return _session(config, folder, ranks, listeners, checkpoint=None, state=None)


def resume(
    run: str | Path | None = None,
    *,
    logdir: str | Path = DEFAULT_LOGDIR,
    changes: dict[str, Any] | None = None,
    listeners: Sequence[Listener] = (),
    adapter_base: str | Path | None = None,
) -> RunFolder:
    """Continue a run from its latest complete checkpoint, as if it had never stopped.

    Args:
        run: a run folder, its name, a checkpoint inside it, `hf://me/jets` for a run that was pushed while training, or
            None for the latest run in `logdir`.
        changes: settings that are different from here on. They are logged, and written when the run really continues; the
            file before is kept as `config-<step>.json`. For a fetched run also those that have to be given again on this
            machine (docs/hub.md).
        adapter_base: for a run that trains a LoRA or new words, its base model, where that is not in its place any more.

    Raises:
        JobError: there is no such run.
        CheckpointError: no checkpoint can be resumed from, or a setting cannot change on the way.
        ConfigError: a setting of a fetched run has to be given again, or a value is wrong.
    """
    if isinstance(run, str) and run.startswith("hf://"):
        from everydream_kit.export.hub import fetch_run

        run = fetch_run(run, logdir, given=changes or {})
    folder = find_run(run, logdir)
    changes, warnings = read_changes(give_again(folder.folder, changes or {}))
    config, _ = load_config(folder.config_path)
    config, notes = with_paths_from(config, read_start_folder(folder.folder))
    warnings += notes
    ranks = Ranks.find(changes.get("gpuid", config.gpuid))
    with _hold_folder(folder, ranks):
        if ranks.is_main:
            sweep(folder.checkpoints_folder)
        ranks.barrier()
        checkpoint, state = choose_checkpoint(folder, warnings.append)
        changed, changes = _changed(config, changes, folder)
        how: dict[str, Any] = {"checkpoint": checkpoint, "adapter_base": adapter_base, "state": state}
        return _session(changed, folder, ranks, listeners, **how, changes=changes, warnings=warnings)


@contextmanager
def _hold_folder(folder: RunFolder, ranks: Ranks) -> Iterator[None]:
    """Be the only session of a run folder, from before anything in it is changed until everything is written.

    Raises:
        JobError: the run is in progress, here or on another machine that shares the disk.
    """
    if not ranks.is_main:
        yield
        return
    status = folder.status()
    is_here = is_running(known) if (known := Process.from_json(status)) is not None else False
    process = status.get("pid", "unknown")
    refusal = f"{folder.folder}: this run is in progress (process {process}). Stop it first, or name another run."
    # After a kill the loader's processes hold the lock until they notice, which takes them up to 5 s.
    patience = 0.0 if is_here else ORPHANS_SECONDS
    with hold(folder.lock_path, refusal, wait_seconds=patience):
        elsewhere = is_here is None and status.get("host") != platform.node()
        if elsewhere and is_fresh(status) and status.get("state") not in ENDED_STATES:
            raise JobError(
                f"{folder.folder}: this run is in progress on another machine, {status.get('host')}, which reported "
                f"less than {FOREIGN_HEARTBEAT_SECONDS:.0f} seconds ago. Stop it there, or wait if that machine is gone."
            )
        yield


def as_config(config: TrainConfig | dict[str, Any] | str | Path) -> TrainConfig:
    """Settings in any form that people give them, with what their side files say. Raises: ConfigError."""
    read, warnings = read_settings(config)
    read, more = with_side_files(read)
    for warning in [*warnings, *more]:
        logging.getLogger(__name__).warning("%s", warning)
    return read


def _session(
    config: TrainConfig,
    folder: RunFolder,
    ranks: Ranks,
    listeners: Sequence[Listener],
    *,
    checkpoint: Checkpoint | None,
    state: State | None,
    adapter_base: str | Path | None = None,
    changes: Mapping[str, Any] | None = None,
    warnings: Sequence[str] = (),
) -> RunFolder:
    """Build the run and train it.

    Settings of a new run are written at once; those of a resumed one when everything has accepted them: what is refused
    must not stand in the way of the next resume.
    """
    writes_now = ranks.is_main and checkpoint is None
    stop = StopSignal()
    family: str | None = config.family
    journal = Journal(folder, writes=ranks.is_main, wandb_run=_start_wandb(config, folder) if ranks.is_main else None)
    started_by_a_job = os.environ.pop(RUN_FOLDER_VARIABLE, None) is not None  # then stderr is train.log already
    log = _log_to(folder) if ranks.is_main and not started_by_a_job else None
    try:
        with signals_stop(stop):
            journal.set_state("starting", stopped_by=None, message=None)
            for warning in [*warnings, *config_warnings(config)]:
                journal.warn(warning)
            if ranks.is_main:
                require_output_folders(config)
            if writes_now:
                _write_facts(config, folder)
            config = resolve_auto_settings(config, ranks, journal)
            seed = None if state is None else state.get("seed")
            how: dict[str, Any] = {"seed": seed, "weights_from": checkpoint, "adapter_base": adapter_base}
            trial = SpeedTrial(memory_check(ranks)) if config.speed == "auto" else None
            run = build_run(config, folder, journal, ranks, **how, stop=stop, speed_trial=trial)
            family = run.learner.model.family.name
            if trial is not None:
                config = config.replace(**{name: getattr(run.config, name) for name in CHOSEN_BY_SPEED})
            if writes_now:  # what was chosen: a run that continues takes the same
                write_atomic(folder.config_path, config.to_json())
            run.listeners = [*build_listeners(run, stop), *([MeasuredPlan()] if ranks.is_main else []), *listeners]
            if checkpoint is not None and state is not None:
                _restore(run, checkpoint, state)
                if ranks.is_main:
                    _keep_changes(changes or {}, folder, state["position"]["step"])
                    _write_facts(config, folder)
            _work(run, stop)
    except StopRequested:
        _record_early_stop(journal, stop, state)
    except BaseException as error:
        _record_failure(journal, error)
        if is_out_of_memory(error):
            raise explain_out_of_memory(error, config, family) from error
        raise
    finally:
        journal.close()
        if log is not None:
            logging.getLogger("everydream_kit").removeHandler(log)
            log.close()
    return folder


def _start_wandb(config: TrainConfig, folder: RunFolder) -> Any:
    """A Weights & Biases run where it is asked for. Raises: ConfigError if the package is missing."""
    if not config.wandb:
        return None
    try:
        import wandb
    except ModuleNotFoundError as error:
        raise ConfigError(
            "wandb: the package is not installed. pip install 'everydream-kit[wandb]', or leave it off."
        ) from error
    return wandb.init(
        project=config.project_name,
        name=config.run_name or folder.name,
        dir=str(folder.folder),
        config=config.model_dump(mode="json"),
    )


def _work(run: Run, stop: StopSignal) -> None:
    """Train, then call every listener's end; files and threads are released in any case."""
    try:
        run.journal.set_state("running", step=run.position.step, num_steps=run.num_steps, epoch=run.position.epoch)
        for listener in run.listeners:
            listener.on_start(run)
        run.sync.sync_ranks()
        if not run.is_complete():
            train_loop(run, run.listeners, stop)
        for listener in run.listeners:
            listener.before_finish(run)
        for listener in run.listeners:
            listener.on_finish(run)
        run.sync.sync_ranks()
    finally:
        for listener in run.listeners:
            listener.close()
    finished = run.is_complete()
    run.journal.report("finished" if finished else "stopped", step=run.position.step, reason=stop.reason)
    run.journal.set_state(
        "finished" if finished else "stopped",
        step=run.position.step,
        epoch=run.position.epoch,
        stopped_by=None if finished else stop.reason,
        eta_seconds=0 if finished else None,
    )


def _restore(run: Run, checkpoint: Checkpoint, state: State) -> None:
    """Put a freshly built run where its checkpoint stands."""
    now = library_versions()
    before = ", ".join(f"{name} {one}" for name, one in state.get("versions", {}).items() if now.get(name) != one)
    if before:
        run.journal.warn(f"This was saved with {before}: with other versions the run may differ in the last digits.")
    learner, tensors = run.learner, load_resume_tensors(checkpoint)
    try:
        refuse_other_training(run, state)
        resolve_position(run, state, tensors)
        warn_of_rates(run, state)
    except RESTORE_ERRORS as error:
        raise CheckpointError(
            f"{checkpoint.folder}: its record of the run is damaged ({error!r}). Remove it, and resume from the checkpoint "
            "before."
        ) from error
    try:
        optimizer_state = tensors["optimizer"]
        if learner.is_sharded:
            optimizer_state = divide_optimizer_state(learner.optimizer, optimizer_state)
        restore_optimizer(learner.optimizer, optimizer_state)
        learner.precision.load_state_dict(tensors["precision"])
        if learner.ema is not None and "ema" in tensors:
            learner.ema.load_state_dict(tensors["ema"])
        elif learner.ema is not None:
            run.journal.warn("EMA was off when this was saved: the averages start from the current weights.")
    except RESTORE_ERRORS as error:
        raise CheckpointError(
            f"{checkpoint.folder}: its optimizer state does not fit these settings ({error}). What is trained cannot change on "
            "a resume; start a new run with --resume_ckpt instead."
        ) from error
    for listener in run.listeners:
        if listener.name in state["listeners"]:
            _restore_listener(listener, state["listeners"][listener.name], checkpoint)
    run.journal.forget_after(run.position.step)
    run.journal.report("resumed", step=run.position.step, checkpoint=str(checkpoint.folder))


def _restore_listener(listener: Listener, saved: dict[str, Any], checkpoint: Checkpoint) -> None:
    try:
        listener.restore(saved)
    except RESTORE_ERRORS as error:
        raise CheckpointError(
            f"{checkpoint.folder}: the state of {listener.name} is damaged ({type(error).__name__}: {error}). Remove this "
            "checkpoint's folder, and resume from the one before."
        ) from error


def _changed(config: TrainConfig, changes: dict[str, Any], folder: RunFolder) -> tuple[TrainConfig, dict[str, Any]]:
    """The settings of a resumed run, and which of the changes are any. Nothing is written.

    Raises:
        CheckpointError: one cannot change on resume.
    """
    changes = {name: value for name, value in changes.items() if getattr(config, name, changes) != value}
    origin = read_origin(folder.folder)
    given_here = () if origin is None else origin.given  # on this machine: a wrong one can be corrected
    fixed = [name for name, one in sorted(facts().items()) if name in changes and one.change == "never"]
    fixed = [name for name in fixed if name not in given_here]
    if fixed:
        raise CheckpointError(
            f"{', '.join(fixed)}: cannot change on resume. Start a new run from its weights with --resume_ckpt "
            f"{folder.last_checkpoint}."
        )
    return (config.replace(**changes) if changes else config), changes


def _keep_changes(changes: Mapping[str, Any], folder: RunFolder, step: int) -> None:
    """Keep the settings before, and log what is different from here on."""
    if changes:
        write_atomic(folder.changed_config_path(step), folder.config_path.read_text("utf-8"))
        logging.getLogger("everydream_kit").info(f"changed from step {step} on: {changes}")


def _new_folder(config: TrainConfig, ranks: Ranks) -> RunFolder:
    """The run folder, made by the main process (or by whoever started it) and known to all."""
    prepared = os.environ.get(RUN_FOLDER_VARIABLE)
    if prepared:
        folder = RunFolder(Path(prepared))
        folder.make_folders()
        return folder
    if ranks.num_ranks == 1:
        return RunFolder.create(config.logdir, config.project_name)
    import torch.distributed as dist

    chosen = [str(RunFolder.create(config.logdir, config.project_name).folder) if ranks.is_main else ""]
    dist.broadcast_object_list(chosen, src=0)
    return RunFolder(Path(chosen[0]))


def _write_facts(config: TrainConfig, folder: RunFolder) -> None:
    """`config.json` and `environment.json`: what is needed to do this again."""
    write_atomic(folder.config_path, config.to_json())
    import torch

    facts = {
        START_FOLDER_KEY: str(read_start_folder(folder.folder) or Path.cwd()),
        "everydream_kit": __version__,
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "packages": library_versions(),
        "device": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"cpu, {torch.get_num_threads()} threads",
        "cuda": torch.version.cuda,
    }
    write_atomic(folder.environment_path, json.dumps(facts, indent=2))


class _LogFile(logging.FileHandler):
    """`train.log`. On a full disk lines are skipped; the log on the terminal still has them."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)

    def close(self) -> None:
        """What a full disk does not take of the last lines is lost; the error that ended the run is not hidden by it."""
        with suppress(OSError):
            super().close()


def _log_to(folder: RunFolder) -> logging.Handler:
    """Send the kit's log to `train.log` as well."""
    handler = _LogFile(folder.log_path, encoding="utf-8")
    handler.setFormatter(PlainFormatter("%(asctime)s %(levelname)s %(message)s"))
    logger = logging.getLogger("everydream_kit")
    logger.addHandler(handler)
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.INFO)
    return handler


def _record_early_stop(journal: Journal, stop: StopSignal, state: State | None) -> None:
    """The run was stopped before it began or continued: there is nothing to save."""
    journal.folder.take_request()  # it is obeyed here, and must not stop whoever continues
    reason = stop.reason or "request"
    step = state["position"]["step"] if state else 0
    saved = "its checkpoint is unchanged" if state else "nothing was saved"
    journal.report("stopped", step=step, reason=reason)
    journal.set_state("stopped", step=step, stopped_by=reason, message=f"Stopped before training began; {saved}.")


def _record_failure(journal: Journal, error: BaseException) -> None:
    message = str(error) if isinstance(error, KitError) else f"{type(error).__name__}: {error}"
    journal.report("error", message=message)
    journal.set_state("failed", message=message)
