"""The run's own writing: events, status, scalars and images for TensorBoard, warnings.

A disk that is full, or gone for a while, stops no training: events are kept until they can be written; TensorBoard's
points are skipped.
Only the main process has a journal that writes; the others have one that keeps silent, so that callers need not ask.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import threading
import time
from typing import TYPE_CHECKING, Any

from everydream_kit.atomic import ends_with_line_end
from everydream_kit.identity import this_process
from everydream_kit.optional_packages import keep_tensorflow_out_of_tensorboard
from everydream_kit.runs import RunFolder

HEARTBEAT_SECONDS = 20.0
"""The longest that `status.json` goes silently: other machines that share the disk take a run for ended after 90 s."""

SECONDS_WITHOUT_TENSORBOARD = 30.0
"""Before a new file is tried where one could not be written."""

if TYPE_CHECKING:
    from collections.abc import Callable
    from io import FileIO

    from PIL import Image
    from torch.utils.tensorboard import SummaryWriter

logger = logging.getLogger("everydream_kit")


class EventLog:
    """`events.jsonl`: one JSON object a line, appended at once, so that a reader sees each as it comes.

    What cannot be written is kept for the next event, byte by byte: no line is lost, and none is broken in two.
    """

    def __init__(self, folder: RunFolder) -> None:
        self._path = folder.events_path
        self._file: FileIO | None = self._path.open("ab", buffering=0)
        self._waiting = b"" if ends_with_line_end(self._path) else b"\n"  # of a process that was killed while it wrote
        self._lock = threading.Lock()  # the saver and the uploader write from threads of their own

    def write(self, kind: str, **facts: Any) -> None:
        line = json.dumps({"kind": kind, "time": round(time.time(), 3), **facts}, ensure_ascii=False, default=str)
        with self._lock:
            self._waiting += line.encode() + b"\n"
            self._write_waiting()

    def close(self) -> None:
        with self._lock:
            self._write_waiting()
            if self._file is not None:
                self._file.close()

    def _write_waiting(self) -> None:
        try:
            if self._file is None:
                self._file = self._path.open("ab", buffering=0)
            while self._waiting:
                self._waiting = self._waiting[self._file.write(self._waiting) :]
        except OSError as problem:
            logger.debug(f"events.jsonl cannot be written: {problem}")
            file, self._file = self._file, None  # opened anew: a disk that comes back does not know the old handle
            if file is not None:
                with contextlib.suppress(OSError):
                    file.close()


class LiveStatus:
    """`status.json`: the last status, and a heartbeat: while there is nothing new, a thread writes the last one again.

    So a step, a sample grid or an encoding that takes minutes does not look like the end of the run.
    """

    def __init__(self, folder: RunFolder, heartbeat_seconds: float) -> None:
        self._folder, self._heartbeat_seconds = folder, heartbeat_seconds
        self._facts: dict[str, Any] = {**this_process().to_json(), "state": "starting"}
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._written = -math.inf
        self._thread: threading.Thread | None = None

    def write(self, facts: dict[str, Any]) -> None:
        """Say something new; what else is known stays."""
        with self._lock:
            self._facts.update(facts)
            self._try_to_write()
        if self._thread is None:
            self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
            self._thread.start()

    def close(self) -> None:
        self._closing.set()
        if self._thread is not None:
            self._thread.join()

    def _try_to_write(self) -> None:
        try:
            self._folder.write_status(self._facts)
            self._written = time.monotonic()
        except OSError as problem:  # the next word says it again
            logger.debug(f"status.json cannot be written: {problem}")

    def _beat(self) -> None:
        while not self._closing.wait(self._heartbeat_seconds / 2):
            with self._lock:
                if time.monotonic() - self._written >= self._heartbeat_seconds / 2:
                    self._try_to_write()


class TensorBoardFile:
    """TensorBoard's event file, begun with the first point. What cannot be written is skipped; later a new file is
    tried.

    Attributes:
        purge_step: TensorBoard hides what an earlier session logged from this step on.
    """

    def __init__(self, folder: RunFolder) -> None:
        self.purge_step: int | None = None
        self._folder = folder
        self._writer: SummaryWriter | None = None
        self._not_before = -math.inf

    def add(self, write: Callable[[SummaryWriter], None]) -> None:
        """Add a point, an image or a text."""
        if time.monotonic() < self._not_before:
            return
        try:
            if self._writer is None:
                keep_tensorflow_out_of_tensorboard()
                from torch.utils.tensorboard import SummaryWriter  # a second of imports: not before the first point

                self._writer = SummaryWriter(str(self._folder.folder), purge_step=self.purge_step, flush_secs=10)
                self.purge_step = None  # a second file of this session hides nothing of the first
            write(self._writer)
        except OSError as problem:
            self._give_up(problem)

    def close(self) -> None:
        try:
            if self._writer is not None:
                self._writer.close()
        except OSError as problem:
            self._give_up(problem)

    def _give_up(self, problem: OSError) -> None:
        """The writer's thread has ended with the problem: this one will never write again."""
        logger.warning(f"TensorBoard's file cannot be written: {problem}. Points are skipped until it can.")
        self._writer = None
        self._not_before = time.monotonic() + SECONDS_WITHOUT_TENSORBOARD


class Journal:
    """Writes what a run reports into its folder.

    Args:
        folder: the run's.
        writes: False on all processes but the main one.
        wandb_run: a Weights & Biases run that scalars and images go to as well, or None.
        heartbeat_seconds: the longest that the status goes unwritten.
    """

    def __init__(
        self,
        folder: RunFolder,
        *,
        writes: bool = True,
        wandb_run: Any = None,
        heartbeat_seconds: float = HEARTBEAT_SECONDS,
    ) -> None:
        self.folder = folder
        self.writes = writes
        self.wandb_run = wandb_run
        self._events = EventLog(folder) if writes else None
        self._tensorboard = TensorBoardFile(folder) if writes else None
        self._status = LiveStatus(folder, heartbeat_seconds) if writes else None

    def report(self, kind: str, **facts: Any) -> None:
        """Append an event."""
        if self._events is not None:
            self._events.write(kind, **facts)

    def note(self, message: str) -> None:
        """A line for the log that is not a warning."""
        if self.writes:
            logger.info(message)

    def warn(self, message: str) -> None:
        """Log a warning, and keep it as an event for whoever watches the folder."""
        if self.writes:
            logger.warning(message)
            self.report("warning", message=message)

    def set_state(self, state: str, *, progress: float | None = None, **facts: Any) -> None:
        """Write `status.json`: the state, how much of it is done where that is known (0 to 1), and further facts.

        Facts stay until they are replaced; `progress` is of this state alone.
        """
        if self._status is not None:
            self._status.write({**facts, "state": state, "progress": progress})

    def forget_after(self, step: int) -> None:
        """TensorBoard should hide points after this step: a resumed run writes them anew."""
        if self._tensorboard is not None:
            self._tensorboard.purge_step = step + 1

    def scalar(self, tag: str, value: float, step: int) -> None:
        if self._tensorboard is not None:
            self._tensorboard.add(lambda writer: writer.add_scalar(tag, value, step))
            if self.wandb_run is not None:
                self.wandb_run.log({tag: value}, step=step)

    def image(self, tag: str, image: Image.Image, step: int) -> None:
        if self._tensorboard is not None:
            import numpy as np

            pixels = np.asarray(image.convert("RGB"))
            self._tensorboard.add(lambda writer: writer.add_image(tag, pixels, step, dataformats="HWC"))
            if self.wandb_run is not None:
                import wandb

                self.wandb_run.log({tag: wandb.Image(image)}, step=step)

    def text(self, tag: str, text: str) -> None:
        if self._tensorboard is not None:
            self._tensorboard.add(lambda writer: writer.add_text(tag, text))

    def close(self) -> None:
        if self._status is not None:
            self._status.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._events is not None:
            self._events.close()
        if self.wandb_run is not None:
            self.wandb_run.finish()
