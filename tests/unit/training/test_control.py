"""Stopping by signal: the first asks, the second ends at once."""

from __future__ import annotations

import os
import signal

import pytest

from everydream_kit.training.control import StopSignal, signals_stop


class EndedAtOnceError(Exception):
    """Stands for the end of the process."""


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_second_signal_ends_the_process_at_once_with_its_status(
    monkeypatch: pytest.MonkeyPatch, number: signal.Signals, status: int
) -> None:
    def end(code: int) -> None:
        raise EndedAtOnceError(code)

    monkeypatch.setattr(os, "_exit", end)
    before = signal.getsignal(number)
    stop = StopSignal()
    with signals_stop(stop):
        os.kill(os.getpid(), number)
        assert (stop.is_set(), stop.reason) == (True, number.name)
        with pytest.raises(EndedAtOnceError, match=str(status)):
            os.kill(os.getpid(), number)
    assert signal.getsignal(number) is before
