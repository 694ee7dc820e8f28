"""A broken image among good ones: named, skipped, and the run continues."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from everydream_kit.config import TrainConfig
from everydream_kit.sessions import train


def test_a_run_goes_on_without_a_broken_image_and_names_it(
    tmp_path: Path, tiny_model_folder: Path, image_folder: Path
) -> None:
    data = tmp_path / "data"
    shutil.copytree(image_folder, data)
    whole = (data / "00.jpg").read_bytes()
    (data / "broken.jpg").write_bytes(whole[: len(whole) // 2])
    run = train(
        TrainConfig(
            resume_ckpt=str(tiny_model_folder),
            data_root=str(data),
            resolution=64,
            max_epochs=1,
            logdir=str(tmp_path / "logs"),
            no_save_ckpt=True,
            sample_steps=None,
        )
    )
    assert run.status()["state"] == "finished"
    [reported] = [event["message"] for event in run.events("warning") if "broken.jpg" in event["message"]]
    assert reported == f"{data / 'broken.jpg'}: the file is cut off: its end is missing. Copy or download it again."
    trained = [row["path"] for row in json.loads((run.folder / "losses/ep0.json").read_text())["images"]]
    assert len(trained) == 12
    assert not any("broken" in path for path in trained)
