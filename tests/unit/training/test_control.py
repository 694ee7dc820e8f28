"""Stopping by signal: the first asks, the second ends at once; a closed terminal only asks."""

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


def test_a_signal_after_a_request_or_a_closed_terminal_is_still_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    monkeypatch.setattr("everydream_kit.training.control._print_nowhere", lambda: None)
    stop = StopSignal()
    with signals_stop(stop):
        stop.ask("request")
        for number in (signal.SIGHUP, signal.SIGHUP, signal.SIGTERM, signal.SIGHUP):
            os.kill(os.getpid(), number)
        assert ended == []
        assert stop.reason == "request"
        os.kill(os.getpid(), signal.SIGTERM)
        assert ended == [143]


def test_under_nohup_a_closed_terminal_is_ignored_as_before() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        stop = StopSignal()
        with signals_stop(stop):
            os.kill(os.getpid(), signal.SIGHUP)
        assert not stop.is_set()
    finally:
        signal.signal(signal.SIGHUP, before)
