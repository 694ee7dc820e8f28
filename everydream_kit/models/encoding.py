"""From captions to conditioning, and between images and latents.

Gradients flow through `encode_captions` where the text encoders train; image encoding never needs any. The VAE runs
outside autocast: several of them overflow in float16.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from everydream_kit.models.family import Conditioning, Model, Sizes, parameter_dtype
from everydream_kit.models.tokens import expand_tokens

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

__all__ = ["Conditioning", "Sizes", "decode_latents", "encode_captions", "encode_moments", "latents_from_moments"]

PIXELS_TOGETHER = 2**20
"""Pixels that go through the VAE at once: four images of 512 x 512, one of 1024 x 1024. More is hardly faster, and its
activations in float32 (some 6 GiB at this size) would be what decides whether SDXL fits a GPU."""


def encode_captions(
    model: Model, captions: Sequence[str], clip_skip: int = 0, *, num_chunks: int = 1, zero_empty: bool = True
) -> Conditioning:
    """Encode captions with the model's text encoders.

    Args:
        captions: B texts; "" is the empty caption.
        clip_skip: 0 and 1 are the last hidden layer, 2 the penultimate, up to 4; the final layer norm is applied where
            the family was trained so.
        num_chunks: windows of 75 tokens; what does not fit is cut off. The chunks' outputs stand one after another, and
            the pooled embedding is the first one's.
        zero_empty: the empty caption is zeros where the family was trained so (SDXL); else it is encoded like any text.

    Returns:
        (B, 77 * num_chunks, D) hidden states, on the text encoder's device and in its format.
    """
    captions = [expand_tokens(model, caption) for caption in captions]
    token_ids = [
        tokenize(tokenizer, captions, num_chunks).to(next(text_encoder.parameters()).device)
        for tokenizer, text_encoder in zip(model.tokenizers, model.text_encoders, strict=True)
    ]
    encoded = model.family.encode_tokens(model, [ids.flatten(0, 1) for ids in token_ids], clip_skip)
    if num_chunks > 1:
        hidden_states = encoded.encoder_hidden_states.unflatten(0, (len(captions), num_chunks)).flatten(1, 2)
        pooled = encoded.pooled
        pooled = None if pooled is None else pooled.unflatten(0, (len(captions), num_chunks))[:, 0]
        encoded = Conditioning(hidden_states, pooled)
    if not (zero_empty and model.family.zeros_for_empty and "" in captions):
        return encoded
    return scale_rows(encoded, [float(caption != "") for caption in captions])


def scale_rows(conditioning: Conditioning, factors: Sequence[float]) -> Conditioning:
    """Conditioning with each row multiplied: by 0 where there is no text. A product, so that there is always a gradient."""
    states, pooled = conditioning.encoder_hidden_states, conditioning.pooled
    rows = torch.tensor(factors, dtype=states.dtype, device=states.device)
    return Conditioning(states * rows.view(-1, 1, 1), None if pooled is None else pooled * rows.view(-1, 1).to(pooled))


def tokenize(tokenizer: CLIPTokenizer, captions: Sequence[str], num_chunks: int = 1) -> torch.Tensor:
    """(B, num_chunks, 77) token ids; each chunk has its own start, end and padding."""
    window = tokenizer.model_max_length
    start, end, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    rows = []
    for ids in tokenizer(list(captions), add_special_tokens=False, truncation=False, verbose=False)["input_ids"]:
        chunks = []
        for index in range(num_chunks):
            piece = ids[index * (window - 2) : (index + 1) * (window - 2)]
            chunks.append([start, *piece, end, *([pad] * (window - 2 - len(piece)))])
        rows.append(chunks)
    return torch.tensor(rows, dtype=torch.int64)


def count_chunks(model: Model, captions: Sequence[str]) -> int:
    """Windows of 75 tokens that the longest of these texts fills; at least 1."""
    longest = 1
    for tokenizer in model.tokenizers:
        for ids in tokenizer(list(captions), add_special_tokens=False, truncation=False, verbose=False)["input_ids"]:
            longest = max(longest, -(-len(ids) // (tokenizer.model_max_length - 2)))
    return longest


@torch.no_grad()
def encode_moments(model: Model, pixels: torch.Tensor) -> torch.Tensor:
    """Encode images to the parameters of the VAE's posterior.

    Args:
        pixels: (B, 3, H, W) uint8, on any device.

    Returns:
        (B, 8, H/8, W/8) float32, mean and log-variance stacked on the channel axis; unscaled. On the VAE's device.
    """
    vae = model.vae
    dtype = parameter_dtype(vae)
    device = next(vae.parameters()).device
    with torch.autocast(device.type, enabled=False):
        scaled = pixels.to(device=device, dtype=torch.float32) / 127.5 - 1.0
        pieces = scaled.to(dtype).split(_num_together(*pixels.shape[2:]))
        return torch.cat([vae.encode(piece).latent_dist.parameters.float() for piece in pieces])


def latents_from_moments(model: Model, moments: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Draw latents from a posterior, scaled as the UNet knows them.

    Args:
        moments: (B, 8, h, w) as `encode_moments` gives them.
        noise: (B, 4, h, w), standard normal.

    Returns:
        (B, 4, h, w) float32: (mean + exp(log-variance / 2) * noise - shift) * scaling_factor.
    """
    mean, log_variance = moments.float().chunk(2, dim=1)
    drawn = mean + torch.exp(0.5 * log_variance.clamp(-30.0, 20.0)) * noise
    shift, scaling_factor = _shift_and_scale(model)
    return (drawn - shift) * scaling_factor


@torch.no_grad()
def decode_latents(model: Model, latents: torch.Tensor) -> torch.Tensor:
    """Decode scaled latents (B, 4, h, w) to images (B, 3, H, W) uint8 on the CPU."""
    vae = model.vae
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
    config = model.vae.config
    return config.get("shift_factor") or 0.0, config["scaling_factor"]
