"""The learning rate of each trained part as a function of the optimizer step, from the settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from everydream_kit.training import schedules
from everydream_kit.training.optimizers import default_optimizer_name
from everydream_kit.training.parts import UNET, PartSettings, not_inherited, part_settings

if TYPE_CHECKING:
    from everydream_kit.config import TrainConfig
    from everydream_kit.models.family import Family
    from everydream_kit.training.journal import Journal


def resolve_part(name: str, config: TrainConfig, device_type: str) -> PartSettings:
    """How one part is trained, with the optimizer of the device where none is given."""
    return part_settings(config, name, "adamw" if config.parallel == "fsdp2" else default_optimizer_name(device_type))


def schedules_of(
    settings: Sequence[PartSettings], config: TrainConfig, num_ranks: int, num_steps: int
) -> dict[str, partial[float]]:
    """The learning rate of each part, by its name, in a run of so many steps. Raises: ConfigError."""
    return {how.part: make_schedule(how, config, num_steps, num_ranks) for how in settings}


def make_schedule(how: PartSettings, config: TrainConfig, num_steps: int, num_ranks: int) -> partial[float]:
    """The learning rate of one part as a function of the optimizer step.

    Raises:
        ConfigError: the decay would end before the warm-up does.
    """
    peak = how.lr
    if config.scale_lr:
        assert isinstance(config.batch_size, int)
        peak = schedules.scaled_lr(peak, config.batch_size * num_ranks, config.grad_accum)
    decay_steps = schedules.default_decay_steps(num_steps) if how.lr_decay_steps is None else how.lr_decay_steps
    warmup_steps = how.lr_warmup_steps
    if warmup_steps is None:
        warmup_steps = schedules.default_warmup_steps(decay_steps, how.lr_scheduler)
    schedules.check_lengths(how.lr_scheduler, warmup_steps, decay_steps)
    return partial(
        schedules.learning_rate,
        peak=peak,
        kind=how.lr_scheduler,
        warmup_steps=warmup_steps,
        decay_steps=decay_steps,
    )


def announce_schedules(
    settings: Sequence[PartSettings],
    schedules_by_part: Mapping[str, partial[float]],
    config: TrainConfig,
    num_steps: int,
    journal: Journal,
    *,
    family: Family,
) -> None:
    """Log each part's rate under its family's name for it, and warn of settings of both that a part does not have."""
    for how, schedule in zip(settings, schedules_by_part.values(), strict=True):
        for warning in not_inherited(config, how.part):
            journal.warn(warning)
        called = family.denoiser.folder if how.part == UNET else how.part
        announce_schedule(how, called, schedule, num_steps, journal)


def announce_schedule(
    how: PartSettings, called: str, schedule: partial[float], num_steps: int, journal: Journal
) -> None:
    """Log the rate that is used and its course; warn of a warm-up that is longer than the run.

    Args:
        called: the part, as its family calls it.
    """
    peak, warmup_steps = schedule.keywords["peak"], schedule.keywords["warmup_steps"]
    scaled = "" if peak == how.lr else f" (scale_lr: {how.lr:g} times {peak / how.lr:.4g})"
    decay = "" if how.lr_scheduler == "constant" else f", zero at step {schedule.keywords['decay_steps']}"
    journal.note(
        f"Learning rate of the {called}: {peak:.6g}{scaled}, {how.lr_scheduler}, warm-up {warmup_steps} steps{decay}."
    )
    if warmup_steps > num_steps:
        journal.warn(
            f"lr_warmup_steps: the warm-up of the {called} takes {warmup_steps} steps and the run {num_steps}, so its "
            f"rate never reaches lr; lower lr_warmup_steps."
        )
