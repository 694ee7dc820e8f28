"""EveryDream 2's `optimizer.json`: what is trained how, for the UNet and the text encoder apart.

A value comes from the first of these that gives one: the part's own overrides, the run's settings where they were given
(`lr`, `optimizer`, ...), `base`, the defaults. `null` gives nothing; 0 is a value.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from everydream_kit.training.json_settings import Section, read_section

PARTS = ("unet", "text encoder")
DEFAULT_WEIGHT_DECAY = 0.01
"""EveryDream 2's, and torch's for AdamW; of optimizers whose decay is decoupled and scaled by a small rate."""

Beta = Annotated[float, Field(ge=0, lt=1)]


class OptimizerSection(Section):
    """`base`, `unet_overrides` and `text_encoder_overrides`."""

    optimizer: str | None = None
    """Name, or `module.Class`; see docs/optimizers.md."""
    lr: Annotated[float, Field(ge=0, le=100)] | None = None
    """Peak learning rate per optimizer step. Around 1 for the optimizers that find their own rate."""
    lr_scheduler: Literal["constant", "linear", "cosine", "polynomial"] | None = None
    lr_warmup_steps: Annotated[int, Field(ge=0)] | None = None
    lr_decay_steps: Annotated[int, Field(ge=1)] | None = None
    """None, and 0 in EveryDream 2's files: by default."""
    betas: Annotated[list[Beta], Field(min_length=1, max_length=3)] | None = None
    epsilon: Annotated[float, Field(ge=0, lt=1)] | None = None
    weight_decay: Annotated[float, Field(ge=0, le=10)] | None = None
    """Share of a weight that is taken away at each step, times the rate. Without it 0.01; 0 for sgd, dowg and the
    D-Adaptation kinds."""
    d0: Annotated[float, Field(gt=0)] | None = None
    """First guess of the optimizers that find their own rate."""
    decouple: bool | None = None
    """Weight decay apart from the gradient, where an optimizer leaves the choice."""
    momentum: Annotated[float, Field(ge=0, lt=1)] | None = None
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
            raise ValueError(f"{', '.join(given)}: they say the same thing; give one of them")
        return self

    def num_trained_layers(self, num_layers: int) -> int:
        """How many of the encoder's layers are trained, counted from the end."""
        if self.freeze_front_n_layers is not None:
            front = self.freeze_front_n_layers
            return min(num_layers, max(0, num_layers - front if front >= 0 else -front))
        last = self.unfreeze_last_n_layers
        last = self.unfreeze_final_n_layers if last is None else last
        return num_layers if last is None else min(last, num_layers)


class UnetFreezing(Section):
    """Which parameters of the UNet are trained, by regular expressions that are searched in their names."""

    train: list[str] | None = None
    """Only parameters that match one of these. None: all."""
    freeze: list[str] | None = None
    """And none that match one of these."""


class OptimizerConfig(Section):
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
    text_encoder_lr_scale: float | None = None
    """Has no effect, as in EveryDream 2; give text_encoder_overrides.lr."""

    @property
    def warnings(self) -> list[str]:
        """What the file asks for in vain, one sentence each."""
        warnings = []
        if self.text_encoder_lr_scale is not None:
            warnings.append("text_encoder_lr_scale: has no effect; give text_encoder_overrides.lr in optimizer_config.")
        if self.log_grad_norm is False:
            warnings.append("log_grad_norm: has no effect; the log always shows the gradient norm.")
        return warnings


@dataclass(frozen=True)
class PartSettings:
    """How one part (UNet or text encoder) is trained, with every question answered but the schedule's length.

    Attributes:
        part: "unet" or "text encoder".
        betas, eps, weight_decay: None for the optimizer's own default.
        lr_warmup_steps, lr_decay_steps: None for the default of `schedules`.
        kwargs: further keyword arguments of the optimizer's class.
    """

    part: str
    optimizer: str
    lr: float
    lr_scheduler: str = "constant"
    lr_warmup_steps: int | None = None
    lr_decay_steps: int | None = None
    betas: tuple[float, ...] | None = None
    eps: float | None = None
    weight_decay: float | None = None
    kwargs: Mapping[str, Any] = field(default_factory=dict)


def load_optimizer_config(source: str | Path | dict[str, Any] | None) -> OptimizerConfig:
    """Read `optimizer.json`: a path, the object itself, or None for the defaults.

    Raises:
        ConfigError: unreadable, an unknown name, or a wrong value; all problems at once.
    """
    return read_section(source, OptimizerConfig, "optimizer_config")


def part_settings(
    config: OptimizerConfig,
    part: str,
    *,
    given: Mapping[str, Any] | None = None,
    default_optimizer: str = "adamw",
    default_lr: float = 1e-6,
    default_lr_scheduler: str = "constant",
) -> PartSettings:
    """Settle how one part is trained.

    Args:
        config: the side file.
        part: "unet" or "text encoder".
        given: the run's own settings that a person gave: optimizer, lr, lr_scheduler, lr_warmup_steps, lr_decay_steps.
            They win over `base`, not over the part's overrides. None values do not count.
        default_optimizer, default_lr, default_lr_scheduler: where nobody says anything.
    """
    overrides = (config.unet_overrides if part == "unet" else config.text_encoder_overrides) or OptimizerSection()
    base = config.base or OptimizerSection()
    sources: tuple[Mapping[str, Any], ...] = (overrides.model_dump(), given or {}, base.model_dump())

    def first(name: str, default: Any = None) -> Any:
        return next((source[name] for source in sources if source.get(name) is not None), default)

    optimizer = first("optimizer", default_optimizer)
    betas = first("betas")
    # Another optimizer has other keyword arguments: the base's go with the base's optimizer only.
    inherits = optimizer == (base.optimizer or default_optimizer) or overrides.optimizer is None
    kwargs = {**(base.kwargs or {} if inherits else {}), **(overrides.kwargs or {})}
    kwargs.update({name: first(name) for name in ("d0", "decouple", "momentum") if first(name) is not None})
    return PartSettings(
        part=part,
        optimizer=optimizer,
        lr=first("lr", default_lr),
        lr_scheduler=first("lr_scheduler", default_lr_scheduler),
        lr_warmup_steps=first("lr_warmup_steps"),
        lr_decay_steps=first("lr_decay_steps"),
        betas=None if betas is None else tuple(betas),
        eps=first("epsilon"),
        weight_decay=first("weight_decay"),
        kwargs=kwargs,
    )
