"""Killed at any moment, also inside a save: the run continues from its latest complete checkpoint and ends with the same
bytes.

Several kills are dealt to one run (kill, resume, kill, ...), by processes of a fork server.
"""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import tiny_folder
from warm_commands import Command

from everydream_kit.runs import RunFolder, list_runs
from everydream_kit.training.checkpoints import verify_checkpoint

SECONDS_TO_START = 120


def settings(model: Path, images: Path, logdir: Path) -> dict[str, object]:
    return {
        "resume_ckpt": str(model),
        "data_root": str(images),
        "project_name": "kill",
        "resolution": 64,
        "batch_size": 4,
        "max_epochs": 6,
        "lr": 1e-4,
        "logdir": str(logdir),
        "no_save_ckpt": True,
        "sample_steps": None,
        "save_every_n_steps": 2,
        "log_step": 1,
        "num_workers": 0,
        "cache_variants": 1,
        "shuffle_tags": (
            model / "unet"
        ).is_dir(),  # captions of the others are encoded before the run, if they do not vary
        "flip_p": 0.5,
    }


def steps_done(run: RunFolder) -> int:
    return max((event["step"] for event in run.events("loss")), default=0)


def train_whole(tmp_path: Path, model: Path, images: Path) -> RunFolder:
    config = tmp_path / "whole.json"
    config.write_text(json.dumps(settings(model, images, tmp_path / "whole")), "utf-8")
    process = Command("train", "--config", config, errors=tmp_path / "whole.log")
    errors = process.finish(280)
    assert process.returncode == 0, errors
    return list_runs(tmp_path / "whole")[-1]


def wait_for(moment: str, run_of: object, process: Command, chance: random.Random) -> None:
    """Let the process run on to the wished moment: `save`: while a checkpoint is half written; else after some steps."""
    deadline = time.monotonic() + SECONDS_TO_START
    seen: int | None = None
    target = chance.randint(0, 3)
    while process.poll() is None and time.monotonic() < deadline:
        run = run_of()  # type: ignore[operator]
        if run is not None:
            if moment == "save" and any(run.checkpoints_folder.glob(".partial-*")):
                return
            if moment == "step":
                done = steps_done(run)
                seen = done if seen is None else seen
                if done >= seen + target and run.status().get("state") == "running":
                    time.sleep(chance.random() * 0.3)
                    return
        time.sleep(0.002)


def weights_of(checkpoint: Path) -> dict[str, dict[str, torch.Tensor]]:
    """The weights by the model's parts."""
    files = sorted(path for path in checkpoint.glob("*/*.safetensors") if path.parent.name != "resume")
    return {path.parent.name: load_file(path) for path in files}


def no_checkpoint_only_looks_whole(run: RunFolder) -> None:
    for checkpoint in run.checkpoints():
        parts = weights_of(checkpoint.folder)
        assert {"vae", "text_encoder"} < parts.keys()
        assert parts.keys() & {"unet", "transformer"}
        if checkpoint.resumable:
            verify_checkpoint(checkpoint.folder)


def kill_and_resume(tmp_path: Path, model: Path, images: Path, moments: list[str], chance: random.Random) -> RunFolder:
    logdir = tmp_path / "killed"
    config = tmp_path / "killed.json"
    config.write_text(json.dumps(settings(model, images, logdir)), "utf-8")

    def run_of() -> RunFolder | None:
        runs = list_runs(logdir)
        return runs[-1] if runs else None

    log = tmp_path / "killed.log"
    process = Command("train", "--config", config, errors=log)
    kills = 0
    for moment in moments:
        try:
            wait_for(moment, run_of, process, chance)
        finally:
            killed = process.kill()
            errors = process.finish(280)
        assert killed or process.returncode == 0, errors
        kills += killed
        run = run_of()
        if run is not None:
            no_checkpoint_only_looks_whole(run)
        has_one = run is not None and any(checkpoint.resumable for checkpoint in run.checkpoints())
        words = ("resume", run.folder) if has_one and run else ("train", "--config", config)
        process = Command(*words, errors=log)
    errors = process.finish(280)
    assert process.returncode == 0, errors
    assert kills >= 1
    run = run_of()
    assert run is not None
    return run


def assert_same_weights(whole: RunFolder, killed: RunFolder) -> None:
    assert killed.status()["state"] == "finished"
    expected, found = weights_of(whole.last_checkpoint), weights_of(killed.last_checkpoint)
    assert expected.keys() == found.keys()
    for part in expected:
        assert all(torch.equal(expected[part][name], found[part][name]) for name in expected[part]), part


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("family", "moments"),
    [("sd1", ["step", "save", "step", "save", "step"]), ("z_image", ["step", "save"])],
    ids=["sd1", "z_image"],
)
def test_kills_change_no_byte(
    tmp_path: Path, tiny_model_folder: Path, image_folder: Path, family: str, moments: list[str]
) -> None:
    model = tiny_model_folder if family == "sd1" else tiny_folder(family)
    whole = train_whole(tmp_path, model, image_folder)
    assert_same_weights(whole, kill_and_resume(tmp_path, model, image_folder, moments, random.Random(1)))


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_thirty_kills_change_no_byte(tmp_path: Path, tiny_model_folder: Path, image_folder: Path) -> None:
    whole = train_whole(tmp_path, tiny_model_folder, image_folder)
    for number in range(6):
        chance = random.Random(100 + number)
        moments = [chance.choice(["step", "save"]) for _ in range(5)]
        folder = tmp_path / str(number)
        folder.mkdir()
        assert_same_weights(whole, kill_and_resume(folder, tiny_model_folder, image_folder, moments, chance))
