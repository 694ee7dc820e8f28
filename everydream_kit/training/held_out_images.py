"""Which images are measured: those that the validation config takes from the training, and sets of their own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from everydream_kit.data.dataset import Dataset
from everydream_kit.errors import DataError
from everydream_kit.training.validation import content_groups, split_indices
from everydream_kit.training.validation_config import ValidationConfig


@dataclass(frozen=True)
class ValidationSet:
    """Images with a curve of their own. `tag` is the curve's name; `decides` says that best and stopping follow it."""

    tag: str
    dataset: Dataset
    decides: bool = False


def split_dataset(
    dataset: Dataset, config: ValidationConfig, scan: Callable[[str], Dataset]
) -> tuple[Dataset, list[ValidationSet]]:
    """Divide the images into those that are trained on and the sets that are measured.

    Args:
        dataset: all images.
        config: the validation config.
        scan: reads a folder (manual and extra sets).

    Raises:
        DataError: a manual or extra set has no image that can be used.
    """
    sets = []
    training = dataset
    if config.validate_training and config.val_split_mode != "none":
        if config.splits_training_set:
            kept, held_out = split_indices(content_groups(dataset), config.auto_split_proportion, config.seed)
            if not kept:
                raise DataError(
                    f"validation_config: the split leaves none of {len(dataset)} images for training; lower "
                    "auto_split_proportion or add images."
                )
            training, measured = dataset.subset(kept), dataset.subset(held_out)
        else:
            measured = _scan_some(scan, str(config.manual_data_root))
        sets.append(ValidationSet("loss/val", measured, decides=True))
    if config.stabilize_training_loss:
        groups = content_groups(training)
        _, stable = split_indices(groups, config.stabilize_split_proportion, config.seed, "stabilized loss")
        sets.append(ValidationSet("loss/train-stabilized", training.subset(stable)))
    for name, folder in config.extra_manual_datasets.items():
        sets.append(ValidationSet(f"loss/{name}", _scan_some(scan, folder)))
    return training, sets


def _scan_some(scan: Callable[[str], Dataset], folder: str) -> Dataset:
    dataset = scan(folder)
    if not len(dataset):
        raise DataError(f"validation_config: {folder} holds no usable image.")
    return dataset
