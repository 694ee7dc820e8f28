"""EveryDream 2's `optimizer.json`, and the settings that it means.

`base` stands for both parts, `unet_overrides` and `text_encoder_overrides` for one. `null` gives nothing; 0 is a value.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator

from everydream_kit.config.declaration import (
    Betas,
    Decay,
    Epsilon,
    Guess,
    Momentum,
    OwnRate,
    PositiveSteps,
    Schedule,
    Steps,
)
from everydream_kit.everydream2.side_files import Section, read_section


class OptimizerSection(Section):
    """`base`, `unet_overrides` and `text_encoder_overrides`."""

    optimizer: str | None = None
    """Name, or `module.Class`; see docs/optimizers.md."""
    lr: OwnRate | None = None
    """Peak learning rate per optimizer step. Around 1 for the optimizers that find their own rate."""
    lr_scheduler: Schedule | None = None
    lr_warmup_steps: Steps | None = None
    lr_decay_steps: PositiveSteps | None = None
    """None, and 0 in EveryDream 2's files: by default."""
    betas: Betas | None = None
    epsilon: Epsilon | None = None
    weight_decay: Decay | None = None
    """Share of a weight that is taken away at each step, times the rate. Without it 0.01; 0 for sgd, dowg and the
    D-Adaptation kinds."""
    d0: Guess | None = None
    """First guess of the optimizers that find their own rate."""
    decouple: bool | None = None
    """Weight decay apart from the gradient, where an optimizer leaves the choice."""
    momentum: Momentum | None = None
    """For sgd and dadapt_sgd."""
    kwargs: dict[str, Any] | None = None
    """Any further keyword arguments of the optimizer's class."""

    @field_validator("lr_decay_steps", mode="before")
    @classmethod
    def _default_at_zero(cls, value: Any) -> Any:
        return None if isinstance(value, int | float) and value <= 0 else value


class TextEncoderFreezing(Section):
    """Which layers of the text encoder stay as they are. The embeddings come first, then the layers, then a norm."""

    freeze_embeddings: bool | None = None
    """Keep the token and position embeddings."""
    unfreeze_last_n_layers: Annotated[int, Field(ge=0)] | None = None
    """Train only this many layers, counted from the end. None: all."""
    unfreeze_final_n_layers: Annotated[int, Field(ge=0)] | None = None
    """EveryDream 2's documentation says it so; the same as unfreeze_last_n_layers."""
    freeze_front_n_layers: int | None = None
    """An older name: freeze this many from the front; negative: all but the last so many."""
    freeze_final_layer_norm: bool | None = None
    """Keep the norm after the last layer."""

    @model_validator(mode="after")
    def _check_one_count(self) -> TextEncoderFreezing:
        names = ("unfreeze_last_n_layers", "unfreeze_final_n_layers", "freeze_front_n_layers")
        given = [name for name in names if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{', '.join(given)}: they mean the same; give one of them")
        return self


class UnetFreezing(Section):
    """Which parameters of the UNet are trained, by regular expressions that are searched in their names."""

    train: list[str] | None = None
    """Only parameters that match one of these. None: all."""
    freeze: list[str] | None = None
    """And none that match one of these."""


class OptimizerFile(Section):
    """The whole file."""

    base: OptimizerSection | None = None
    unet_overrides: OptimizerSection | None = None
    text_encoder_overrides: OptimizerSection | None = None
    text_encoder_freezing: TextEncoderFreezing | None = None
    unet_freezing: UnetFreezing | None = None
    apply_grad_scaler_step_tweaks: bool | None = None
    """Float16 only: raise the loss scale more and more slowly as the run continues. On by default."""
    log_grad_norm: bool | None = None
    """Has no effect: the log always shows the gradient norm."""
    text_encoder_lr_scale: OwnRate | None = None
    """Factor on the base's rate for the text encoder, where its overrides give no rate."""


PREFIXES = {
    "base": "",
    "unet_overrides": "unet_",
    "text_encoder_overrides": "text_encoder_",
    "text_encoder_freezing": "text_encoder_",
    "unet_freezing": "unet_",
}
"""Sections, and how the settings begin that their keys mean."""
SETTING_OF_KEY = {
    "epsilon": "eps",
    "kwargs": "optimizer_args",
    "unfreeze_final_n_layers": "unfreeze_last_n_layers",
    "train": "train_layers",
    "freeze": "freeze_layers",
}
"""Keys of a section that have another name as settings."""


def import_optimizer_file(source: str | Path | dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The settings that an optimizer file means.

    Args:
        source: its path, or the object itself.

    Returns:
        Values by setting, and what could not be translated, one sentence each.

    Raises:
        ConfigError: unreadable, an unknown name, or a wrong value; all problems at once.
    """
    file = read_section(source, OptimizerFile, "optimizer_config")
    given = file.model_dump(exclude_none=True, exclude={"log_grad_norm"})
    values: dict[str, Any] = {}
    for section, prefix in PREFIXES.items():
        own = given.pop(section, {})
        values |= {f"{prefix}{SETTING_OF_KEY.get(key, key)}": value for key, value in own.items()}
    values |= given
    notes = []
    if "text_encoder_lr_scale" in values and "text_encoder_lr" in values:
        del values["text_encoder_lr_scale"]
        notes.append("text_encoder_lr_scale: not used, since optimizer_config gives text_encoder_overrides.lr.")
    if file.log_grad_norm is False:
        notes.append("log_grad_norm: has no effect; the log always shows the gradient norm.")
    return values, notes
