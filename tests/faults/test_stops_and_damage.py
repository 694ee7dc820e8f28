"""Signals and damaged checkpoints: what is requested happens, and nothing that was whole is lost."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from stop_after import StopAfter

from everydream_kit.cli import main
from everydream_kit.errors import CheckpointError, ConfigError, DataError, JobError
from everydream_kit.identity import Process, this_process
from everydream_kit.locks import hold, is_held
from everydream_kit.runs import RunFolder, list_runs
from everydream_kit.sessions import RUN_FOLDER_VARIABLE, resume, train
from everydream_kit.training.checkpoints import sweep, verify_checkpoint
from everydream_kit.training.reports import Listener, StepReport
from everydream_kit.training.run import Run


def wait_for_a_step(
    process: subprocess.Popen[Any], logdir: Path, read_some: Callable[[], object] = lambda: None
) -> None:
    """Wait until a run has reported its first step, or has ended."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        runs = list_runs(logdir)
        if runs and any(runs[-1].events("loss")):
            return
        read_some()
        time.sleep(0.05)


def drain(terminal: int) -> None:
    """Take what a terminal holds: a full one would hold the trainer up."""
    with contextlib.suppress(BlockingIOError):
        os.read(terminal, 10_000)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_finishes_the_step_saves_and_says_so(
    settings: dict[str, Any], tmp_path: Path, number: signal.Signals, status: int
) -> None:
    config = tmp_path / "c.json"
    config.write_text(json.dumps({**settings, "max_epochs": 500}), "utf-8")
    process = subprocess.Popen(
        [sys.executable, "-m", "everydream_kit", "train", "--config", str(config)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        wait_for_a_step(process, tmp_path / "logs")
        process.send_signal(number)
        output, errors = process.communicate(timeout=120)
    finally:
        process.kill()
        process.wait()
    run = list_runs(tmp_path / "logs")[-1]
    assert process.returncode == status, errors
    assert "everydream resume" in output
    assert "Stopping after this step" in errors
    state = run.status()
    assert (state["state"], state["stopped_by"]) == ("stopped", number.name)
    verify_checkpoint(run.last_checkpoint)
    assert run.checkpoints()[-1].step == state["step"]


TAKES_ITS_TERMINAL = (
    "import fcntl, os, signal, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
    "signal.signal(signal.SIGHUP, signal.SIG_DFL); "  # under nohup it would be ignored, and the run would continue, as it should
    "os.execv(sys.executable, sys.argv[1:])"
)


def test_a_closed_terminal_stops_and_saves(settings: dict[str, Any], tmp_path: Path) -> None:
    config = tmp_path / "c.json"
    config.write_text(json.dumps({**settings, "max_epochs": 500, "num_workers": 2}), "utf-8")
    terminal, streams = pty.openpty()
    command = [sys.executable, "-m", "everydream_kit", "train", "--config", str(config)]
    process = subprocess.Popen(
        [sys.executable, "-c", TAKES_ITS_TERMINAL, *command],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdin=streams,
        stdout=streams,
        stderr=streams,
        start_new_session=True,
    )
    os.close(streams)
    os.set_blocking(terminal, False)
    try:
        wait_for_a_step(process, tmp_path / "logs", read_some=lambda: drain(terminal))
        os.close(terminal)
        assert process.wait(timeout=120) == 128 + signal.SIGHUP
    finally:
        process.kill()
    run = list_runs(tmp_path / "logs")[-1]
    assert (run.status()["state"], run.status()["stopped_by"]) == ("stopped", "SIGHUP")
    verify_checkpoint(run.last_checkpoint)
    assert run.checkpoints()[-1].step == run.status()["step"] > 0


def steps_of(run: RunFolder, kind: str) -> list[int]:
    return [event["step"] for event in run.events(kind)]


def test_a_stop_ends_a_drawing_saves_at_once_and_the_drawing_is_made_up_for(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    prompts = tmp_path / "p.json"
    prompts.write_text('{"cfgs": [1.0], "num_inference_steps": 2, "samples": [{"prompt": "red"}]}', "utf-8")
    sampling = {**settings, "sample_steps": 2, "max_steps": 5, "sample_prompts": str(prompts)}
    run = train(sampling, listeners=[StopAfter(1)])
    assert (run.status()["state"], run.status()["step"], run.status()["progress"]) == ("stopped", 2, None)
    assert [checkpoint.step for checkpoint in run.checkpoints()] == [2]
    assert steps_of(run, "sample") == []
    resume(run.folder)
    assert steps_of(run, "sample") == [2, 4, 5]
    assert run.status()["state"] == "finished"


def test_a_kill_while_the_last_samples_are_made_loses_no_step(settings: dict[str, Any], tmp_path: Path) -> None:
    prompts = tmp_path / "p.json"
    prompts.write_text('{"cfgs": [1.0], "num_inference_steps": 1000, "samples": [{"prompt": "red"}]}', "utf-8")
    config = tmp_path / "c.json"
    sampling = {**settings, "sample_steps": 100, "max_steps": 1, "sample_prompts": str(prompts)}
    config.write_text(json.dumps(sampling), "utf-8")
    with subprocess.Popen(
        [sys.executable, "-m", "everydream_kit", "train", "--config", str(config)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        try:
            while process.poll() is None and not is_sampling(tmp_path / "logs"):
                time.sleep(0.05)
        finally:
            process.kill()
    run = list_runs(tmp_path / "logs")[-1]
    assert process.returncode == -signal.SIGKILL
    assert [checkpoint.name for checkpoint in run.checkpoints()] == ["last-stop-ep00-gs00001"]
    prompts.write_text('{"cfgs": [1.0], "num_inference_steps": 1, "samples": [{"prompt": "red"}]}', "utf-8")
    resume(run.folder)
    assert (steps_of(run, "sample"), run.status()["state"]) == ([1], "finished")


def is_sampling(logdir: Path) -> bool:
    return any(run.status().get("state") == "sampling" for run in list_runs(logdir))


def test_a_plug_in_that_fails_at_the_end_costs_no_step(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "class Late:\n    def on_training_end(self, **kwargs):\n        raise ValueError('too late')\n"
    (tmp_path / "late_plug_in.py").write_text(code, "utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match="too late"):
        train({**settings, "max_steps": 1, "plugins": ["late_plug_in.Late"]})
    run = list_runs(tmp_path / "logs")[-1]
    assert [checkpoint.name for checkpoint in run.checkpoints()] == ["last-stop-ep00-gs00001"]


def test_a_stop_draws_nothing_of_its_own(settings: dict[str, Any]) -> None:
    run = train({**settings, "sample_steps": 100, "max_steps": 3}, listeners=[StopAfter(1)])
    assert run.status()["state"] == "stopped"
    assert steps_of(run, "sample") == []
    resume(run.folder)
    assert set(steps_of(run, "sample")) == {3}  # of the end; none is made up for


def test_a_stop_ends_the_encoding_before_the_first_step_and_keeps_what_is_encoded(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "c.json"
    config.write_text(json.dumps({**settings, "cache_latents": "disk", "max_steps": 1}), "utf-8")
    run = RunFolder.create(tmp_path / "logs", "stop")
    run.request("stop")
    monkeypatch.setenv(RUN_FOLDER_VARIABLE, str(run.folder))
    assert main(["train", "--config", str(config)]) == 0
    status = run.status()
    assert status["state"] == "stopped"
    assert status["message"] == "Stopped before training began; nothing was saved."
    assert f"everydream train --config {run.config_path}" in capsys.readouterr().out
    assert not run.checkpoints()
    assert run.pending_action() is None
    assert list((tmp_path / "logs" / ".edk_cache" / "latents").rglob("*.safetensors"))
    assert main(["train", "--config", str(run.config_path)]) == 0
    assert list_runs(tmp_path / "logs")[-1].status()["state"] == "finished"


@pytest.mark.parametrize("name", ["unet/diffusion_pytorch_model.safetensors", "resume/optimizer.safetensors"])
def test_a_truncated_checkpoint_is_refused_by_name_and_the_one_before_taken(run: RunFolder, name: str) -> None:
    latest, before = run.checkpoints()[-1], run.checkpoints()[-2]
    damaged = latest.folder / name
    os.truncate(damaged, damaged.stat().st_size // 2)
    with pytest.raises(CheckpointError, match=Path(name).name):
        verify_checkpoint(latest.folder)
    shutil.move(run.folder / "events.jsonl", run.folder / "events-before.jsonl")
    again = resume(run.folder)
    warnings = [event["message"] for event in again.events("warning")]
    assert any(Path(name).name in text and "the checkpoint before it" in text for text in warnings)
    assert next(again.events("resumed"))["step"] == before.step
    assert again.status()["state"] == "finished"
    verify_checkpoint(again.last_checkpoint)


def test_a_changed_byte_is_noticed(run: RunFolder) -> None:
    path = run.last_checkpoint / "unet" / "diffusion_pytorch_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="SHA-256 differs"):
        verify_checkpoint(run.last_checkpoint)


def test_without_any_whole_checkpoint_resume_says_what_to_do(run: RunFolder) -> None:
    for checkpoint in run.checkpoints():
        if checkpoint.resumable:
            shutil.rmtree(checkpoint.folder / "resume")
    with pytest.raises(CheckpointError, match=r"no resumable checkpoint[\s\S]*--resume_ckpt"):
        resume(run.folder)


def test_a_run_that_saved_nothing_is_started_anew_with_its_settings(run: RunFolder) -> None:
    for checkpoint in run.checkpoints():
        shutil.rmtree(checkpoint.folder)
    with pytest.raises(
        CheckpointError, match=r"no resumable checkpoint[\s\S]*everydream train --config .*config\.json"
    ):
        resume(run.folder)
    assert train(run.config_path).status()["state"] == "finished"


def test_a_run_in_progress_is_not_joined_and_what_it_is_writing_stays(run: RunFolder) -> None:
    half = run.checkpoints_folder / ".partial-stop-ep09-gs00099"
    half.mkdir()
    events = run.events_path.read_bytes()
    with hold(run.lock_path, ""), pytest.raises(JobError, match=r"this run is in progress \(process \d+\)"):
        resume(run.folder)
    assert half.is_dir()
    assert run.events_path.read_bytes() == events


def test_a_run_on_another_machine_is_not_joined_while_it_reports(run: RunFolder) -> None:
    half = run.checkpoints_folder / ".partial-stop-ep09-gs00099"
    half.mkdir()
    run.write_status({**run.status(), "state": "running", "host": "elsewhere", "place": "f" * 16})
    with pytest.raises(JobError, match="in progress on another machine, elsewhere"):
        resume(run.folder)
    assert half.is_dir()


def test_a_session_holds_its_folder_from_beginning_to_end(settings: dict[str, Any]) -> None:
    held: list[bool] = []

    class Looking(Listener):
        def __call__(self, run: Run, report: StepReport) -> None:
            held.append(is_held(run.folder.lock_path))

    run = train({**settings, "max_epochs": 1}, listeners=[Looking()])
    assert held
    assert all(held)
    assert not is_held(run.lock_path)


ELSEWHERE = {"host": "other", "place": "f" * 16, "pid": 1, "started": "1"}
WHOSE = {
    "a process that is gone": (lambda: Process(this_process().place, this_process().pid, "0").to_json(), True),
    "a process that runs": (lambda: this_process().to_json(), False),
    "another machine's": (lambda: {**ELSEWHERE, "heartbeat": time.time()}, False),
    "another machine's of two days ago": (lambda: {**ELSEWHERE, "heartbeat": time.time() - 48 * 3600}, True),
    "nobody's": (dict, False),
}


@pytest.mark.parametrize("whose", WHOSE)
def test_half_written_checkpoints_of_dead_runs_go_when_another_run_starts(whose: str, tmp_path: Path) -> None:
    status, is_swept = WHOSE[whose]
    folder = tmp_path / "jets-20260101-000000"
    half = folder / "ckpts" / ".partial-jets-ep01-gs00020"
    half.mkdir(parents=True)
    (folder / "config.json").write_text("{}", "utf-8")
    (folder / "status.json").write_text(json.dumps(status()), "utf-8")
    with pytest.raises(DataError, match="no-images"):
        train({"resume_ckpt": "embedded", "data_root": str(tmp_path / "no-images"), "logdir": str(tmp_path)})
    assert half.exists() is not is_swept


def test_a_killed_half_line_of_the_events_does_not_end_a_resume(run: RunFolder) -> None:
    with run.events_path.open("a") as file:
        file.write('{"kind": "loss", "st')
    run = resume(run.folder)
    assert run.status()["state"] == "finished"
    assert next(run.events("resumed"))["kind"] == "resumed"


def test_what_a_killed_process_left_is_cleared_and_what_it_was_replacing_is_put_back(tmp_path: Path) -> None:
    for name in (".partial-a", ".gone-b", ".old-best"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    sweep(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["best"]
    assert (tmp_path / "best" / "file").read_text() == ".old-best"
