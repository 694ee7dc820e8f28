"""Two processes: half the batch each, the same sums."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from everydream_kit.workspace import RunFolder, list_runs

CONFIG = {
    "project_name": "ranks",
    "resolution": 64,
    "max_epochs": 2,
    "optimizer": "sgd",  # Adam would divide by rounding errors where a gradient is almost zero
    "lr": 1e-2,
    "no_save_ckpt": True,
    "sample_steps": None,
    "log_step": 1,
    "num_workers": 0,
    "cache_variants": 1,
    "timestep_sampling": "stratified",
    "cond_dropout": 0.2,
}


def run_with(num_processes: int, folder: Path, settings: dict[str, object]) -> RunFolder:
    folder.mkdir()
    config = folder / "config.json"
    config.write_text(json.dumps({**CONFIG, **settings, "logdir": str(folder / "logs")}), "utf-8")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num_processes)]
    command = [sys.executable, *(launcher if num_processes > 1 else []), "-m", "everydream_kit"]
    done = subprocess.run(
        [*command, "train", "--config", str(config)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    runs = list_runs(folder / "logs")
    assert len(runs) == 1  # one writer
    return runs[0]


def test_two_processes_with_half_the_batch_equal_one(
    tmp_path: Path, tiny_model_folder: Path, picture_folder: Path
) -> None:
    base = {"resume_ckpt": str(tiny_model_folder), "data_root": str(picture_folder)}
    one = run_with(1, tmp_path / "one", {**base, "batch_size": 4})
    two = run_with(2, tmp_path / "two", {**base, "batch_size": 2})
    losses = [[event["loss"] for event in run.events("loss")] for run in (one, two)]
    assert len(losses[0]) >= 4
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    for part in ("unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"):
        first, second = load_file(one.last_checkpoint / part), load_file(two.last_checkpoint / part)
        assert max((first[name] - second[name]).abs().max().item() for name in first) < 1e-5
