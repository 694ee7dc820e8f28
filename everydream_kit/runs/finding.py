"""Finding runs and checkpoints: by folder, by name, by project, or the latest."""

from __future__ import annotations

from pathlib import Path

from everydream_kit.config import default_of
from everydream_kit.errors import CheckpointError, JobError
from everydream_kit.runs import layout
from everydream_kit.runs.run_folder import Checkpoint, RunFolder, is_run

DEFAULT_LOGDIR: str = default_of("logdir")
"""Where run folders are looked for."""


def list_runs(logdir: str | Path, project: str | None = None) -> list[RunFolder]:
    """Runs under a folder, the latest last by the time in their name (not by file times, which copying changes)."""
    root = Path(logdir)
    if not root.is_dir():
        return []
    found = []
    for folder in root.iterdir():
        match = layout.RUN_NAME.fullmatch(folder.name)
        if match and (project is None or match["project"] == project) and (folder / layout.CONFIG).is_file():
            found.append((match["time"], int(match["number"] or 1), RunFolder(folder)))
    return [run for _, _, run in sorted(found, key=lambda entry: entry[:2])]


def find_run(
    reference: str | Path | None, logdir: str | Path = DEFAULT_LOGDIR, project: str | None = None
) -> RunFolder:
    """The run that a person means.

    Args:
        reference: a run folder, a run's name under logdir, a checkpoint inside a run, or None for the latest run that
            trained anything, or is about to.
        logdir: where runs are looked for by name.
        project: narrows the latest run to one project.

    Raises:
        JobError: there is no such run.
    """
    if reference is None:
        runs = list_runs(logdir, project)
        if not runs:
            raise JobError(
                f"{logdir}: holds no run" + (f" of project {project}" if project else "") + ". Give a run folder."
            )
        return next((run for run in reversed(runs) if not _is_failed_start(run)), runs[-1])
    for folder in (Path(reference), Path(logdir) / str(reference)):
        if is_run(folder):
            return RunFolder(folder)
        if (run := Checkpoint.at(folder).run) is not None:
            return run
    known = ", ".join(run.name for run in list_runs(logdir)[-5:]) or "none"
    raise JobError(f"{reference}: no such run folder. Latest runs in {logdir}: {known}.")


def _is_failed_start(run: RunFolder) -> bool:
    """Whether a run failed or was stopped before its first step, so that there is nothing to continue."""
    status = run.status()
    return status.get("state") in ("failed", "stopped") and not status.get("step") and not run.checkpoints()


def find_last_checkpoint(logdir: str | Path, project: str, *, averaged: bool = False) -> Path:
    """The latest checkpoint of a project, over all its runs (`--resume_ckpt findlast`), or the latest with averaged weights.

    Raises:
        CheckpointError: no run of the project holds a complete checkpoint.
    """
    for run in reversed(list_runs(logdir, project)):
        found = run.checkpoints(averaged=averaged)
        if found:
            return found[-1].folder
    raise CheckpointError(f"findlast: no run of project {project} in {logdir} holds a complete checkpoint.")
