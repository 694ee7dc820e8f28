"""EveryDream 2's validation config: what is measured, how often, and on which images."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from everydream_kit.training.json_settings import Section, read_section

OLD_NAMES = {"val_data_root": "manual_data_root", "val_split_proportion": "auto_split_proportion"}
FORK_NAMES = ("clip_score_enabled", "clip_score_model", "fdd_enabled", "fdd_n_images", "fdd_model")
"""Measurements of damian0815's fork: passed over where they are off."""
_WORDS = {"true": True, "false": False}
"""EveryDream 2's `validation_coco.json` writes yes and no as text."""
Proportion = Annotated[float, Field(gt=0, lt=1)]


class ValidationConfig(Section):
    """The whole file."""

    validate_training: bool = True
    """Measure the loss on images that are not trained on: `loss/val`."""
    val_split_mode: Literal["automatic", "manual", "none"] = "automatic"
    """automatic: take a share of the dataset out of training; manual: use another folder; none: neither."""
    auto_split_proportion: Proportion = 0.15
    """Share of the images that are taken out."""
    manual_data_root: str | None = None
    """Dataset of the manual mode."""
    extra_manual_datasets: dict[str, str] = Field(default_factory=dict)
    """Further datasets by name, each with a curve of its own: `loss/<name>`."""
    stabilize_training_loss: bool = False
    """Measure a share of the training images in the same way: `loss/train-stabilized`."""
    stabilize_split_proportion: Proportion = 0.15
    """That share; these images stay in training."""
    every_n_epochs: Annotated[float, Field(gt=0)] = 1
    """Epochs between measurements; 0.25 measures four times in an epoch."""
    seed: Annotated[int, Field(ge=0)] = 555
    """Address of the split and of the fixed noise."""
    batch_size: Annotated[int, Field(ge=1)] | None = None
    """Images measured together; None: as many as are trained together."""
    use_relative_loss: bool = False
    """Has no effect, as in EveryDream 2."""

    @model_validator(mode="before")
    @classmethod
    def _rename(cls, values: Any) -> Any:
        """Old names become today's; null means the default, as in EveryDream 2's files."""
        if not isinstance(values, dict):
            return values
        twice = [f"{old}, {new}" for old, new in OLD_NAMES.items() if old in values and new in values]
        if twice:
            raise ValueError(f"{twice[0]}: the old and the new name of one setting; give one of them")
        wrong = [name for name in FORK_NAMES if name.endswith("_enabled") and values.get(name)]
        if wrong:
            raise ValueError(f"{wrong[0]}: a measurement of damian0815's fork; the kit does not have it. Remove it.")
        return {
            OLD_NAMES.get(name, name): _WORDS.get(value, value) if isinstance(value, str) else value
            for name, value in values.items()
            if value is not None and name not in FORK_NAMES
        }

    @model_validator(mode="after")
    def _check_manual(self) -> ValidationConfig:
        if self.validate_training and self.val_split_mode == "manual" and not self.manual_data_root:
            raise ValueError("val_split_mode, manual_data_root: manual needs a folder in manual_data_root")
        return self

    @property
    def splits_training_set(self) -> bool:
        """Whether images are taken out of training."""
        return self.validate_training and self.val_split_mode == "automatic"

    @property
    def warnings(self) -> list[str]:
        """What the file asks for in vain, one sentence each."""
        if not self.use_relative_loss:
            return []
        return ["use_relative_loss: has no effect; compare with the first value of the curve."]


def load_validation_config(source: str | Path | dict[str, Any] | None) -> ValidationConfig:
    """Read a validation config: a path, the object itself, or None for the defaults.

    Raises:
        ConfigError: unreadable, an unknown name, or a wrong value; all problems at once.
    """
    return read_section(source, ValidationConfig, "validation_config")


def validation_steps(every_n_epochs: float, epoch: int, num_steps: int) -> frozenset[int]:
    """After which optimizer steps of an epoch to measure.

    Below 1 an epoch has n = round(1 / every_n_epochs) measurements, after steps ceil(i·L / n) - 1 for i = 1 .. n;
    above, the last step of every round(every_n_epochs)-th epoch.

    Args:
        epoch: from 0.
        num_steps: L, optimizer steps in this epoch.

    Returns:
        Steps within the epoch, from 0.
    """
    if every_n_epochs < 1:
        times = max(1, round(1 / every_n_epochs))
        return frozenset(math.ceil(i * num_steps / times) - 1 for i in range(1, times + 1))
    return frozenset({num_steps - 1}) if (epoch + 1) % round(every_n_epochs) == 0 else frozenset()
