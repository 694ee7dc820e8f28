"""How each part (UNet, text encoder) is trained, from the settings of both and the part's own.

A value is the part's own (`unet_X`, `text_encoder_X`) where it is given, else that of both (`X`). What only some
optimizers take goes to a part with another optimizer only where that part gives it itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from everydream_kit.config import facts

if TYPE_CHECKING:
    from everydream_kit.config import TrainConfig

UNET, TEXT_ENCODER = "unet", "text encoder"
PREFIXES = {UNET: "unet_", TEXT_ENCODER: "text_encoder_"}
"""Prefixes of the settings of one part alone."""
OPTIMIZERS_OWN = tuple(name for name, one in facts().items() if one.optimizer_argument)
"""Settings that only some optimizers take."""


@dataclass(frozen=True)
class PartSettings:
    """How one part is trained, with every question answered but the schedule's length.

    Attributes:
        part: "unet" or "text encoder".
        betas, eps, weight_decay: None for the optimizer's own default.
        lr_warmup_steps, lr_decay_steps: None for the default of `schedules`.
        kwargs: further keyword arguments of the optimizer's class.
    """

    part: str
    optimizer: str
    lr: float
    lr_scheduler: str
    lr_warmup_steps: int | None = None
    lr_decay_steps: int | None = None
    betas: tuple[float, ...] | None = None
    eps: float | None = None
    weight_decay: float | None = None
    kwargs: Mapping[str, Any] = field(default_factory=dict)


def part_settings(config: TrainConfig, part: str, default_optimizer: str) -> PartSettings:
    """Find out how one part is trained.

    Args:
        part: "unet" or "text encoder".
        default_optimizer: where no optimizer is given.
    """

    def own(name: str) -> Any:
        return getattr(config, PREFIXES[part] + name, None)

    def value(name: str) -> Any:
        given = own(name)
        return getattr(config, name) if given is None else given

    optimizer = value("optimizer") or default_optimizer
    inherits = plain_name(optimizer) == plain_name(config.optimizer or default_optimizer)
    betas = value("betas")
    kwargs = {**((config.optimizer_args or {}) if inherits else {}), **(own("optimizer_args") or {})}
    for name in OPTIMIZERS_OWN:
        given = value(name) if inherits else own(name)
        if given is not None:
            kwargs[name] = given
    return PartSettings(
        part=part,
        optimizer=optimizer,
        lr=_rate(config, part),
        lr_scheduler=value("lr_scheduler"),
        lr_warmup_steps=value("lr_warmup_steps"),
        lr_decay_steps=value("lr_decay_steps"),
        betas=None if betas is None else tuple(betas),
        eps=value("eps"),
        weight_decay=value("weight_decay"),
        kwargs=kwargs,
    )


def not_inherited(config: TrainConfig, part: str) -> list[str]:
    """What is given for the optimizer of both and does not go to a part with another one, a sentence each."""
    own = getattr(config, f"{PREFIXES[part]}optimizer")
    if own is None or (config.optimizer is not None and plain_name(own) == plain_name(config.optimizer)):
        return []
    return [
        f"{name}: the {part} does not have it, since its optimizer is {own}; give {PREFIXES[part]}{name} for one of its own."
        for name in (*OPTIMIZERS_OWN, "optimizer_args")
        if getattr(config, name) is not None and getattr(config, PREFIXES[part] + name, None) is None
    ]


def plain_name(name: str) -> str:
    """An optimizer's name as the table has it; a `module.Class` as it is."""
    return name if "." in name else name.lower().replace("_", "").replace("-", "")


def _rate(config: TrainConfig, part: str) -> float:
    own: float | None = getattr(config, f"{PREFIXES[part]}lr")
    if own is not None:
        return own
    if part == TEXT_ENCODER and config.text_encoder_lr_scale is not None:
        return config.lr * config.text_encoder_lr_scale
    return config.lr
