"""Latent spaces: what the VAEs of the families make of an image, and back.

Encoding never needs gradients. The VAE runs outside autocast: several of them overflow in float16.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch

from everydream_kit.models.family import Component, LatentSpace, Model, parameter_dtype

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
    return _encoded(model, pixels, lambda vae, images: vae.encode(images).latent_dist.parameters)


def _encoded(model: Model, pixels: torch.Tensor, encode: Callable[[Any, torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """What `encode`, (VAE, images from -1 to 1) -> moments, gives of images, some at a time."""
    vae: Any = model.vae
    dtype = parameter_dtype(vae)
    device = next(vae.parameters()).device
    with torch.autocast(device.type, enabled=False):
        scaled = pixels.to(device=device, dtype=torch.float32) / 127.5 - 1.0
        pieces = scaled.to(dtype).split(_num_together(*pixels.shape[2:]))
        return torch.cat([encode(vae, piece).float() for piece in pieces])


def _latents_from_moments(model: Model, moments: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Draw latents from a posterior, scaled as the denoiser knows them.

    Args:
        moments: (B, 2 C, h, w) as `encode` gives them.
        noise: (B, C, h, w), standard normal.

    Returns:
        (B, C, h, w) float32: (mean + exp(log-variance / 2) * noise - shift) * scaling_factor.
    """
    shift, scaling_factor = _shift_and_scale(model)
    return (_drawn(moments, noise) - shift) * scaling_factor


def _drawn(moments: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """A draw of the posterior: mean + exp(log-variance / 2) * noise."""
    mean, log_variance = moments.float().chunk(2, dim=1)
    return mean + torch.exp(0.5 * log_variance.clamp(-30.0, 20.0)) * noise


@torch.no_grad()
def _decode_latents(model: Model, latents: torch.Tensor) -> torch.Tensor:
    """Decode scaled latents (B, C, h, w) to images (B, 3, H, W) uint8 on the CPU."""
    shift, scaling_factor = _shift_and_scale(model)
    device = next(model.vae.parameters()).device
    return _decoded(model, latents.to(device=device, dtype=torch.float32) / scaling_factor + shift, _decode_images)


def _decoded(model: Model, cells: torch.Tensor, decode: Callable[[Any, torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """The images of what the VAE itself gives and takes (B, C, H/8, W/8).

    Args:
        decode: (VAE, cells) -> images (B, 3, H, W) from -1 to 1.
    """
    vae: Any = model.vae
    with torch.autocast(cells.device.type, enabled=False):
        cell = model.vae_scale_factor
        pieces = cells.to(parameter_dtype(vae)).split(_num_together(cell * cells.shape[2], cell * cells.shape[3]))
        return torch.cat([_as_bytes(decode(vae, piece).float()).cpu() for piece in pieces])


def _decode_images(vae: Any, cells: torch.Tensor) -> torch.Tensor:
    images: torch.Tensor = vae.decode(cells).sample
    return images


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
    channels = config["z_dim"] if "z_dim" in config else config["latent_channels"]  # Qwen-Image's name, or all others'
    return int(channels), height // cell, width // cell


def kl_space(channels: int) -> LatentSpace:
    """The latents of `AutoencoderKL`: what is kept are mean and log-variance of its posterior.

    Args:
        channels: of the latents: 4 for Stable Diffusion, 16 for FLUX.1 and its kin.
    """
    return LatentSpace(2 * channels, _shape, _encode_moments, _latents_from_moments, _decode_latents)


@torch.no_grad()
def _encode_means(model: Model, pixels: torch.Tensor) -> torch.Tensor:
    """The means (B, C, H/8, W/8) of the VAE's posterior."""
    return _encode_moments(model, pixels).chunk(2, dim=1)[0].contiguous()


def _normalized_squares(model: Model, means: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Squares of 2 x 2 cells as channels (B, 4 C, h, w), normalized. Nothing is drawn: such models take the mean."""
    mean, spread = _running_statistics(model, means.device)
    return (torch.nn.functional.pixel_unshuffle(means.float(), 2) - mean) / spread


@torch.no_grad()
def _decode_squares(model: Model, latents: torch.Tensor) -> torch.Tensor:
    """Decode latents (B, 4 C, h, w) to images (B, 3, H, W) uint8 on the CPU."""
    device = next(model.vae.parameters()).device
    mean, spread = _running_statistics(model, device)
    cells = torch.nn.functional.pixel_shuffle(latents.to(device=device, dtype=torch.float32) * spread + mean, 2)
    return _decoded(model, cells, _decode_images)


def _running_statistics(model: Model, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation, each (1, 4 C, 1, 1), that the VAE's batch norm has gathered."""
    norm = model.vae.get_submodule("bn")
    mean, variance = norm.running_mean, norm.running_var
    assert isinstance(mean, torch.Tensor)
    assert isinstance(variance, torch.Tensor)
    config: Any = model.vae.config
    spread = (variance.float() + config["batch_norm_eps"]).sqrt()
    return mean.float().view(1, -1, 1, 1).to(device), spread.view(1, -1, 1, 1).to(device)


def _shape_of_squares(model: Model, width: int, height: int) -> tuple[int, int, int]:
    channels, rows, columns = _shape(model, width, height)
    return 4 * channels, rows // 2, columns // 2


def batch_norm_space(channels: int) -> LatentSpace:
    """The latents of `AutoencoderKLFlux2`: what is kept are the means of its posterior.

    Args:
        channels: of the VAE's latents; the denoiser's are four times as many, of half the height and width.
    """
    return LatentSpace(channels, _shape_of_squares, _encode_means, _normalized_squares, _decode_squares)


@torch.no_grad()
def _encode_frames(model: Model, pixels: torch.Tensor) -> torch.Tensor:
    """As `_encode_moments`, by a VAE of videos: an image is one frame (B, 3, 1, H, W).

    Its `encode` and `decode` keep a copy of every convolution's input for the next frame, which never comes here: several
    GiB at 1024 px. So its parts are called.
    """
    return _encoded(model, pixels, lambda vae, images: vae.quant_conv(vae.encoder(images.unsqueeze(2))).squeeze(2))


def _standardized(model: Model, moments: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Draw latents (B, C, h, w) from a posterior, each channel with mean 0 and deviation 1 over the VAE's own data."""
    mean, spread = _channel_statistics(model, moments.device)
    return (_drawn(moments, noise) - mean) / spread


@torch.no_grad()
def _decode_frames(model: Model, latents: torch.Tensor) -> torch.Tensor:
    """Decode latents (B, C, h, w) to images (B, 3, H, W) uint8 on the CPU."""
    device = next(model.vae.parameters()).device
    mean, spread = _channel_statistics(model, device)
    cells = latents.to(device=device, dtype=torch.float32) * spread + mean
    return _decoded(model, cells, lambda vae, piece: vae.decoder(vae.post_quant_conv(piece.unsqueeze(2))).squeeze(2))


def _channel_statistics(model: Model, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of each channel, (1, C, 1, 1), that the VAE's config holds."""
    config: Any = model.vae.config
    mean, spread = (torch.tensor(config[name]).float().view(1, -1, 1, 1) for name in ("latents_mean", "latents_std"))
    return mean.to(device), spread.to(device)


def frame_space(channels: int) -> LatentSpace:
    """The latents of `AutoencoderKLQwenImage`, a VAE of videos: what is kept are mean and log-variance of its posterior.

    Args:
        channels: of the latents.
    """
    return LatentSpace(2 * channels, _shape, _encode_frames, _standardized, _decode_frames)


QWEN_IMAGE_VAE = Component(
    "vae", "diffusers.models.autoencoders.autoencoder_kl_qwenimage", "AutoencoderKLQwenImage", "vae", since="0.35"
)
