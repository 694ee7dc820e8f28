"""Stopping, and requests from outside.

Ctrl-C, SIGTERM, a terminal that is closed (SIGHUP) and a `stop` request in the run folder set the same event; the loop finishes
its step, the run is saved, and the process ends with a clear status. A second Ctrl-C or SIGTERM ends it at once.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any

from everydream_kit.training.reports import Listener, ObservedRun, StepReport

if TYPE_CHECKING:
    from everydream_kit.runs import RunFolder

logger = logging.getLogger(__name__)


HANGUP: signal.Signals | None = getattr(signal, "SIGHUP", None)
"""None on Windows, which has none."""


class StopSignal(threading.Event):
    """Set when the run should end after the step in progress. `reason` says who asked."""

    reason = ""

    def ask(self, reason: str) -> None:
        self.reason = self.reason or reason
        self.set()

    def is_requested(self, folder: RunFolder) -> bool:
        """Whether it is set, or a stop is asked for in the run folder, where the request stays for `ControlFile`."""
        return self.is_set() or folder.pending_action() == "stop"


@contextmanager
def signals_stop(stop: StopSignal) -> Iterator[None]:
    """While inside, SIGINT, SIGTERM and SIGHUP ask to stop; a second one of the first two ends the process at once.

    SIGHUP comes when the terminal goes, often more than once: it never ends the process, and what is printed from then on goes
    nowhere, since a terminal that is gone refuses it. Under `nohup` it is ignored as before.

    Outside the main thread (a notebook kernel's subshell, a test) signals are left alone.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    has_requested = False

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal has_requested
        if number == HANGUP:
            _print_nowhere()
        elif has_requested:
            os._exit(128 + number)
        else:
            has_requested = (
                True  # not `stop.is_set()`: a host may take its machine back while a request is being obeyed
            )
        stop.ask(signal.Signals(number).name)
        with contextlib.suppress(OSError):  # nobody reads it
            os.write(2, b"\nStopping after this step, then saving. Press Ctrl-C again to quit without saving.\n")

    numbers = [signal.SIGINT, signal.SIGTERM]
    if HANGUP is not None and signal.getsignal(HANGUP) == signal.SIG_DFL:
        numbers.append(HANGUP)
    before = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _print_nowhere() -> None:
    """Give the standard streams that are a terminal to /dev/null."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        if stat.S_ISCHR(os.fstat(stream).st_mode):
            os.dup2(nowhere, stream)
    os.close(nowhere)


class ControlFile(Listener):
    """Obeys `control.json`: stop, save now, sample now; anything else is named in the log and left."""

    def __init__(self, stop: StopSignal, actions: dict[str, Callable[[ObservedRun], Any]]) -> None:
        self.stop = stop
        self.actions = actions

    def __call__(self, run: ObservedRun, report: StepReport) -> None:
        request = run.folder.take_request()
        if request is None:
            return
        action = request.get("action")
        run.journal.report("request", step=report.step, action=action, id=request.get("id"))
        if action == "stop":
            self.stop.ask("request")
        elif action in self.actions:
            self.actions[action](run)
        else:
            run.journal.warn(f"control.json: unknown action {action!r}; known are stop, {', '.join(self.actions)}.")
