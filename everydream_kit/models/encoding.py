"""From captions to conditioning, and between images and latents, by the ways of a model's family.

Gradients flow through `encode_captions` where the text encoders train; image encoding never needs any.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from everydream_kit.models.family import Conditioning, Model, PromptSettings, Sizes
from everydream_kit.models.tokens import expand_tokens
from everydream_kit.transfers import send

__all__ = ["Conditioning", "Sizes", "decode_latents", "encode_captions", "encode_moments", "latents_from_moments"]


def encode_captions(
    model: Model, captions: Sequence[str], clip_skip: int = 0, *, num_chunks: int = 1, zero_empty: bool = True
) -> Conditioning:
    """Encode captions with the model's text encoders.

    Args:
        captions: B texts; "" is the empty caption.
        clip_skip: for CLIP, 0 and 1 are the last hidden layer, 2 the penultimate, up to 4; the final layer norm is applied
            where the family was trained so.
        num_chunks: windows of CLIP's 75 tokens; what does not fit is cut off.
        zero_empty: the empty caption is zeros where the family was trained so (SDXL); else it is encoded like any text.

    Returns:
        On the text encoder's device and in its format.
    """
    expanded = [expand_tokens(model, caption) for caption in captions]
    encoded = model.family.encode_prompt(model, expanded, PromptSettings(clip_skip, num_chunks))
    factors = row_factors(model, expanded) if zero_empty else None
    return encoded if factors is None else scale_rows(encoded, factors)


def row_factors(model: Model, captions: Sequence[str], *, always: bool = False) -> list[float] | None:
    """What each caption's embeddings are multiplied by: 0 where there is no text.

    None where the family needs no such factors, or no caption is empty and they are not wanted always.
    """
    if not (model.family.zeros_for_empty and (always or "" in captions)):
        return None
    return [float(caption != "") for caption in captions]


def scale_rows(conditioning: Conditioning, factors: Sequence[float] | torch.Tensor) -> Conditioning:
    """Conditioning with each row multiplied. A product, so that there is always a gradient."""
    states, pooled = conditioning.encoder_hidden_states, conditioning.pooled
    rows = send(torch.as_tensor(factors, dtype=states.dtype), states.device)
    pooled = None if pooled is None else pooled * rows.view(-1, 1).to(pooled)
    return Conditioning(states * rows.view(-1, 1, 1), pooled, conditioning.lengths)


def encode_moments(model: Model, pixels: torch.Tensor) -> torch.Tensor:
    """What the latent cache keeps of images (B, 3, H, W) uint8; float32, on the VAE's device."""
    return model.family.latent_space.encode(model, pixels)


def latents_from_moments(model: Model, moments: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Latents as the denoiser knows them, float32, from what the cache keeps and standard normal noise of their shape."""
    return model.family.latent_space.latents(model, moments, noise)


def decode_latents(model: Model, latents: torch.Tensor) -> torch.Tensor:
    """Decode latents to images (B, 3, H, W) uint8 on the CPU."""
    return model.family.latent_space.decode(model, latents)
