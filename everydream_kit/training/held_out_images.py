"""Which images are measured: those that the settings take from the training, and sets of their own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from everydream_kit.config.sample_settings import ValidationGroup
from everydream_kit.data.dataset import Dataset
from everydream_kit.errors import DataError
from everydream_kit.training.validation import content_groups, split_indices


@dataclass(frozen=True)
class ValidationSet:
    """Images with a curve of their own. `tag` is the curve's name; `decides` says that best and stopping follow it."""

    tag: str
    dataset: Dataset
    decides: bool = False


def split_dataset(
    dataset: Dataset, settings: ValidationGroup, scan: Callable[[str], Dataset]
) -> tuple[Dataset, list[ValidationSet]]:
    """Divide the images into those that are trained on and the sets that are measured.

    Args:
        dataset: all images.
        settings: which images are measured.
        scan: reads a folder (manual and extra sets).

    Raises:
        DataError: a manual or extra set has no image that can be used.
    """
    sets = []
    training = dataset
    if settings.validation_split_mode != "none":
        if settings.validation_split_mode == "automatic":
            kept, held_out = split_indices(
                content_groups(dataset), settings.validation_split_proportion, settings.validation_seed
            )
            training, measured = dataset.subset(kept), dataset.subset(held_out)
        else:
            measured = _scan_some(scan, str(settings.validation_data_root))
        sets.append(ValidationSet("loss/val", measured, decides=True))
    if settings.stabilize_training_loss:
        groups = content_groups(training)
        _, stable = split_indices(
            groups, settings.stabilize_split_proportion, settings.validation_seed, "stabilized loss"
        )
        sets.append(ValidationSet("loss/train-stabilized", training.subset(stable)))
    for name, folder in (settings.validation_extra_data_roots or {}).items():
        sets.append(ValidationSet(f"loss/{name}", _scan_some(scan, folder)))
    return training, sets


def _scan_some(scan: Callable[[str], Dataset], folder: str) -> Dataset:
    dataset = scan(folder)
    if not len(dataset):
        raise DataError(f"validation: {folder} holds no usable image.")
    return dataset
