"""Full disks, and folders that cannot be written: training continues while it can, and nothing that was saved is lost."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from stop_after import StopAfter

from everydream_kit.config import TrainConfig
from everydream_kit.errors import ConfigError, DiskSpaceError
from everydream_kit.runs import list_runs
from everydream_kit.sessions import train
from everydream_kit.training import checkpoint_saving
from everydream_kit.training.checkpoints import verify_checkpoint, write_checkpoint
from everydream_kit.training.reports import Listener, StepReport
from everydream_kit.training.run import Run


def test_a_disk_that_fills_up_leaves_the_checkpoints_before_untouched(tmp_path: Path) -> None:
    # A limit on the size of files stands for the full disk: the write fails in the middle in the same way.
    final = tmp_path / "ckpts" / "a-ep01-gs00001"
    write_checkpoint(final, lambda folder, open_file: (folder / "model_index.json").write_text("{}") and None)

    def too_large(folder: Path, open_file: object) -> None:
        (folder / "model_index.json").write_text("{}")
        (folder / "big.bin").write_bytes(b"x" * 200_000)

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(DiskSpaceError, match="Checkpoints before it are untouched"):
            write_checkpoint(final.with_name("a-ep02-gs00002"), too_large)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert [path.name for path in final.parent.iterdir()] == [final.name]


def test_a_checkpoint_that_cannot_fit_is_refused_before_a_byte_is_written(tmp_path: Path) -> None:
    def must_not_run(folder: Path, open_file: object) -> None:
        raise AssertionError("written although it cannot fit")

    with pytest.raises(DiskSpaceError, match=r"needs 1050000\.0 TB, and .* free"):
        write_checkpoint(tmp_path / "ckpts" / "huge", must_not_run, expected_bytes=10**18)


@pytest.fixture
def small_disk(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A disk of 100 MB, or of the megabytes that the test names."""
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={getattr(request, 'param', 100)}m", "tmpfs", str(small)],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode != 0:
        pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.strip()}")
    yield small
    subprocess.run(["umount", str(small)], check=True)


class FillingTheDisk(Listener):
    """Leaves no byte free after a step."""

    def __init__(self, disk: Path, step: int) -> None:
        self.file = disk / "fill"
        self.step = step

    def __call__(self, run: Run, report: StepReport) -> None:
        if report.step == self.step:
            with pytest.raises(OSError, match="No space left"), self.file.open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))


@pytest.mark.parametrize("small_disk", [12], indirect=True)  # less than a run's checkpoints
def test_a_real_full_disk_warns_and_training_goes_on(
    settings: dict[str, Any], small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_saving, "ROOM_PATIENCE_SECONDS", 0)
    with pytest.raises(DiskSpaceError):
        train(TrainConfig(**{**settings, "logdir": str(small_disk), "save_every_n_steps": 2}))
    run = list_runs(small_disk)[-1]
    assert run.status()["state"] == "failed"
    assert any("Training continues and saves again later" in event["message"] for event in run.events("warning"))
    for checkpoint in run.checkpoints():
        verify_checkpoint(checkpoint.folder)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # of TensorBoard's own thread
def test_a_disk_without_a_free_byte_ends_no_training_and_the_end_waits_for_room(
    settings: dict[str, Any], small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    filling = FillingTheDisk(small_disk, 2)
    monkeypatch.setattr(checkpoint_saving, "time", SimpleNamespace(sleep=lambda seconds: filling.file.unlink()))
    changes = {"logdir": str(small_disk), "max_steps": 8, "sample_steps": 3, "write_schedule": True, "max_epochs": 4}
    changes["sample_num_inference_steps"] = 1
    run = train({**settings, **changes}, listeners=[filling])
    assert run.status()["state"] == "finished"
    assert [event["step"] for event in run.events("loss")] == list(
        range(1, 9)
    )  # what was reported meanwhile came later
    warnings = "\n".join(event["message"] for event in run.events("warning"))
    assert "of step 3 failed: [Errno 28] No space left on device. Training continues." in warnings
    assert "The trained state stays in memory, for 30 minutes" in warnings
    verify_checkpoint(run.last_checkpoint)
    assert run.checkpoints()[-1].step == 8


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_stopped_run_that_cannot_be_saved_says_so(
    settings: dict[str, Any], small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_saving, "ROOM_PATIENCE_SECONDS", 0)
    listeners = [StopAfter(2), FillingTheDisk(small_disk, 2)]
    with pytest.raises(DiskSpaceError, match="Free some disk"):
        train(
            {
                **settings,
                "logdir": str(small_disk),
            },
            listeners=listeners,
        )


class TakingTheFolderAway(Listener):
    """Puts a file where the folder of single files was, after a step."""

    def __init__(self, folder: Path, step: int) -> None:
        self.folder, self.step = folder, step

    def __call__(self, run: Run, report: StepReport) -> None:
        if report.step == self.step:
            deadline = time.monotonic() + 120
            while not any(run.folder.events("saved")) and time.monotonic() < deadline:
                time.sleep(0.05)
            shutil.rmtree(self.folder)
            self.folder.touch()


@pytest.mark.parametrize("name", ["logdir", "save_ckpt_dir", "latent_cache_dir"])
def test_an_output_folder_that_cannot_be_written_is_known_before_anything_is_loaded(
    settings: dict[str, Any], tmp_path: Path, name: str
) -> None:
    (tmp_path / "file").touch()
    changes = {"no_save_ckpt": False, "save_ckpt_dir": str(tmp_path / "out"), "cache_latents": "disk"}
    unusable = {"resume_ckpt": str(tmp_path / "no model"), name: str(tmp_path / "file")}
    with pytest.raises(ConfigError, match=rf"{name}: .*file cannot be written \(File exists\). Give a folder"):
        train({**settings, **changes, **unusable})


def test_a_single_file_that_fails_is_a_warning_and_the_checkpoint_is_complete(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    changes = {"no_save_ckpt": False, "save_ckpt_dir": str(out), "save_every_n_steps": 2, "keep_last_n": 1}
    run = train({**settings, **changes, "max_epochs": 1}, listeners=[TakingTheFolderAway(out, 3)])
    assert run.status()["state"] == "finished"
    warnings = [event["message"] for event in run.events("warning") if "single file" in event["message"]]
    assert warnings
    assert all(f"everydream export {run.checkpoints_folder}" in text for text in warnings)
    assert not any("stays in memory" in event["message"] for event in run.events("warning"))
    assert len(run.checkpoints()) == 1  # keep_last_n holds all the same
    verify_checkpoint(run.last_checkpoint)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_first_signal_ends_the_waiting_for_room(
    settings: dict[str, Any], small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[float] = []

    def sleep(seconds: float) -> None:
        waited.append(seconds)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(checkpoint_saving, "time", SimpleNamespace(sleep=sleep))
    with pytest.raises(DiskSpaceError):
        train({**settings, "logdir": str(small_disk), "max_epochs": 1}, listeners=[FillingTheDisk(small_disk, 2)])
    assert len(waited) == 1


def test_single_files_of_another_run_stay_and_those_of_this_one_are_counted(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    changes = {"no_save_ckpt": False, "save_ckpt_dir": str(out), "save_every_n_steps": 1, "keep_last_n": 2}
    changes |= {"max_epochs": 1}
    first = train({**settings, **changes})
    assert len(list(first.events("saved"))) > 2
    assert len(list(out.iterdir())) == 2
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    second = train({**settings, **changes, "seed": 7})
    assert first.folder != second.folder
    assert {name: (out / name).read_bytes() for name in before} == before
    assert len(list(out.iterdir())) == 4
