"""What a run says of itself while it has nothing new to say."""

import resource
import signal
import threading
import time
from pathlib import Path

import pytest

from everydream_kit.jobs import Job
from everydream_kit.runs import RunFolder
from everydream_kit.training.journal import Journal


def heartbeat_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "heartbeat"]


def test_a_long_silence_does_not_look_like_the_end(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path, "jets")
    journal = Journal(folder, heartbeat_seconds=0.02)
    journal.set_state("sampling", step=3)
    first = folder.status()
    end = time.monotonic() + 30
    while folder.status()["heartbeat"] == first["heartbeat"]:
        assert time.monotonic() < end, "no heartbeat"
        time.sleep(0.01)
    assert {**folder.status(), "heartbeat": 0} == {**first, "heartbeat": 0}
    journal.close()
    assert heartbeat_threads() == []


def test_a_run_on_another_machine_lives_while_its_heart_beats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder.create(tmp_path, "jets")
    journal = Journal(folder, heartbeat_seconds=0.02)
    journal.set_state("running")
    journal.close()
    folder.write_status({**folder.status(), "host": "elsewhere", "place": "elsewhere"})
    assert Job(folder.folder).is_alive()
    late = time.time() + 3600
    monkeypatch.setattr("everydream_kit.jobs.job.time.time", lambda: late)
    assert not Job(folder.folder).is_alive()


def test_a_full_disk_does_not_end_the_heartbeat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder.create(tmp_path, "jets")
    journal = Journal(folder, heartbeat_seconds=0.02)
    journal.set_state("running")
    tried = []

    def full(self: RunFolder, status: dict) -> None:
        tried.append(status["state"])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "write_status", full)
        end = time.monotonic() + 30
        while len(tried) < 2:
            assert time.monotonic() < end
            time.sleep(0.01)
    assert len(heartbeat_threads()) == 1
    journal.close()


def test_an_event_that_the_disk_takes_half_of_is_completed_later(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path, "jets")
    journal = Journal(folder)
    journal.report("loss", step=1)
    size = folder.events_path.stat().st_size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20, hard))  # stands for a disk with twenty bytes left
    try:
        journal.report("loss", step=2)
        journal.report("loss", step=3)
        assert folder.events_path.stat().st_size == size + 20
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert [event["step"] for event in folder.events()] == [1]
    journal.report("loss", step=4)
    assert [event["step"] for event in folder.events()] == [1, 2, 3, 4]
    journal.close()


def test_a_status_that_cannot_be_written_is_said_with_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder.create(tmp_path, "jets")
    journal = Journal(folder)
    journal.set_state("running")
    with monkeypatch.context() as patch:
        patch.setattr("everydream_kit.atomic.os.fsync", full)
        journal.set_state("running", step=5)
    assert [path.name for path in folder.folder.iterdir() if path.name.endswith(".tmp")] == []
    assert "step" not in folder.status()
    journal.set_state("saving")
    assert folder.status()["step"] == 5
    journal.close()


def full(*_: object) -> None:
    raise OSError(28, "No space left on device")


def test_progress_belongs_to_one_state_and_other_facts_stay(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path, "jets")
    journal = Journal(folder)
    journal.set_state("sampling", progress=0.5, step=4)
    assert folder.status()["progress"] == 0.5
    journal.set_state("running")
    assert folder.status()["progress"] is None
    assert folder.status()["step"] == 4
    journal.close()


def test_a_line_that_a_kill_cut_off_is_ended_before_the_next_event(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.events_path.write_text('{"kind": "loss", "step": 1}\n{"kind": "loss", "st')
    journal = Journal(run)
    journal.report("loss", step=2)
    journal.close()
    assert [event["step"] for event in run.events("loss")] == [1, 2]
