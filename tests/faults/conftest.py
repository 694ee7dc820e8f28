"""A short run, and copies of one that saved twice, for tests that stop, damage and fill up."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from everydream_kit.config import TrainConfig
from everydream_kit.runs import RunFolder
from everydream_kit.sessions import train


def settings_in(folder: Path, tiny_model_folder: Path, image_folder: Path) -> dict[str, Any]:
    return {
        "resume_ckpt": str(tiny_model_folder),
        "data_root": str(image_folder),
        "project_name": "stop",
        "resolution": 64,
        "batch_size": 4,
        "max_epochs": 2,
        "logdir": str(folder / "logs"),
        "no_save_ckpt": True,
        "sample_steps": None,
        "log_step": 1,
        "num_workers": 0,
        "cache_variants": 1,
    }


@pytest.fixture
def settings(tmp_path: Path, tiny_model_folder: Path, image_folder: Path) -> dict[str, Any]:
    return settings_in(tmp_path, tiny_model_folder, image_folder)


@pytest.fixture(scope="module")
def saved_twice(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path, image_folder: Path) -> RunFolder:
    """A whole run with a checkpoint of step 3 and one of its end. Tests damage copies of it."""
    settings = settings_in(tmp_path_factory.mktemp("saved"), tiny_model_folder, image_folder)
    return train(TrainConfig(**{**settings, "max_epochs": 1, "save_every_n_steps": 3}))


@pytest.fixture
def run(saved_twice: RunFolder, tmp_path: Path) -> RunFolder:
    return RunFolder(Path(shutil.copytree(saved_twice.folder, tmp_path / "logs" / saved_twice.name)))
