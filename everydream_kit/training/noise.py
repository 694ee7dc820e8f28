"""The noise that images are mixed with, one generator for each image.

Everything is drawn on the CPU, one image at a time: an image's noise then depends on its address only, not on the
batch, process or device it went through. That costs a loop over the batch: microseconds next to a model's milliseconds.
Timesteps are drawn in `timesteps`; what the noise is for is in `objectives`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812

from everydream_kit.transfers import send

Source = int | torch.Generator
"""Where an image's numbers come from: a seed, or a CPU generator (see `draws.torch_generator`)."""

MAX_PYRAMID_LEVELS = 10


def as_generator(source: Source) -> torch.Generator:
    """The generator itself, or a CPU generator with that seed."""
    return source if isinstance(source, torch.Generator) else torch.Generator("cpu").manual_seed(source)


def make_noise(
    shape_one: tuple[int, ...],
    sources: Sequence[Source],
    *,
    offset: float = 0.0,
    pyramid_discount: float | None = None,
) -> torch.Tensor:
    """Draw the noise of a batch.

    Args:
        shape_one: (C, h, w) of one image's latents.
        sources: a seed or generator for each image.
        offset: share r of a constant for each image and channel that is added: noise + r·N(0, 1). Lets the model
            learn brightness ("Diffusion with Offset Noise", N. Guttenberg 2023).
        pyramid_discount: factor d of multi-resolution noise ("Multi-Resolution Noise for Diffusion Model Training",
            J. Whitaker 2023), see `add_pyramid`. None: plain noise.

    Returns:
        (B, C, h, w) float32 on the CPU. Without options N(0, 1).
    """
    return torch.stack([_noise_of_one(shape_one, as_generator(s), offset, pyramid_discount) for s in sources])


def _noise_of_one(
    shape: tuple[int, ...], generator: torch.Generator, offset: float, pyramid_discount: float | None
) -> torch.Tensor:
    noise = torch.randn(shape, generator=generator)
    # Drawn before the pyramid, whose number of draws depends on chance: each option leaves the other alone.
    constant = torch.randn((shape[0], 1, 1), generator=generator)
    if pyramid_discount is not None:
        noise = add_pyramid(noise, pyramid_discount, generator)
    return noise + offset * constant if offset else noise


def add_pyramid(noise: torch.Tensor, discount: float, generator: torch.Generator) -> torch.Tensor:
    """Add coarser and coarser noise to one image's, and bring the sum back to a standard deviation of 1.

    Level i is smaller than the one before by a drawn factor of 2 to 4, is enlarged bilinearly, and weighs discount^i.
    The last level is the first one with a side of 1, or the tenth.

    Args:
        noise: (C, h, w), one image's.
    """
    height, width = noise.shape[-2:]
    total, level_height, level_width = noise, float(height), float(width)
    for level in range(1, MAX_PYRAMID_LEVELS + 1):
        ratio = 2.0 + 2.0 * torch.rand((), generator=generator).item()
        level_height, level_width = max(1.0, level_height / ratio), max(1.0, level_width / ratio)
        coarse = torch.randn((1, noise.shape[0], int(level_height), int(level_width)), generator=generator)
        enlarged = F.interpolate(coarse, size=(height, width), mode="bilinear", align_corners=False)
        total = total + discount**level * enlarged[0]
        if int(level_height) == 1 or int(level_width) == 1:
            break
    return total / total.std()


def perturb_input(noise: torch.Tensor, gamma: float, sources: Sequence[Source]) -> torch.Tensor:
    """Noise for the UNet's input only: noise + gamma·N(0, 1) (arXiv 2301.11706, eq. 8; the target stays `noise`).

    Args:
        noise: (B, C, h, w) on any device.
        gamma: strength; the paper uses 0.1.
        sources: a seed or generator for each image.

    Returns:
        A new tensor of the same shape, type and device.
    """
    return noise + gamma * _standard_normal_like(noise, sources)


def standard_normal(shape_one: tuple[int, ...], sources: Sequence[Source]) -> torch.Tensor:
    """(B, ...) float32 on the CPU: N(0, 1), each image's from its own source."""
    return torch.stack([torch.randn(shape_one, generator=as_generator(s)) for s in sources])


def perturb_embeddings(embeddings: torch.Tensor, gamma: float, noise: torch.Tensor) -> torch.Tensor:
    """Text embeddings with noise of standard deviation gamma / sqrt(D), against memorizing captions (arXiv 2405.20494).

    Args:
        embeddings: (B, L, D) on any device; gradients flow through.
        gamma: strength; about 1.
        noise: (B, L, D), standard normal, on the same device.
    """
    return embeddings + gamma / math.sqrt(embeddings.shape[-1]) * noise.to(embeddings.dtype)


def _standard_normal_like(tensor: torch.Tensor, sources: Sequence[Source]) -> torch.Tensor:
    return send(standard_normal(tuple(tensor.shape[1:]), sources), tensor.device).to(tensor.dtype)
