"""Flow matching as the families that are trained with it share it: schedulers, and the shift of noise levels."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any

import torch

PREDICTION = "flow_prediction"
"""What such a model predicts: noise - image, the velocity from the image to the noise."""
PATCH_PIXELS = 16
"""Side of the square that one token of the transformers stands for."""


def flow_scheduler(scheduler_config: Mapping[str, Any]) -> Any:
    """diffusers' Euler scheduler for flow matching, by a model's own settings."""
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

    known = inspect.signature(FlowMatchEulerDiscreteScheduler.__init__).parameters
    return FlowMatchEulerDiscreteScheduler(**{key: value for key, value in scheduler_config.items() if key in known})


def shift_of(scheduler_config: Mapping[str, Any], width: int, height: int) -> float:
    """The factor by which a model's scheduler moves noise levels upward for images of this size.

    A static shift is the scheduler's `shift`; a dynamic one is exp(mu), and mu grows with the number of tokens
    (arXiv 2403.03206, section 5.3.2, as diffusers' pipelines have it).
    """
    if not scheduler_config.get("use_dynamic_shifting", False):
        return float(scheduler_config.get("shift", 1.0))
    return math.exp(mu_of(scheduler_config, width, height))


def trained_as_flux(scheduler_config: Mapping[str, Any], width: int, height: int) -> float:
    """The shift of models that were trained with FLUX.1's shift by resolution, whatever their scheduler samples with."""
    return math.exp(mu_of({}, width, height))


def tokens_of(width: int, height: int) -> int:
    """Tokens of an image of this size."""
    return (width // PATCH_PIXELS) * (height // PATCH_PIXELS)


def mu_of(scheduler_config: Mapping[str, Any], width: int, height: int, num_steps: int | None = None) -> float:
    """mu on the straight line through (base_image_seq_len, base_shift) and (max_image_seq_len, max_shift).

    Args:
        num_steps: of sampling; changes nothing here.
    """
    tokens = tokens_of(width, height)
    least, most = scheduler_config.get("base_image_seq_len", 256), scheduler_config.get("max_image_seq_len", 4096)
    low, high = scheduler_config.get("base_shift", 0.5), scheduler_config.get("max_shift", 1.15)
    return float(low + (high - low) * (tokens - least) / (most - least))


def positions(*sizes: int, device: torch.device) -> torch.Tensor:
    """(n, axes): the places of a grid of these sizes, row by row."""
    return torch.cartesian_prod(*(torch.arange(size, device=device) for size in sizes))


def packed(latents: torch.Tensor) -> torch.Tensor:
    """Latents (B, C, h, w) as tokens (B, h w / 4, 4 C): squares of 2 x 2 cells, row by row."""
    return torch.nn.functional.pixel_unshuffle(latents, 2).flatten(2).transpose(1, 2)


def unpacked(tokens: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Latents (B, C, height, width) from their tokens (B, height width / 4, 4 C)."""
    squares = tokens.transpose(1, 2).unflatten(2, (height // 2, width // 2))
    return torch.nn.functional.pixel_shuffle(squares, 2)


def shifted(levels: Any, shift: float) -> Any:
    """Noise levels in 0..1 moved upward: s·u / (1 + (s - 1)·u). Keeps their order and both ends."""
    return shift * levels / (1 + (shift - 1) * levels)
