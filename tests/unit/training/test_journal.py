"""What a run says of itself while it has nothing new to say."""

import threading
import time
from pathlib import Path

import pytest

from everydream_kit.jobs import Job
from everydream_kit.training.journal import Journal
from everydream_kit.workspace import RunFolder


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
    folder.write_status({**folder.status(), "host": "elsewhere"})
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


def test_progress_belongs_to_one_state_and_other_facts_stay(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path, "jets")
    journal = Journal(folder)
    journal.set_state("sampling", progress=0.5, step=4)
    assert folder.status()["progress"] == 0.5
    journal.set_state("running")
    assert folder.status()["progress"] is None
    assert folder.status()["step"] == 4
    journal.close()
