"""The project folder that all notebooks and panels share: images, settings, runs, results.

    workspace/jets/
        input/              the images and their captions
        settings.json       what the training form last held
        presets.json        settings that were saved by name
        sample_prompts.txt  prompts of the samples, one a line; or a .json that says more
        logs/               run folders
        exports/            files for image apps
        compare/            images generated to compare checkpoints

Its name is the project's. No widgets here.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from everydream_kit.actions.bases import suggested_settings
from everydream_kit.atomic import write_atomic
from everydream_kit.config import EMBEDDED_MODEL, TrainConfig
from everydream_kit.errors import ConfigError, JobError
from everydream_kit.jobs import Job, find_jobs, running_jobs
from everydream_kit.runs.in_folder import InFolder
from everydream_kit.settings import load_config
from everydream_kit.strict_json import read_json, read_small_object

DEMO_SUBJECTS = ("guitar", "penguin", "red apple")
"""What the demo's samples show, the clearest change first."""


@dataclass(frozen=True)
class Project:
    """A project folder. Nothing is remembered here that is not on disk, so a re-opened notebook finds it all."""

    folder: Path

    @classmethod
    def open(cls, folder: str | Path) -> Project:
        """Open a project by name or path (`locate_project`), and make its folders where they are missing.

        Raises:
            JobError: the path cannot be a project folder.
        """
        if not isinstance(folder, str | Path) or folder == "":
            raise JobError(f"project: give a name or a folder (got {folder!r}).")
        path = locate_project(folder).expanduser().resolve()
        if path.exists() and not path.is_dir():
            raise JobError(f"{path}: is a file; a project is a folder. Give another name.")
        for name in ("input", "logs", "exports"):
            (path / name).mkdir(parents=True, exist_ok=True)
        return cls(path)

    @property
    def name(self) -> str:
        return self.folder.name

    images_folder = InFolder("input")
    logdir = InFolder("logs")
    exports_folder = InFolder("exports")
    settings_path = InFolder("settings.json")
    presets_path = InFolder("presets.json")
    """The project's own presets."""

    @property
    def dataset_folder(self) -> Path:
        """The folder that its settings name as the dataset, else its own."""
        root = self.settings()["data_root"]
        return Path(root) if isinstance(root, str) and Path(root).is_dir() else self.images_folder

    @property
    def prompts_path(self) -> Path:
        """Prompts of the samples: the `.json`, which may say more than prompts, where it is there; else one a line.

        Without either, captions of the dataset are sampled.
        """
        rich = self.folder / "sample_prompts.json"
        return rich if rich.is_file() else self.folder / "sample_prompts.txt"

    def own_settings(self) -> dict[str, Any]:
        """Settings that follow from the project itself."""
        return {
            "project_name": self.name,
            "data_root": str(self.images_folder),
            "logdir": str(self.logdir),
            "save_ckpt_dir": str(self.exports_folder),
            "sample_prompts": str(self.prompts_path),
        }

    def settings(self) -> dict[str, Any]:
        """What the form last held, or the project's own settings on the embedded base."""
        start = {"resume_ckpt": EMBEDDED_MODEL, **self.own_settings()}
        try:
            saved = read_json(self.settings_path, error=ConfigError, missing={})
        except ConfigError as error:
            raise ConfigError(f"{error} Fix it, or delete it.") from error
        known = {name: value for name, value in saved.items() if name in TrainConfig.model_fields}
        return {**suggested_settings({**start, **known}), **start, **known}

    def save_settings(self, values: dict[str, Any]) -> None:
        """Write these settings; what else the file holds stays, since another panel may have written it.

        Raises:
            ConfigError: the file is broken. Nothing is overwritten.
        """
        held = read_json(self.settings_path, error=ConfigError, missing={})
        if (merged := {**held, **values}) != held or not self.settings_path.is_file():
            write_atomic(self.settings_path, json.dumps(merged, indent=2, ensure_ascii=False))

    def config(self, **changes: Any) -> TrainConfig:
        """The saved settings as a config. Raises: ConfigError."""
        return load_config(None, {**self.settings(), **changes})[0]

    def add_demo_images(self) -> bool:
        """Copy the kit's demo images into the dataset folder if it is empty. Returns whether it was."""
        if any(self.images_folder.iterdir()):
            return False
        from everydream_kit.demo import images_path
        from everydream_kit.demo.main import GUIDANCE_SCALE, NUM_SHEET_STEPS, TRAINING

        for source in sorted(images_path().iterdir()):
            if source.suffix != ".md":
                shutil.copy(source, self.images_folder)
        if not self.prompts_path.is_file():
            sampling = {
                "cfgs": [GUIDANCE_SCALE],
                "num_inference_steps": NUM_SHEET_STEPS,
                "samples": [{"prompt": f"{subject}, ink drawing"} for subject in DEMO_SUBJECTS],
            }
            write_atomic(self.folder / "sample_prompts.json", json.dumps(sampling, indent=2) + "\n")
        if not self.settings_path.is_file():
            self.save_settings({"resume_ckpt": EMBEDDED_MODEL, **self.own_settings(), **TRAINING})
        return True

    def jobs(self) -> list[Job]:
        """Runs of this project, latest first."""
        return find_jobs(self.logdir)

    def running_job(self) -> Job | None:
        running = running_jobs(self.logdir)
        return running[0] if running else None

    def checkpoints(self) -> list[Path]:
        """Complete checkpoints of all runs, latest run first, each run's latest first."""
        return [point.folder for job in self.jobs() for point in reversed(job.run.checkpoints())]

    @property
    def winner(self) -> Path | None:
        """The checkpoint that was picked in the compare panel, if it is still there."""
        path = self.folder / "winner.json"
        chosen = read_small_object(path).get("checkpoint")
        return Path(chosen) if isinstance(chosen, str) and Path(chosen).is_dir() else None

    def pick_winner(self, checkpoint: Path) -> None:
        write_atomic(self.folder / "winner.json", json.dumps({"checkpoint": str(checkpoint)}))


def locate_project(name: str | Path, *, mount_drive: bool = False) -> Path:
    """The folder of a project that is given by name or by path.

    A bare name lies in the host's storage, so that the same notebook keeps its work on Drive, on a pod's volume, or in
    `workspace/` on a plain machine. A path with folders is taken as it is.

    Args:
        name: `jets`, or `workspace/jets`.
        mount_drive: on Colab, mount Google Drive first.

    Raises:
        HostError: Drive was wanted and could not be mounted.
    """
    path = Path(name).expanduser()
    if len(path.parts) > 1:
        return path
    from everydream_kit.hosts import detect_host, prepare_storage

    return prepare_storage(detect_host(), Path("workspace"), mount_drive=mount_drive) / path
