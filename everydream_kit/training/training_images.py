"""What a run trains on: its dataset scanned under its settings, and the plan of its epochs.

Nothing here needs a model or a device, so a mistake in the dataset costs seconds.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from everydream_kit.data.epoch_plan import PlanSettings, plan_epoch
from everydream_kit.data.scanning import HOLDS_NO_IMAGE, scan_dataset
from everydream_kit.errors import ConfigError, DataError

if TYPE_CHECKING:
    from everydream_kit.config import TrainConfig
    from everydream_kit.data.dataset import Dataset
    from everydream_kit.training.journal import Journal


def resolve_seed(seed: int) -> int:
    """The seed itself, or a fresh one for -1."""
    return secrets.randbelow(2**31) if seed == -1 else seed


def scan(config: TrainConfig, data_root: Any) -> Dataset:
    """Scan a dataset under the run's settings."""
    return scan_dataset(
        data_root,
        cond_dropout=config.cond_dropout,
        flip_p=config.flip_p,
        shuffle_tags=config.shuffle_tags,
        keep_tags=config.keep_tags,
        caption_lines=config.caption_lines,
        loss_mask=config.loss_mask,
        cache_dir=Path(config.logdir) / ".edk_cache",
    )


def read_dataset(config: TrainConfig, journal: Journal) -> Dataset:
    """Scan the run's dataset and report what cannot be used.

    Raises:
        DataError: no image can be used.
    """
    dataset = scan(config, config.data_root)
    if not len(dataset) and all(problem.cause.startswith(HOLDS_NO_IMAGE) for problem in dataset.problems):
        raise DataError("\n".join(f"data_root {problem}" for problem in dataset.problems))
    for problem in dataset.problems:
        journal.warn(str(problem))
    if not len(dataset):
        raise DataError(f"data_root {config.data_root}: no image can be used; the log names each problem.")
    for mode, column, missing in (("file", "mask", "has a mask, NAME.mask.png"), ("alpha", "alpha", "is transparent")):
        if config.loss_mask == mode and not dataset.numbers[column].any():
            journal.warn(f"loss_mask {mode}: no image {missing}, so all of each image counts.")
    return dataset


def make_plan_settings(config: TrainConfig, seed: int, num_ranks: int) -> PlanSettings:
    """What the epoch plan depends on."""
    if config.batch_size == "auto":
        raise ConfigError(
            "batch_size: auto: becomes a number when a run starts (train, edk.train); to build a run by hand, give one"
        )
    return PlanSettings(
        batch_size=config.batch_size,
        grad_accum=config.grad_accum,
        resolutions=config.resolutions,
        seed=seed,
        num_ranks=num_ranks,
        rated_dropout_percent=config.rated_dataset_target_dropout_percent if config.rated_dataset else None,
        max_epochs=config.max_epochs,
    )


IMAGES_TO_PLAN = 2**21
"""Images whose epochs are planned to count a run's steps; about two seconds."""


def estimate_steps(
    dataset: Dataset, settings: PlanSettings, max_epochs: int, max_steps: int | None, start: int = 0
) -> int:
    """Optimizer steps of the whole run, or of the epochs from `start` on.

    They are the same in every epoch, unless ratings or fractions of multipliers vary them. Then each epoch is planned, or
    of a large dataset as many, evenly spread, as take about two seconds.

    Raises:
        DataError: no image is used in any of the epochs.
    """
    multiply = dataset.numbers["multiply"]
    varies = settings.rated_dropout_percent is not None or bool((multiply % 1).any())
    num_planned = max(2, IMAGES_TO_PLAN // max(1, len(dataset))) if varies else 1
    num_epochs = max_epochs - start
    epochs = sorted({round(e) for e in np.linspace(start, max_epochs - 1, min(num_planned, num_epochs))})
    steps = 0
    for number, epoch in enumerate(epochs, start=1):
        steps += plan_epoch(dataset, settings, epoch).num_steps
        if number == len(epochs):
            steps = round(steps * num_epochs / number)
        if max_steps is not None and steps >= max_steps:
            return max_steps
    if not steps and not start:
        raise DataError(f"multiply: no image is used in {max_epochs} epochs; raise multiply or max_epochs.")
    return steps


def choose_num_workers(num_workers: int | None) -> int:
    """Loader processes: as asked, or one fewer than there are cores, at most 8."""
    return max(0, min(8, (os.cpu_count() or 1) - 1)) if num_workers is None else num_workers
