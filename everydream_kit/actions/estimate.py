"""A quick estimate of a run before it starts: images, steps, time, disk. Cheap enough for every change in the form.

Steps come from the trainer's own plan of the first epoch, or, where a dataset is too large to be planned at every key
stroke, from the number of its files. Time comes from the speed of this project's last run at the same
resolution, and is not guessed without one. No widgets here.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from everydream_kit.actions.project import Project
from everydream_kit.config import EMBEDDED_MODEL, TrainConfig
from everydream_kit.data.dataset import Dataset
from everydream_kit.data.epoch_plan import PlanSettings, plan_epoch
from everydream_kit.data.image_files import count_images
from everydream_kit.data.scanning import scan_dataset
from everydream_kit.data.sources import kind_of_source
from everydream_kit.disk_space import known_free_disk
from everydream_kit.errors import DataError
from everydream_kit.preflight.units import size
from everydream_kit.runs import Checkpoint

LARGEST_PLANNED = 3000
"""Images up to which the first epoch is planned for real: a fraction of a second."""
GUESSED_BATCH_SIZE = 4
"""Stands for `auto` until the trainer has measured."""
SINGLE_FILE_BYTES = {True: 2.13e9, False: 4.27e9}
"""SD 1.x as a single file in half and in full precision, for bases that are not on this disk yet."""


@dataclass(frozen=True)
class QuickEstimate:
    """What a run will take.

    Attributes:
        num_images: image files found; None where the dataset is not a local folder.
        num_steps: optimizer steps of the whole run.
        seconds: time, or None where this machine has not trained such a run yet.
        checkpoint_bytes, free_bytes: size of one checkpoint with its resume state, and free disk for the run folder.
        missing: why the dataset cannot be used, such as a folder that is not there.
    """

    num_images: int | None
    num_epochs: int
    num_steps: int | None
    seconds: float | None
    checkpoint_bytes: float | None
    free_bytes: int | None
    missing: str = ""

    @property
    def problem(self) -> str:
        """What will keep the run from working, or an empty text."""
        if self.missing:
            return f"data_root: {self.missing}"
        if self.num_images == 0:
            return "No images in the dataset yet. Add some in the dataset panel, or give another data_root."
        if self.checkpoint_bytes and self.free_bytes is not None and self.free_bytes < 1.2 * self.checkpoint_bytes:
            need, free = size(self.checkpoint_bytes), size(self.free_bytes)
            return f"A checkpoint takes about {need} and only {free} are free where the run folder goes."
        return ""

    def steps_words(self) -> str:
        """How long the run is."""
        if self.num_steps is None:
            return "steps are known once the dataset is fetched"
        return f"{self.num_images} images × {self.num_epochs} epochs → {self.num_steps:,} steps"


def quick_estimate(config: TrainConfig, project: Project) -> QuickEstimate:
    """Look at the dataset folder, the last run and the disk."""
    images = count_images(config.data_root)
    batch_size = config.batch_size if isinstance(config.batch_size, int) else GUESSED_BATCH_SIZE
    per_step = batch_size * config.grad_accum
    steps = None
    if images is not None:
        if 0 < images <= LARGEST_PLANNED:
            num_images, in_epoch = _plan_first_epoch(config, batch_size, _latest_change(config.data_root))
            images = num_images
        else:
            in_epoch = math.ceil(images * len(config.resolutions) / per_step)
        steps = min(in_epoch * config.max_epochs, config.max_steps or in_epoch * config.max_epochs)
    speed = last_speed(project, config)
    weights = base_bytes(config.resume_ckpt)
    return QuickEstimate(
        num_images=images,
        num_epochs=config.max_epochs,
        num_steps=steps,
        seconds=steps * per_step / speed if steps is not None and speed else None,
        checkpoint_bytes=3 * weights if weights else None,  # the weights in float32 or half, and AdamW's two states
        free_bytes=known_free_disk(Path(config.logdir)),
        missing=_missing_source(config.data_root),
    )


def _missing_source(data_root: Any) -> str:
    """Why one of the dataset's sources cannot be used, or an empty text."""
    for source in data_root if isinstance(data_root, list) else [data_root]:
        if isinstance(source, str):
            try:
                kind_of_source(source)
            except DataError as error:
                return str(error)
    return ""


def _plan_first_epoch(config: TrainConfig, batch_size: int, changed: int) -> tuple[int, int]:
    """Usable images, and optimizer steps of an epoch; nothing and 0 steps where the dataset cannot be planned."""
    try:
        dataset = _scan(json.dumps(config.data_root), changed)
        settings = PlanSettings(
            batch_size=batch_size,
            grad_accum=config.grad_accum,
            resolutions=config.resolutions,
            seed=max(0, config.seed),
        )
        return len(dataset), plan_epoch(dataset, settings, 0).num_steps if len(dataset) else 0
    except DataError:  # the dataset panel and the trainer say what is wrong with it
        return 0, 0


@lru_cache(maxsize=4)
def _scan(data_root: str, changed: int) -> Dataset:
    return scan_dataset(json.loads(data_root))


def _latest_change(data_root: str | list[str] | dict[str, Any]) -> int:
    """When a file of the dataset was written or came last, so that a scan is used again until then."""
    latest = 0
    for root in [data_root] if isinstance(data_root, str) else data_root:
        for folder, _, names in os.walk(root):
            for path in (folder, *(os.path.join(folder, name) for name in names)):
                latest = max(latest, os.stat(path, follow_symlinks=False).st_mtime_ns)
    return latest


def last_speed(project: Project, config: TrainConfig) -> float | None:
    """Images a second of the latest run of this project with the same resolution and base, or None."""
    for job in project.jobs()[:5]:
        speed = job.status().get("images_per_second")
        settings = job.run.settings()
        same = all(settings.get(n) == getattr(config, n) for n in ("resolution", "resume_ckpt", "training_kind"))
        if speed and same:
            return float(speed)
    return None


@lru_cache(maxsize=16)
def base_bytes(source: str) -> float | None:
    """Bytes of a base model's weights: those on disk, else SD 1.x's."""
    if source == EMBEDDED_MODEL:
        return 32e6
    path = Path(source)
    if path.is_file():
        return float(path.stat().st_size)
    if path.is_dir():
        return float(sum(f.stat().st_size for f in Checkpoint.at(path).model_files() if f.suffix == ".safetensors"))
    return SINGLE_FILE_BYTES[False]
