"""Work inside a run that may take minutes and is not a step: how far it is, and that a stop ends it."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

from everydream_kit.share_bar import ShareBar

if TYPE_CHECKING:
    from everydream_kit.training.control import StopSignal
    from everydream_kit.training.journal import Journal

INTERVAL_SECONDS = 0.25
"""Between two words about how far it is."""


class StopRequested(Exception):  # noqa: N818 - no error: somebody wishes it
    """Raised inside such work when the run is asked to stop; whoever does the work leaves it as it is."""


class WorkProgress:
    """Called with how much of a piece of work is done: reports it to `status.json` and the terminal, and raises on a stop.

    Args:
        journal: of the run.
        state: what the run is doing, as `status.json` names it.
        bar: on the terminal.
        stop: ends the work; None: it cannot be stopped.
        num_parts: parts of equal length, each of which counts from the beginning.
        message: for `status.json`, in words.
    """

    def __init__(
        self,
        journal: Journal,
        state: str,
        bar: ShareBar,
        *,
        stop: StopSignal | None = None,
        num_parts: int = 1,
        message: str | None = None,
    ) -> None:
        self._journal, self._state, self._bar, self._stop = journal, state, bar, stop
        self._num_parts, self._message = num_parts, message
        self._parts_done = 0
        self._reported = -math.inf
        self._report(0.0)

    def __call__(self, done: int, total: int) -> None:
        """So much of this part is done of so much in all.

        Raises:
            StopRequested: the run should stop.
        """
        now = time.monotonic()
        if now - self._reported >= INTERVAL_SECONDS:
            self._reported = now
            self._report(self._parts_done + done / total)
            if self._stop is not None and self._stop.is_requested(self._journal.folder):
                raise StopRequested

    def end_part(self) -> None:
        """The next call is of the next part."""
        self._parts_done += 1
        self._report(self._parts_done)

    def _report(self, parts_done: float) -> None:
        self._journal.set_state(self._state, progress=round(parts_done / self._num_parts, 3), message=self._message)
        self._bar.show(parts_done, self._num_parts)
