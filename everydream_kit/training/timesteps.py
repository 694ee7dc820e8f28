"""The timestep (noise level) that each image is trained at.

Uniform and logit-normal draws depend on the image's own address only. Stratified draws need all images of an
optimizer step: each gets one of `num_images` equal parts of the range, so a step always sees high and low noise alike.
That takes the chance out of the step's mean loss; every image by itself is still drawn uniformly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from everydream_kit.errors import ConfigError
from everydream_kit.training.noise import Source, as_generator


def integer_timesteps(fractions: torch.Tensor, start: int, end: int) -> torch.Tensor:
    """Whole timesteps from start (inclusive) to end (exclusive), of fractions from 0 to 1."""
    # A fraction just below 1 may round up to it.
    return (start + torch.floor(fractions * (end - start)).long()).clamp(max=end - 1)


def draw_timesteps(
    sources: Sequence[Source],
    start: int,
    end: int,
    how: str = "uniform",
    *,
    positions: Sequence[int] | None = None,
    num_images: int | None = None,
    step_generator: Source | None = None,
    to_timesteps: Callable[[torch.Tensor, int, int], torch.Tensor] = integer_timesteps,
) -> torch.Tensor:
    """Draw a timestep between start and end for each image.

    Args:
        sources: a seed or generator for each image.
        start, end: bounds of the timesteps.
        how: "uniform"; "logit_normal", the sigmoid of N(0, 1), which favors the middle (arXiv 2403.03206, section
            3.1); "mode", which does so less at the ends; or "stratified", which needs the following three.
        positions: each image's position in the optimizer step, from 0, counted over micro-batches and processes.
        num_images: images in the optimizer step.
        step_generator: seed or generator of the optimizer step, the same on every process.
        to_timesteps: (fractions (B,) float64, start, end) -> timesteps, the objective's.

    Returns:
        (B,) on the CPU.

    Raises:
        ConfigError: start is not below end, or `how` is unknown.
    """
    if not start < end:
        raise ConfigError(f"timestep_start, timestep_end: the start must be below the end (got {start} and {end})")
    if how == "stratified":
        if positions is None or num_images is None or step_generator is None:
            raise ValueError("stratified timesteps need positions, num_images and step_generator")
        fractions = _stratified_fractions(positions, num_images, as_generator(step_generator))
    elif how in _FRACTIONS:
        fractions = torch.stack([_FRACTIONS[how](as_generator(source)) for source in sources])
    else:
        raise ConfigError(f"timestep_sampling: must be uniform, logit_normal, mode or stratified (got {how!r})")
    return to_timesteps(fractions, start, end)


def _uniform_fraction(generator: torch.Generator) -> torch.Tensor:
    return torch.rand((), generator=generator, dtype=torch.float64)


def _logit_normal_fraction(generator: torch.Generator) -> torch.Tensor:
    return torch.sigmoid(torch.randn((), generator=generator, dtype=torch.float64))


MODE_SCALE = 1.29
"""The s of mode sampling that diffusers' trainers use."""


def _mode_fraction(generator: torch.Generator) -> torch.Tensor:
    """arXiv 2403.03206, section 3.1: uniform numbers moved away from the ends, with tails heavier than logit-normal's."""
    uniform = _uniform_fraction(generator)
    return 1 - uniform - MODE_SCALE * (torch.cos(math.pi * uniform / 2) ** 2 - 1 + uniform)


_FRACTIONS = {"uniform": _uniform_fraction, "logit_normal": _logit_normal_fraction, "mode": _mode_fraction}


def _stratified_fractions(positions: Sequence[int], num_images: int, generator: torch.Generator) -> torch.Tensor:
    """Systematic sampling: (stratum + u) / n with one u for the step (as in arXiv 2107.00630, appendix I.1).

    The strata are dealt out by a permutation, because a position says which bucket an image is from.
    """
    offset = torch.rand((), generator=generator, dtype=torch.float64)
    strata = torch.randperm(num_images, generator=generator)
    # A filler stands past the last image; its timestep counts for nothing.
    own = strata[torch.tensor(positions, dtype=torch.int64) % num_images]
    return (own + offset) / num_images
