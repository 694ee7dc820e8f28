"""Checkpoints on disk: atomic, and verifiably complete.

A checkpoint is written next to its final name and renamed when every byte is on the disk, so a folder with the final
name is complete. It is a model folder that any diffusers program loads, plus `resume/`: optimizer, gradient scaler,
EMA, position and listeners' state, and last of all a manifest with the size and SHA-256 of every file. Resume trusts
only a manifest that holds.

`resume/` is large, so only the two latest checkpoints of a run keep theirs (unless `save_optimizer`): the latest, and
one to fall back to if the latest turns out damaged.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from everydream_kit.atomic import FOREIGN_SECONDS, write_atomic
from everydream_kit.disk_space import lack_of_room
from everydream_kit.errors import CheckpointError, DiskSpaceError, JobError
from everydream_kit.identity import Process, is_running
from everydream_kit.locks import hold
from everydream_kit.runs import Checkpoint, RunFolder, layout, list_runs
from everydream_kit.runs.resume_state import State, check_state
from everydream_kit.strict_json import read_json
from everydream_kit.training.file_hashes import OpenFile, Receipts, digests_of, sync
from everydream_kit.training.tensor_files import check_nested, read_nested, write_nested

RESUMABLE_KEPT = 2
DISK_MARGIN = 1.05
"""Headers, JSON and file-system blocks come on top of the tensors."""


def write_checkpoint(
    final: Path,
    write_model: Callable[[Path, OpenFile], None],
    *,
    tensors: dict[str, Any] | None = None,
    state: Mapping[str, Any] | None = None,
    expected_bytes: int = 0,
) -> Path:
    """Write a checkpoint folder so that it appears at once or not at all.

    Args:
        final: its name; an older folder there is replaced.
        write_model: writes the model files into the folder that it is given; large ones into what the second argument
            opens, which hashes them on the way.
        tensors: objects for `resume/<name>.safetensors` (optimizer, scaler, EMA): nested containers of tensors and
            numbers. None: the checkpoint cannot be resumed from.
        state: JSON values for `resume/state.json`.
        expected_bytes: what it will take, checked against the free disk first.

    Raises:
        DiskSpaceError: it does not fit, or the disk filled up on the way; nothing is left behind.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    require_disk(final.parent, int(expected_bytes * DISK_MARGIN), f"checkpoint {final.name}")
    partial = final.with_name(f"{layout.PARTIAL}{final.name}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir()
        with Receipts(partial) as receipts, ThreadPoolExecutor(1, "resume state") as alongside:
            resume = alongside.submit(_write_resume, Checkpoint.at(partial), tensors, state or {}, receipts.open)
            write_model(partial, receipts.open)
            resume.result()
            facts = receipts.facts()
        if tensors is not None:
            manifest = {"version": 1, "files": facts}
            write_atomic(Checkpoint.at(partial).manifest_path, json.dumps(manifest, indent=1))
            sync(Checkpoint.at(partial).resume_folder)
        _put_in_place(partial, final)
    except OSError as error:
        raise DiskSpaceError(
            f"{final}: could not be written: {error.strerror or error}. Checkpoints before it are untouched. "
            "Free some disk, or set keep_last_n."
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return final


def require_disk(folder: Path, num_bytes: int, what: str) -> None:
    """Raises: DiskSpaceError if a folder's disk has less room than this."""
    lack = lack_of_room(folder, num_bytes)
    if lack is not None:
        raise DiskSpaceError(f"{what}: {lack}. Free some disk, set keep_last_n, or put logdir on a larger disk.")


def verify_checkpoint(folder: Path) -> dict[str, Any]:
    """Check every file of a resumable checkpoint against its manifest.

    Returns:
        The state that was saved with it.

    Raises:
        CheckpointError: there is no manifest, or a file is missing, shorter, or changed; it is named.
    """
    checkpoint = Checkpoint.at(folder)
    manifest = read_json(checkpoint.manifest_path, error=CheckpointError, missing=None)
    if manifest is None:
        raise CheckpointError(
            f"{folder}: holds no resume state (only the latest {RESUMABLE_KEPT} checkpoints of a run do, or all with "
            "save_optimizer). Start a new run from its weights with --resume_ckpt."
        )
    files = _listed_files(manifest, checkpoint.manifest_path)
    for name, facts in files.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{path}: missing, though the manifest lists it.")
        if path.stat().st_size != facts["bytes"]:
            raise CheckpointError(f"{path}: has {path.stat().st_size} bytes and should have {facts['bytes']}.")
    digests = digests_of([folder / name for name in files])
    for (name, facts), digest in zip(files.items(), digests, strict=True):
        if digest != facts["sha256"]:
            raise CheckpointError(f"{folder / name}: its content has changed (SHA-256 differs).")
    state = read_json(checkpoint.state_path, error=CheckpointError, missing=None, allow_nan=True)
    if state is None:
        raise CheckpointError(f"{checkpoint.state_path}: missing, so the position in training is not known.")
    return dict(state)


def _listed_files(manifest: dict[str, Any], path: Path) -> dict[str, dict[str, Any]]:
    """The files of a manifest, each with size and SHA-256. Raises: CheckpointError if it is something else."""
    files = manifest.get("files")
    if not isinstance(files, dict):
        raise CheckpointError(f"{path}: damaged: it lists no files.")
    for name, facts in files.items():
        if not isinstance(facts, dict) or type(facts.get("bytes")) is not int or type(facts.get("sha256")) is not str:
            raise CheckpointError(f"{path}: damaged: bytes and sha256 of {name!r} are not in it.")
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise CheckpointError(f"{path}: damaged: {name!r} is outside of the checkpoint.")
    return files


def load_resume_tensors(checkpoint: Checkpoint) -> dict[str, Any]:
    """The objects of `resume/*.safetensors`, by name, on the CPU."""
    return {name: read_nested(path) for name, path in checkpoint.resume_tensors().items()}


def choose_checkpoint(run: RunFolder, warn: Callable[[str], None]) -> tuple[Checkpoint, State]:
    """The latest checkpoint of a run that can be resumed from, with its state.

    A damaged one is named through `warn` and the one before is tried.

    Raises:
        CheckpointError: none can be resumed from.
    """
    problems = []
    for checkpoint in reversed(run.checkpoints(averaged=False)):
        try:
            state = check_state(verify_checkpoint(checkpoint.folder), checkpoint.folder)
            for path in checkpoint.resume_tensors().values():
                check_nested(path)
            return checkpoint, state
        except CheckpointError as error:
            problems.append(str(error))
            if checkpoint.resumable:
                warn(f"{error} Trying the checkpoint before it.")
    problems = problems or [f"It has saved none. Start anew: everydream train --config {run.config_path}"]
    raise CheckpointError("\n".join([f"{run.folder}: no resumable checkpoint.", *problems]))


def drop_resume_state(checkpoint: Checkpoint) -> None:
    """Make a checkpoint an ordinary model folder. The rename makes it happen at once for every reader."""
    if checkpoint.resume_folder.is_dir():
        _remove(checkpoint.resume_folder, checkpoint.folder.with_name(f"{layout.REMOVED}{checkpoint.name}-resume"))


def remove_checkpoint(checkpoint: Checkpoint) -> None:
    """Remove a checkpoint, at once for every reader."""
    _remove(checkpoint.folder, checkpoint.folder.with_name(f"{layout.REMOVED}{checkpoint.name}"))


def _remove(folder: Path, gone: Path) -> None:
    shutil.rmtree(gone, ignore_errors=True)
    os.replace(folder, gone)
    shutil.rmtree(gone)


def sweep(checkpoints_folder: Path) -> None:
    """Clear up after a killed process: finish removals, drop half-written folders, put back what was being replaced."""
    for replaced in checkpoints_folder.glob(f"{layout.REPLACED}*"):
        final = replaced.with_name(replaced.name.removeprefix(layout.REPLACED))
        if not final.exists():
            os.replace(replaced, final)
    for prefix in layout.LEFTOVERS:
        for folder in checkpoints_folder.glob(f"{prefix}*"):
            shutil.rmtree(folder, ignore_errors=True)


def sweep_dead_runs(logdir: str | Path) -> list[Path]:
    """Clear up after killed runs that nobody resumes: their half-written checkpoints are as large as complete ones.

    Returns:
        What was removed. Runs whose process may be alive, here or on another machine, are left alone.
    """
    removed = []
    for run in list_runs(logdir):
        leftovers = [path for prefix in layout.LEFTOVERS for path in run.checkpoints_folder.glob(f"{prefix}*")]
        if not leftovers or not _is_dead(run):
            continue
        with suppress(JobError), hold(run.lock_path, "in progress"):  # a resume has begun meanwhile
            sweep(run.checkpoints_folder)
            removed += [path for path in leftovers if not path.exists()]
    return removed


def _is_dead(run: RunFolder) -> bool:
    status = run.status()
    known = Process.from_json(status)
    running = None if known is None else is_running(known)
    if running is None:  # another machine's, or one from before a restart
        heartbeat = status.get("heartbeat")
        return heartbeat is not None and time.time() - heartbeat > FOREIGN_SECONDS
    return not running


def _write_resume(
    checkpoint: Checkpoint, tensors: dict[str, Any] | None, state: Mapping[str, Any], open_file: OpenFile
) -> None:
    if tensors is None:
        return
    checkpoint.resume_folder.mkdir()
    for name, value in tensors.items():
        write_nested(checkpoint.resume_tensors_path(name), value, open_file=open_file)
    checkpoint.state_path.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.state_path.write_text(json.dumps(state, indent=1), encoding="utf-8")


def _put_in_place(partial: Path, final: Path) -> None:
    replaced = final.with_name(f"{layout.REPLACED}{final.name}")
    shutil.rmtree(replaced, ignore_errors=True)
    if final.exists():
        os.replace(final, replaced)
    os.replace(partial, final)
    sync(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)
