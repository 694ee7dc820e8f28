"""A run and its checkpoints on disk: the one reader of a run folder, for panels, commands, jobs and the trainer itself.

The run folder is the database: the trainer writes it, and everything else (panels, commands, notebooks, a second
process) only reads it, except for `control.json` and `live.json`, which others write and the trainer obeys. Names are in
`layout`, the objects in the files in `schema`. Small files are written with `atomic`, so a reader never sees half a file, and
read with `strict_json`.
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
from typing import Any, cast

from everydream_kit.atomic import require_writable, write_atomic
from everydream_kit.errors import CheckpointError, JobError
from everydream_kit.runs import layout
from everydream_kit.runs.in_folder import InFolder
from everydream_kit.runs.schema import Action, Event, ImageLoss, Request, Status, well_typed, wrong_keys
from everydream_kit.strict_json import JsonLines, iterate_json_lines, parse_json, read_small_object

FOREIGN_HEARTBEAT_SECONDS = 90.0
"""A run on another machine that shares the disk counts as alive while its heartbeat is younger than this."""
CONTROL_BYTES = 1 << 16
"""Size limit of `control.json`; a request takes less than 200 bytes."""
MALFORMED_SHOWN = 100
"""Characters of a malformed request that the log shows."""
_BAR_BEFORE_TEXT = re.compile(r"^[^|]*\d%\|[^|]*\|[^\]]*\]\s*(?=\S)")
"""A state of a progress bar that had no line end when something else was written."""
LINE_BYTES = 400
"""Bytes that a line of the log is assumed to have, an overestimate, to read its last lines."""


def is_fresh(status: Mapping[str, Any]) -> bool:
    """Whether a status was written just now, as far as the clocks of two machines agree."""
    heartbeat = status.get("heartbeat")
    if isinstance(heartbeat, bool) or not isinstance(heartbeat, int | float):
        return False
    return abs(time.time() - heartbeat) < FOREIGN_HEARTBEAT_SECONDS


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder holds a model, complete or an adapter. Checkpoints that are still being written have other names."""
    return any((folder / name).is_file() for name in layout.MODEL_FILES)


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint: a model folder that has its final name.

    Attributes:
        folder: the model folder.
        epoch, step: from its name; -1 where the name does not say.
    """

    folder: Path
    epoch: int = -1
    step: int = -1

    @classmethod
    def open(cls, folder: str | Path) -> Checkpoint:
        """Raises: CheckpointError if the folder is no checkpoint."""
        folder = Path(folder)
        if not is_checkpoint(folder):
            raise CheckpointError(f"{folder}: not a checkpoint; one has a {' or an '.join(layout.MODEL_FILES)}.")
        return cls.at(folder)

    @classmethod
    def at(cls, folder: str | Path) -> Checkpoint:
        """The checkpoint that has, or will have, this folder; whether it is there is not looked at."""
        folder = Path(folder)
        found = layout.CHECKPOINT_NAME.fullmatch(folder.resolve().name)
        return cls(folder, int(found["epoch"]), int(found["step"])) if found else cls(folder)

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def label(self) -> str:
        """For people: its name, with its run's where it is in one."""
        return f"{self.name} · {self.run.name}" if self.run is not None else self.name

    @property
    def is_averaged(self) -> bool:
        """Whether it holds averaged weights (EMA) and has a twin with the live ones."""
        return self.name.endswith(layout.AVERAGED_SUFFIX)

    @property
    def averaged(self) -> Checkpoint:
        """Its twin with the averaged weights, whether that is there or not."""
        if self.is_averaged:
            return self
        return Checkpoint(self.folder.with_name(f"{self.name}{layout.AVERAGED_SUFFIX}"), self.epoch, self.step)

    @property
    def exists(self) -> bool:
        """Whether it is there, as a folder."""
        return self.folder.is_dir()

    @property
    def run(self) -> RunFolder | None:
        """The run that it belongs to, or None where it stands elsewhere."""
        around = self.folder.resolve().parent
        if around.name in (layout.CHECKPOINTS, layout.UPLOADING) and is_run(around.parent):
            return RunFolder(around.parent)
        return None

    # Resume state

    @property
    def resumable(self) -> bool:
        """Whether it holds optimizer and position as well, written to the end."""
        return self.manifest_path.is_file()

    resume_folder = InFolder(layout.RESUME)
    manifest_path = InFolder(layout.RESUME_MANIFEST)
    """Sizes and hashes of all its files; written last."""
    state_path = InFolder(layout.RESUME_STATE)
    """Position, seed, and the state of listeners (`resume_state`)."""

    def resume_tensors_path(self, name: str) -> Path:
        """Tensors of a resume by name: optimizer, precision, ema, dataset."""
        return self.resume_folder / f"{name}{layout.TENSORS_SUFFIX}"

    def resume_tensors(self) -> dict[str, Path]:
        """The files of tensors that are there, by name."""
        return {path.stem: path for path in sorted(self.resume_folder.glob(f"*{layout.TENSORS_SUFFIX}"))}

    def model_files(self) -> list[Path]:
        """Its files but those for a resume and hidden ones, sorted."""
        inside = ((path, path.relative_to(self.folder).parts) for path in sorted(self.folder.rglob("*")))
        return [
            path
            for path, parts in inside
            if path.is_file() and parts[0] != layout.RESUME and not any(part.startswith(".") for part in parts)
        ]

    def resume_files(self) -> list[Path]:
        """Its files for a resume, sorted."""
        return [path for path in sorted(self.resume_folder.rglob("*")) if path.is_file()]


@dataclass(frozen=True)
class RunFolder:
    """One run, by its folder. Everything is read anew at each call, so a run in progress can be watched."""

    folder: Path

    @classmethod
    def create(cls, logdir: str | Path, project: str, now: datetime | None = None) -> RunFolder:
        """Make a new run folder, named by project and time; a second run in the same second gets a `-2`."""
        now, number = now or datetime.now(), 1
        require_writable(Path(logdir), "logdir")
        while True:
            folder = Path(logdir) / layout.run_name(project, now, number)
            try:
                folder.mkdir()
                break
            except FileExistsError:
                number += 1
        run = cls(folder)
        run.make_folders()
        return run

    @classmethod
    def open(cls, folder: str | Path) -> RunFolder:
        """Raises: JobError if the folder is not a run's."""
        folder = Path(folder)
        if not (folder / layout.CONFIG).is_file():
            raise JobError(
                f"{folder}: not a run folder ({layout.CONFIG} is missing). `everydream runs` lists the runs."
            )
        return cls(folder)

    def make_folders(self) -> None:
        """Make its own folders where they are missing."""
        self.samples_folder.mkdir(parents=True, exist_ok=True)
        self.checkpoints_folder.mkdir(exist_ok=True)

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    # Paths

    config_path = InFolder(layout.CONFIG)
    environment_path = InFolder(layout.ENVIRONMENT)
    """Versions, device and platform of the last session."""
    origin_path = InFolder(layout.ORIGIN)
    """Where a fetched run came from (`foreign`)."""
    events_path = InFolder(layout.EVENTS)
    log_path = InFolder(layout.LOG)
    status_path = InFolder(layout.STATUS)
    request_path = InFolder(layout.REQUEST)
    live_settings_path = InFolder(layout.LIVE_SETTINGS)
    """Settings that a person changes while it runs."""
    job_path = InFolder(layout.JOB)
    """Which process was started for it, by whoever started it."""
    plan_path = InFolder(layout.PLAN)
    """What was estimated before it began."""
    undersized_path = InFolder(layout.UNDERSIZED)
    samples_folder = InFolder(layout.SAMPLES)
    losses_folder = InFolder(layout.LOSSES)
    checkpoints_folder = InFolder(layout.CHECKPOINTS)
    uploading_folder = InFolder(layout.UPLOADING)
    lock_path = InFolder(layout.LOCK)
    """The lock that a session holds from beginning to end."""
    starting_lock_path = InFolder(layout.STARTING_LOCK)
    """The lock that is held while a process is started for it."""

    def changed_config_path(self, step: int) -> Path:
        """The settings as they were before a resume changed them at this step."""
        return self.folder / layout.CHANGED_CONFIG.format(step=step)

    def losses_path(self, epoch: int) -> Path:
        """The losses of an epoch, image by image."""
        return self.losses_folder / layout.LOSSES_OF_EPOCH.format(epoch=epoch)

    def schedule_path(self, epoch: int) -> Path:
        return self.folder / layout.SCHEDULE.format(epoch=epoch)

    def uses_path(self, epoch: int) -> Path:
        return self.folder / layout.USES.format(epoch=epoch)

    # What it says

    def settings(self) -> dict[str, Any]:
        """Its settings as they stand in the file, unchecked; {} where they cannot be read. `load_config` checks them."""
        return read_small_object(self.config_path)

    def environment(self) -> dict[str, Any]:
        """Versions, device and platform; {} where they are not there."""
        return read_small_object(self.environment_path)

    def plan(self) -> dict[str, Any]:
        """What was estimated before it began; {} where nothing was."""
        return read_small_object(self.plan_path)

    def job_record(self) -> dict[str, Any]:
        """The process that was started for it, and its command; {} where nobody wrote that down."""
        return read_small_object(self.job_path)

    def status(self) -> Status:
        """The last status that the trainer wrote; empty before the first, or if the file is damaged."""
        return cast(Status, well_typed(read_small_object(self.status_path), Status))

    def write_status(self, status: Mapping[str, Any]) -> None:
        """Replace the status. Raises: OSError."""
        write_atomic(self.status_path, json.dumps({**status, "heartbeat": time.time()}))

    def events(self, kind: str | None = None, *, report: JsonLines | None = None) -> Iterator[Event]:
        """Events in order of writing, all or of one kind.

        Args:
            report: gets the lines that are skipped, since a full disk or a kill cut them off (`bad`), and of a last line that is
                still being written (`unfinished`). With the report of an earlier call only what is new since is read.
        """
        report = JsonLines() if report is None else report
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):  # nothing has been written yet
            for event in iterate_json_lines(self.events_path, error=JobError, report=report):
                wrong = wrong_keys(event, Event) if "kind" in event else ["kind"]
                if wrong:
                    report.bad.append(
                        f"{self.events_path}, line {report.num_lines}: an event without a usable {wrong[0]}"
                    )
                elif kind is None or event["kind"] == kind:
                    yield event

    def epochs_with_losses(self) -> list[int]:
        """Epochs that ended, of which the loss of each image is known, in order."""
        if not self.losses_folder.is_dir():
            return []
        names = (layout.LOSSES_NAME.fullmatch(path.name) for path in self.losses_folder.iterdir())
        return sorted(int(name["epoch"]) for name in names if name is not None)

    def image_losses(self, epoch: int) -> list[ImageLoss]:
        """The loss of each image of an epoch, the hardest first; none where the file is damaged."""
        held = read_small_object(self.losses_path(epoch))
        rows = held.get("images", held.get("pictures"))  # the second in old files
        if not isinstance(rows, list):
            return []
        whole = [well_typed(row, ImageLoss) for row in rows if isinstance(row, dict)]
        return [cast(ImageLoss, row) for row in whole if {"path", "mean_loss", "count"} <= row.keys()]

    def log_tail(self, num_lines: int = 200) -> list[str]:
        """The last lines of the log. Of a progress bar only the latest state is kept."""
        try:
            with self.log_path.open("rb") as file:
                file.seek(0, os.SEEK_END)
                file.seek(max(0, file.tell() - LINE_BYTES * num_lines))
                text = file.read().decode("utf-8", errors="replace")
        except OSError:
            return []
        lines = [line.rstrip("\r").rsplit("\r", 1)[-1].rstrip() for line in text.split("\n")]
        lines = [_BAR_BEFORE_TEXT.sub("", line) for line in lines]
        return [line for line in lines if line][-num_lines:]

    # Requests

    def request(self, action: Action, **details: Any) -> str:
        """Ask the trainer for something; it obeys within one step. Returns the request's id."""
        request = uuid.uuid4().hex
        write_atomic(self.request_path, json.dumps({"action": action, "id": request, **details}))
        return request

    def pending_action(self) -> str | None:
        """What the pending request asks for, which stays; None where there is none."""
        action = read_small_object(self.request_path).get("action")
        return action if isinstance(action, str) else None

    def take_request(self) -> Request | None:
        """The trainer's side: the pending request, which is removed, or None.

        `action` is a text in any case; malformed requests are returned as unknown actions.
        """
        path = self.request_path
        taken = path.with_suffix(".taken")
        try:
            os.replace(path, taken)
            with taken.open("rb") as file:
                content = file.read(CONTROL_BYTES + 1)
        except OSError:  # there is none, or the disk is gone for a moment: the request stays for the next step
            return None
        try:
            request = parse_json(content, str(path), error=JobError, max_bytes=CONTROL_BYTES)
        except JobError as problem:
            shown = content[:MALFORMED_SHOWN].decode("utf-8", "replace")
            return {"action": shown, "problem": str(problem)}
        unknown = json.dumps(request.get("action"))[:MALFORMED_SHOWN]
        return cast(Request, {"action": unknown, "id": None, **well_typed(request, Request)})

    def forget_session(self) -> None:
        """Remove what the session before left: its request and its last status, which are not those of the next one."""
        for path in (self.request_path, self.status_path):
            path.unlink(missing_ok=True)

    # Checkpoints and samples

    def checkpoint(self, name: str) -> Checkpoint:
        """The checkpoint of this name, whether it is there or not."""
        return Checkpoint.at(self.checkpoints_folder / name)

    def checkpoints(self, *, averaged: bool | None = None) -> list[Checkpoint]:
        """Complete checkpoints, oldest first by step.

        Args:
            averaged: only those with averaged weights, or only those with the live ones; None: both.
        """
        if not self.checkpoints_folder.is_dir():
            return []
        found = [
            Checkpoint.at(folder)
            for folder in self.checkpoints_folder.iterdir()
            if not folder.name.startswith(".") and not folder.is_symlink() and is_checkpoint(folder)
        ]
        kept = (c for c in found if c.step >= 0 and averaged in (None, c.is_averaged))
        return sorted(kept, key=lambda c: (c.step, c.name))

    @property
    def last_checkpoint(self) -> Path:
        """The latest complete checkpoint with the live weights. Raises: CheckpointError if there is none."""
        live = self.checkpoints(averaged=False)
        if not live:
            raise CheckpointError(f"{self.folder}: holds no complete checkpoint yet.")
        return live[-1].folder

    def samples(self) -> list[Path]:
        """Sample images, in order of their step and name."""
        if not self.samples_folder.is_dir():
            return []
        named = ((layout.SAMPLE_NAME.fullmatch(path.name), path) for path in sorted(self.samples_folder.iterdir()))
        return [path for _, path in sorted((int(name["step"]), path) for name, path in named if name)]


def is_run(folder: Path) -> bool:
    """Whether a folder is a run's: it has settings and a place for checkpoints."""
    return (folder / layout.CONFIG).is_file() and (folder / layout.CHECKPOINTS).is_dir()
