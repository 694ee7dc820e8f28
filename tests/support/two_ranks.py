"""What test_ranks.py starts on two processes, once for all its tests: starting costs more than training.

torchrun --nproc_per_node 2 two_ranks.py FOLDER     (FOLDER/config.json holds the settings of the run on one process)
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from everydream_kit.sessions import RUN_FOLDER_VARIABLE, resume, train
from everydream_kit.training.reports import Listener
from everydream_kit.workspace import RunFolder

RANK = int(os.environ["RANK"])


class EndsEarly(Listener):
    """What early stopping does, on the main process only, as all of the run's own listeners."""

    def __call__(self, run, report) -> None:
        run.ended_early = report.step == 2


def divided_batch(folder: Path, settings: dict) -> None:
    """The whole model on both; half the rate from live.json, which the main process alone reads, and twice the rate."""
    run = RunFolder(folder / "ddp")
    run.folder.mkdir(exist_ok=True)
    (run.folder / "live.json").write_text(json.dumps({"lr_factor": 0.5}), "utf-8")
    os.environ[RUN_FOLDER_VARIABLE] = str(run.folder)
    train({**settings, "batch_size": 2, "lr": 2 * settings["lr"], "load_settings_every_epoch": True})


def divided_model(folder: Path, settings: dict) -> None:
    """Slices of the model; ended after two steps, resumed for one more."""
    os.environ[RUN_FOLDER_VARIABLE] = str(folder / "fsdp2")
    prompts = folder / "prompts.json"
    prompts.write_text(json.dumps({"cfgs": [3], "num_inference_steps": 2, "samples": [{"prompt": "red"}]}), "utf-8")
    extra = {
        "batch_size": 2,
        "parallel": "fsdp2",
        "gradient_checkpointing": True,
        "save_every_n_steps": 1,
        "sample_steps": 100,
        "sample_prompts": str(prompts),
        "validation_config": {"val_split_mode": "manual", "manual_data_root": settings["data_root"]},
    }
    run = train({**settings, **extra}, listeners=[EndsEarly()] if RANK == 0 else [])
    resume(run.folder, changes={"max_steps": 3})


if __name__ == "__main__":
    place = Path(sys.argv[1])
    wanted = json.loads((place / "config.json").read_text("utf-8"))
    divided_batch(place, wanted)
    divided_model(place, wanted)
