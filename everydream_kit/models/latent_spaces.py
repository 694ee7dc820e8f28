"""Latent spaces: what the VAEs of the families make of an image, and back.

Encoding never needs gradients. The VAE runs outside autocast: several of them overflow in float16.
"""

from __future__ import annotations

from typing import Any, cast

import torch

from everydream_kit.models.family import LatentSpace, Model, parameter_dtype

PIXELS_TOGETHER = 2**20
"""Pixels that go through the VAE at once: four images of 512 x 512, one of 1024 x 1024. More is hardly faster, and its
activations in float32 (some 6 GiB at this size) would be what decides whether SDXL fits a GPU."""


@torch.no_grad()
def _encode_moments(model: Model, pixels: torch.Tensor) -> torch.Tensor:
    """Encode images to the parameters of the VAE's posterior.

    Args:
        pixels: (B, 3, H, W) uint8, on any device.

    Returns:
        (B, 2 C, H/8, W/8) float32, mean and log-variance stacked on the channel axis; unscaled. On the VAE's device.
    """
    vae: Any = model.vae
    dtype = parameter_dtype(vae)
    device = next(vae.parameters()).device
    with torch.autocast(device.type, enabled=False):
        scaled = pixels.to(device=device, dtype=torch.float32) / 127.5 - 1.0
        pieces = scaled.to(dtype).split(_num_together(*pixels.shape[2:]))
        return torch.cat([vae.encode(piece).latent_dist.parameters.float() for piece in pieces])


def _latents_from_moments(model: Model, moments: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Draw latents from a posterior, scaled as the denoiser knows them.

    Args:
        moments: (B, 2 C, h, w) as `encode` gives them.
        noise: (B, C, h, w), standard normal.

    Returns:
        (B, C, h, w) float32: (mean + exp(log-variance / 2) * noise - shift) * scaling_factor.
    """
    mean, log_variance = moments.float().chunk(2, dim=1)
    drawn = mean + torch.exp(0.5 * log_variance.clamp(-30.0, 20.0)) * noise
    shift, scaling_factor = _shift_and_scale(model)
    return (drawn - shift) * scaling_factor


@torch.no_grad()
def _decode_latents(model: Model, latents: torch.Tensor) -> torch.Tensor:
    """Decode scaled latents (B, C, h, w) to images (B, 3, H, W) uint8 on the CPU."""
    vae: Any = model.vae
    shift, scaling_factor = _shift_and_scale(model)
    device = next(vae.parameters()).device
    unscaled = (latents.to(device=device, dtype=torch.float32) / scaling_factor + shift).to(parameter_dtype(vae))
    with torch.autocast(device.type, enabled=False):
        cell = model.vae_scale_factor
        pieces = unscaled.split(_num_together(cell * latents.shape[2], cell * latents.shape[3]))
        return torch.cat([_as_bytes(vae.decode(piece).sample.float()).cpu() for piece in pieces])


def _num_together(height: int, width: int) -> int:
    return max(1, PIXELS_TOGETHER // (height * width))


def _as_bytes(images: torch.Tensor) -> torch.Tensor:
    """From -1 ... 1 to 0 ... 255, uint8."""
    return ((images / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)


def _shift_and_scale(model: Model) -> tuple[float, float]:
    config: Any = model.vae.config
    return float(config.get("shift_factor") or 0.0), float(config["scaling_factor"])


def _shape(model: Model, width: int, height: int) -> tuple[int, int, int]:
    cell, config = model.vae_scale_factor, cast(Any, model.vae.config)
    return int(config["latent_channels"]), height // cell, width // cell


def kl_space(channels: int) -> LatentSpace:
    """The latents of `AutoencoderKL`: what is kept are mean and log-variance of its posterior.

    Args:
        channels: of the latents: 4 for Stable Diffusion, 16 for FLUX.1 and its kin.
    """
    return LatentSpace(2 * channels, _shape, _encode_moments, _latents_from_moments, _decode_latents)
