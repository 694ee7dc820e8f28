"""EveryDream 2's validation config, and the settings that it means."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from everydream_kit.everydream2.side_files import Section, read_section

OLD_NAMES = {"val_data_root": "manual_data_root", "val_split_proportion": "auto_split_proportion"}
FORK_NAMES = ("clip_score_enabled", "clip_score_model", "fdd_enabled", "fdd_n_images", "fdd_model")
"""Measurements of damian0815's fork: passed over where they are off."""
_WORDS = {"true": True, "false": False}
"""EveryDream 2's `validation_coco.json` writes yes and no as text."""
Proportion = Annotated[float, Field(gt=0, lt=1)]


class ValidationFile(Section):
    """The whole file. None: not given."""

    validate_training: bool | None = None
    """Measure the loss on images that are not trained on. A file that does not say so does."""
    val_split_mode: Literal["automatic", "manual", "none"] | None = None
    auto_split_proportion: Proportion | None = None
    manual_data_root: str | None = None
    extra_manual_datasets: dict[str, str] | None = None
    stabilize_training_loss: bool | None = None
    stabilize_split_proportion: Proportion | None = None
    every_n_epochs: Annotated[float, Field(gt=0)] | None = None
    seed: Annotated[int, Field(ge=0)] | None = None
    batch_size: Annotated[int, Field(ge=1)] | None = None
    use_relative_loss: bool | None = None
    """Has no effect, as in EveryDream 2."""

    @model_validator(mode="before")
    @classmethod
    def _rename(cls, values: Any) -> Any:
        """Old names become the current ones; null means the default, as in EveryDream 2's files."""
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
    def _check_manual(self) -> ValidationFile:
        if self.validate_training is not False and self.val_split_mode == "manual" and not self.manual_data_root:
            raise ValueError("val_split_mode, manual_data_root: manual needs a folder in manual_data_root")
        return self


SETTING_OF_KEY = {
    "val_split_mode": "validation_split_mode",
    "auto_split_proportion": "validation_split_proportion",
    "manual_data_root": "validation_data_root",
    "extra_manual_datasets": "validation_extra_data_roots",
    "stabilize_training_loss": "stabilize_training_loss",
    "stabilize_split_proportion": "stabilize_split_proportion",
    "every_n_epochs": "validation_every_n_epochs",
    "seed": "validation_seed",
    "batch_size": "validation_batch_size",
}


def import_validation_file(source: str | Path | dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The settings that a validation config means. A file that says nothing means an automatic split.

    Args:
        source: its path, or the object itself.

    Returns:
        Values by setting, and what could not be translated, one sentence each.

    Raises:
        ConfigError: unreadable, an unknown name, or a wrong value; all problems at once.
    """
    file = read_section(source, ValidationFile, "validation_config")
    given = file.model_dump(exclude_none=True)
    values = {name: given[key] for key, name in SETTING_OF_KEY.items() if key in given}
    values.setdefault("validation_split_mode", "automatic")
    if file.validate_training is False:
        values["validation_split_mode"] = "none"
    if not file.use_relative_loss:
        return values, []
    return values, ["use_relative_loss: has no effect; compare with the first value of the curve."]
