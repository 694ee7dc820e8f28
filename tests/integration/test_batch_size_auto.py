"""`batch_size: auto` from one end to the other: estimated, chosen, written down, and the same when the run
continues."""

import json
from pathlib import Path

import pytest
import torch
from memory_stand_in import LinearMemory

from everydream_kit.config import TrainConfig
from everydream_kit.errors import MemoryLimitError
from everydream_kit.preflight.planning import plan
from everydream_kit.runs import list_runs
from everydream_kit.sessions import resume, train

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="chooses by host memory, which a machine with a GPU does not"
)


@pytest.fixture
def settings(tmp_path, image_folder):
    return {
        "resume_ckpt": "embedded",
        "data_root": str(image_folder),
        "logdir": str(tmp_path / "logs"),
        "resolution": 64,
        "batch_size": "auto",
        "disable_textenc_training": True,
        "max_steps": 11,
        "log_step": 5,
        "num_workers": 0,
        "cache_variants": 1,
        "sample_steps": None,
        "save_ckpt_dir": str(tmp_path / "models"),
    }


def bytes_under(folder):
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_the_number_is_chosen_once_and_a_resumed_run_takes_the_same(settings, monkeypatch):
    monkeypatch.setattr("everydream_kit.preflight.advice.LARGEST_BATCH_ON_CPU", 3)
    run = train(TrainConfig(**settings, optimizer="auto"))
    assert json.loads(run.config_path.read_text("utf-8"))["batch_size"] == 3
    assert json.loads(run.config_path.read_text("utf-8"))["optimizer"] == "adamw"
    (chosen,) = run.events("batch size")
    assert (chosen["batch_size"], chosen["device"]) == (3, "this CPU")
    assert "batch_size auto: 3, the largest up to 3 that fits this CPU" in run.log_path.read_text("utf-8")

    (timed,) = run.events("plan")  # the first steps, measured, say what the rest takes
    assert timed["step"] == 10
    assert timed["seconds_left"] == pytest.approx(timed["seconds_per_step"], abs=0.2)
    assert "s a step: about" in timed["line"]

    estimated = plan(run)  # the disk is filled as estimated, and the time is the run's own
    (checkpoints, files) = estimated.disk.items
    assert checkpoints.last_bytes == pytest.approx(bytes_under(run.checkpoints_folder), rel=0.05)
    assert files.last_bytes == pytest.approx(bytes_under(Path(settings["save_ckpt_dir"])), rel=0.05)
    assert (estimated.step.basis, estimated.step.source) == ("measured here", f"run {run.name}")
    assert estimated.seconds_left == 0

    monkeypatch.setattr("everydream_kit.preflight.advice.LARGEST_BATCH_ON_CPU", 1)
    resume(run.folder, changes={"max_steps": 12})
    assert json.loads(run.config_path.read_text("utf-8"))["batch_size"] == 3
    assert len(list(run.events("batch size"))) == 1
    assert run.status()["step"] == 12


def test_a_run_that_cannot_fit_fails_before_its_model_is_loaded(settings, monkeypatch):
    monkeypatch.setattr("everydream_kit.preflight.advice.device_room", lambda gpu_spec: 1000)
    monkeypatch.setattr("everydream_kit.preflight.auto_settings.memory_model", lambda config: LinearMemory())
    with pytest.raises(MemoryLimitError, match="batch_size: not even one image fits"):
        train(TrainConfig(**{**settings, "resume_ckpt": "absent"}))
    (run,) = list_runs(settings["logdir"])
    assert run.status()["state"] == "failed"
    assert "not even one image fits" in run.status()["message"]
