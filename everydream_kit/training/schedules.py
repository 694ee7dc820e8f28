"""The course of the learning rate: pure functions of the optimizer step.

Nothing here remembers anything, so a resumed run needs no scheduler state, and what a run will do can be plotted before
it starts. Steps count optimizer updates from 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from everydream_kit.errors import ConfigError

DECAY_STRETCH = 1.5
"""The decay lasts this many times the run, so cosine ends near a quarter of the peak and not at zero."""
WARMUP_SHARE = 1 / 50
"""Of the decay steps."""
BATCH_EXPONENT = 0.55
"""From Stable Diffusion's 1e-4 at 4096 images a step against 1e-6 at 1 or 2: log(100) / log(4096) = 0.554."""
POLYNOMIAL_POWER = 2.0


def learning_rate(
    step: int, *, peak: float, kind: str = "constant", warmup_steps: int = 0, decay_steps: int | None = None
) -> float:
    """The learning rate of one optimizer step.

    It rises linearly to the peak, which the last warm-up step reaches, and falls to zero at `decay_steps`, where it
    stays. The first step already learns something: it has peak / warmup_steps, not zero.

    Args:
        step: optimizer step, from 0.
        peak: highest rate.
        kind: constant, linear, cosine, or polynomial (a square: fast at first, then slow).
        warmup_steps: length of the rise.
        decay_steps: where zero is reached, warm-up included; not used by `constant`.

    Raises:
        ConfigError: an unknown kind, or a decay that ends before the warm-up does.
    """
    if kind not in _DECAYS:
        raise ConfigError(f"lr_scheduler: must be one of {', '.join(_DECAYS)} (got {kind!r})")
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if kind == "constant":
        return peak
    check_lengths(kind, warmup_steps, decay_steps)
    assert decay_steps is not None
    progress = min(1.0, (step - warmup_steps) / (decay_steps - warmup_steps))
    return peak * _DECAYS[kind](progress)


def check_lengths(kind: str, warmup_steps: int, decay_steps: int | None) -> None:
    """Raises: ConfigError, where the decay ends before the warm-up does. `constant` has no decay."""
    if kind != "constant" and (decay_steps is None or decay_steps <= warmup_steps):
        raise ConfigError(
            f"lr_decay_steps, lr_warmup_steps: the decay must end after the warm-up; raise the one or lower the other "
            f"(got {decay_steps} and {warmup_steps})"
        )


_DECAYS: dict[str, Callable[[float], float]] = {
    "constant": lambda _progress: 1.0,
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
    "polynomial": lambda progress: (1.0 - progress) ** POLYNOMIAL_POWER,
}
KINDS = tuple(_DECAYS)


def default_decay_steps(num_steps: int) -> int:
    """1.5 × all optimizer steps of the run, at least 1."""
    return max(1, int(num_steps * DECAY_STRETCH))


def default_warmup_steps(decay_steps: int, kind: str) -> int:
    """2 % of the decay steps (3 % of a run with the default decay); none for `constant`."""
    return 0 if kind == "constant" else int(decay_steps * WARMUP_SHARE)


def scaled_lr(lr: float, batch_size: int, grad_accum: int) -> float:
    """lr × (batch_size × grad_accum)^0.55: the rate for a larger step, when `lr` is meant for single images."""
    return lr * float((batch_size * grad_accum) ** BATCH_EXPONENT)
