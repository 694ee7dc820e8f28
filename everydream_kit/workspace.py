"""Runs and checkpoints on disk: their names, finding them, and reading what a run tells about itself.

The run folder is the database: the trainer writes it, and everything else (panels, commands, notebooks, a second
process) only reads it, except for `control.json`, the one file that others write and the trainer obeys.

    <logdir>/<project>-<YYYYMMDD-HHMMSS>/
        config.json  environment.json  train.log  events.jsonl  status.json  control.json  live.json
        samples/  ckpts/<project>-ep<NN>-gs<NNNNN>/  ckpts/best  plan.json  ledger/

Small files are written with `atomic`, so a reader never sees half a file, and read with `strict_json`.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from everydream_kit.atomic import create_temporary, sweep, write_atomic
from everydream_kit.config import default_of
from everydream_kit.errors import CheckpointError, ConfigError, JobError, KitError, may_pass
from everydream_kit.strict_json import JsonLines, iterate_json_lines, parse_json, read_json

DEFAULT_LOGDIR: str = default_of("logdir")
"""Where run folders are looked for."""

CHECKPOINT_MANIFEST = "resume/manifest.json"
MODEL_FILES = ("model_index.json", "adapter.json")
"""One of these makes a folder a checkpoint: a whole model's, or a small one's that names its base."""
Action = Literal["stop", "save", "sample"]
ENDED_STATES = ("finished", "stopped", "failed")
FOREIGN_HEARTBEAT_SECONDS = 90.0
"""A run on another machine that shares the disk counts as alive while its heartbeat is younger than this."""
CONTROL_BYTES = 1 << 16
"""Size limit of `control.json`; a request takes less than 200 bytes."""
MALFORMED_SHOWN = 100
"""Characters of a malformed request that the log shows."""


def read_small_object(path: Path) -> dict[str, Any]:
    """What a process last said about itself; {} where there is nothing, or nothing that can be read.

    For files that are replaced whole by processes and are never written back from what was read. Files that people may
    edit are read with `strict_json`, which tells missing from broken.
    """
    try:
        value: dict[str, Any] = read_json(path, missing={}, allow_nan=True)
    except KitError:
        return {}
    return value


def require_writable(folder: Path, setting: str) -> None:
    """Make a folder where it is missing, and write and remove a file in it. What killed processes left there goes.

    A full disk is not refused: room may come while training continues.

    Raises:
        ConfigError: it cannot be written; the setting that names it is named.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe, descriptor = create_temporary(folder)
        try:
            os.write(descriptor, b"x")
        finally:
            os.close(descriptor)
            probe.unlink()
    except (OSError, ValueError) as error:
        if may_pass(error):
            return
        cause = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"{setting}: {folder} cannot be written ({cause}). Give a folder that you can write to. Nothing was started."
        ) from error
    sweep(folder)


def run_lock_path(folder: Path) -> Path:
    """The lock that a session holds on its run folder from beginning to end."""
    return folder / ".lock"


def is_fresh(status: Mapping[str, Any]) -> bool:
    """Whether a status was written just now, as far as the clocks of two machines agree."""
    heartbeat = status.get("heartbeat")
    if isinstance(heartbeat, bool) or not isinstance(heartbeat, int | float):
        return False
    return abs(time.time() - heartbeat) < FOREIGN_HEARTBEAT_SECONDS


def checkpoint_name(project: str, epoch: int, step: int, *, prefix: str = "") -> str:
    """`<prefix><project>-ep<NN>-gs<NNNNN>`: epochs that have ended and optimizer steps done, as EveryDream 2 names them."""
    return f"{prefix}{project}-ep{epoch:02}-gs{step:05}"


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder holds a model, whole or small. Half-written checkpoints have other names."""
    return any((folder / name).is_file() for name in MODEL_FILES)


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint: a diffusers folder that carries its final name.

    Attributes:
        folder: the diffusers folder.
        epoch, step: from its name; -1 where the name does not say.
        resumable: it holds optimizer and position as well.
    """

    folder: Path
    epoch: int
    step: int
    resumable: bool

    @classmethod
    def open(cls, folder: str | Path) -> Checkpoint:
        """Raises: CheckpointError if the folder is not a checkpoint."""
        folder = Path(folder)
        if not is_checkpoint(folder):
            raise CheckpointError(f"{folder}: no checkpoint; one has a {' or an '.join(MODEL_FILES)}.")
        found = re.search(r"-ep(\d+)-gs(\d+)(_ema)?$", folder.resolve().name)
        epoch, step = (int(found[1]), int(found[2])) if found else (-1, -1)
        return cls(folder, epoch, step, (folder / CHECKPOINT_MANIFEST).is_file())


@dataclass(frozen=True)
class RunFolder:
    """One run, by its folder. Everything is read anew at each call, so a run in progress can be watched."""

    folder: Path

    @classmethod
    def create(cls, logdir: str | Path, project: str, now: datetime | None = None) -> RunFolder:
        """Make a new run folder, named by project and time; a second run in the same second gets a `-2`."""
        stamp = (now or datetime.now()).strftime("%Y%m%d-%H%M%S")
        base = Path(logdir) / f"{project}-{stamp}"
        require_writable(base.parent, "logdir")
        folder, number = base, 1
        while True:
            try:
                folder.mkdir()
                break
            except FileExistsError:
                number += 1
                folder = base.with_name(f"{base.name}-{number}")
        (folder / "samples").mkdir()
        (folder / "ckpts").mkdir()
        return cls(folder)

    @classmethod
    def open(cls, folder: str | Path) -> RunFolder:
        """Raises: JobError if the folder is not a run's."""
        folder = Path(folder)
        if not (folder / "config.json").is_file():
            raise JobError(f"{folder}: no run folder; a run has a config.json. `everydream runs` lists the runs.")
        return cls(folder)

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def config_path(self) -> Path:
        return self.folder / "config.json"

    @property
    def events_path(self) -> Path:
        return self.folder / "events.jsonl"

    @property
    def log_path(self) -> Path:
        return self.folder / "train.log"

    @property
    def samples_folder(self) -> Path:
        return self.folder / "samples"

    @property
    def checkpoints_folder(self) -> Path:
        return self.folder / "ckpts"

    def status(self) -> dict[str, Any]:
        """The last word of the trainer: state, pid, step, ... ; empty before it has said anything, or if it is damaged."""
        return read_small_object(self.folder / "status.json")

    def write_status(self, status: dict[str, Any]) -> None:
        write_atomic(self.folder / "status.json", json.dumps({**status, "heartbeat": time.time()}))

    def events(self, kind: str | None = None, *, report: JsonLines | None = None) -> Iterator[dict[str, Any]]:
        """Events in order of writing, all or of one kind.

        Lines that a full disk or a kill cut off are skipped and counted in `report.bad`; so is a last line that is still
        being written, which `report.unfinished` says.
        """
        report = JsonLines() if report is None else report
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):  # nothing has been written yet
            for event in iterate_json_lines(self.events_path, error=JobError, report=report):
                if not isinstance(event.get("kind"), str):
                    report.bad.append(f"{self.events_path}: an event without a kind")
                elif kind is None or event["kind"] == kind:
                    yield event

    def request(self, action: Action, **details: Any) -> str:
        """Ask the trainer for something; it obeys within one step. Returns the request's id."""
        request = uuid.uuid4().hex
        write_atomic(self.folder / "control.json", json.dumps({"action": action, "id": request, **details}))
        return request

    def pending_action(self) -> str | None:
        """What the waiting request asks for, which stays; None where there is none."""
        action = read_small_object(self.folder / "control.json").get("action")
        return action if isinstance(action, str) else None

    def take_request(self) -> dict[str, Any] | None:
        """The trainer's side: the pending request, which is removed, or None.

        `action` is a text in any case; malformed requests are returned as unknown actions.
        """
        path = self.folder / "control.json"
        taken = path.with_suffix(".taken")
        try:
            os.replace(path, taken)
            with taken.open("rb") as file:
                content = file.read(CONTROL_BYTES + 1)
        except OSError:  # there is none, or the disk is gone for a moment: the request stays for the next step
            return None
        try:
            request: dict[str, Any] = parse_json(content, str(path), error=JobError, max_bytes=CONTROL_BYTES)
        except JobError as problem:
            shown = content[:MALFORMED_SHOWN].decode("utf-8", "replace")
            return {"action": shown, "problem": str(problem)}
        if not isinstance(request.get("action"), str):
            request["action"] = json.dumps(request.get("action"))[:MALFORMED_SHOWN]
        if not isinstance(request.get("id"), str | None):
            request["id"] = None
        return request

    def checkpoints(self) -> list[Checkpoint]:
        """Whole checkpoints, oldest first by step. Half-written ones have other names and are not listed."""
        if not self.checkpoints_folder.is_dir():
            return []
        found = [
            Checkpoint.open(folder)
            for folder in self.checkpoints_folder.iterdir()
            if not folder.name.startswith(".") and not folder.is_symlink() and is_checkpoint(folder)
        ]
        return sorted((c for c in found if c.step >= 0), key=lambda c: (c.step, c.folder.name))

    @property
    def last_checkpoint(self) -> Path:
        """The latest whole checkpoint with the live weights. Raises: CheckpointError if there is none."""
        live = [c for c in self.checkpoints() if not c.folder.name.endswith("_ema")]
        if not live:
            raise CheckpointError(f"{self.folder}: holds no whole checkpoint yet.")
        return live[-1].folder

    @property
    def best_checkpoint(self) -> Path | None:
        """The checkpoint with the lowest validation loss, or None where nothing was validated."""
        folder = self.checkpoints_folder / "best"
        return folder if is_checkpoint(folder) else None

    def samples(self) -> list[Path]:
        """Sample images, in order of their step."""
        return sorted(self.samples_folder.glob("gs*.jpg")) if self.samples_folder.is_dir() else []


def list_runs(logdir: str | Path, project: str | None = None) -> list[RunFolder]:
    """Runs under a folder, latest last by the time in their name (not by file times, which copying changes)."""
    root = Path(logdir)
    if not root.is_dir():
        return []
    found = []
    for folder in root.iterdir():
        match = re.fullmatch(r"(.+)-(\d{8}-\d{6})(?:-(\d+))?", folder.name)
        if match and (project is None or match[1] == project) and (folder / "config.json").is_file():
            found.append((match[2], int(match[3] or 1), RunFolder(folder)))
    return [run for _, _, run in sorted(found, key=lambda entry: entry[:2])]


def find_run(
    reference: str | Path | None, logdir: str | Path = DEFAULT_LOGDIR, project: str | None = None
) -> RunFolder:
    """The run that a person means.

    Args:
        reference: a run folder, a run's name under logdir, a checkpoint inside a run, or None for the latest run.
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
        return runs[-1]
    for folder in (Path(reference), Path(logdir) / str(reference)):
        for candidate in (folder, folder.parent.parent):
            if (candidate / "config.json").is_file() and (candidate / "ckpts").is_dir():
                return RunFolder(candidate)
    known = ", ".join(run.name for run in list_runs(logdir)[-5:]) or "none"
    raise JobError(f"{reference}: no such run folder. Latest runs in {logdir}: {known}.")


def find_last_checkpoint(logdir: str | Path, project: str, *, averaged: bool = False) -> Path:
    """The latest checkpoint of a project, over all its runs (`--resume_ckpt findlast`), or the latest with averaged
    weights.

    Raises:
        CheckpointError: no run of the project holds a whole checkpoint.
    """
    for run in reversed(list_runs(logdir, project)):
        found = [c for c in run.checkpoints() if c.folder.name.endswith("_ema") == averaged]
        if found:
            return found[-1].folder
    raise CheckpointError(f"findlast: no run of project {project} in {logdir} holds a whole checkpoint.")
