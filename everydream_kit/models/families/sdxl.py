"""Stable Diffusion XL (base): CLIP ViT-L and OpenCLIP ViT-bigG side by side, pooled text, and time ids of the image's
sizes.

The text is always the penultimate layer without the final norm, as SDXL was trained (arXiv 2307.01952, section 2.2);
`clip_skip` 0 to 2 mean that, 3 and 4 go deeper.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from everydream_kit.models import convert
from everydream_kit.models.clip_text import TokenizedPrompts, count_windows
from everydream_kit.models.distilled import distilled_from
from everydream_kit.models.family import (
    Conditioning,
    Config,
    Family,
    Layout,
    Sizes,
    TextEncoderSlot,
    input_dtype,
    run_text_encoder,
)
from everydream_kit.models.latent_spaces import kl_space
from everydream_kit.transfers import send

if TYPE_CHECKING:
    from everydream_kit.models.family import Model


def encode_two_encoders(model: Model, token_ids: Sequence[torch.Tensor], clip_skip: int) -> Conditioning:
    """Both encoders' hidden states side by side, and the second one's projected end-of-text state.

    Args:
        token_ids: one tensor (B, 77) of int64 for each tokenizer.
        clip_skip: 0, 1 and 2 are the penultimate hidden layer; 3 and 4 count on from there.
    """
    layer = max(2, clip_skip)
    encoded = [
        run_text_encoder(text_encoder, ids, layer)
        for text_encoder, ids in zip(model.text_encoders, token_ids, strict=True)
    ]
    hidden_states = torch.cat([states for _, states in encoded], dim=-1)
    return Conditioning(hidden_states, encoded[-1][0].text_embeds)


def time_ids(sizes: Sizes, batch_size: int) -> torch.Tensor:
    """(B, 6) float32: original height, width; crop top, left; target height, width (arXiv 2307.01952, section 2.2)."""
    if not len(sizes.original_sizes) == len(sizes.crop_top_lefts) == batch_size:
        raise ValueError(f"sizes are for {len(sizes.original_sizes)} images, the batch has {batch_size}")
    target_width, target_height = sizes.target_size
    rows = [
        (height, width, top, left, target_height, target_width)
        for (width, height), (left, top) in zip(sizes.original_sizes, sizes.crop_top_lefts, strict=True)
    ]
    return torch.tensor(rows, dtype=torch.float32)


def predict_from_text_and_sizes(
    model: Model, noisy_latents: torch.Tensor, timesteps: torch.Tensor, conditioning: Conditioning, sizes: Sizes
) -> torch.Tensor:
    """The UNet's prediction (B, 4, H/8, W/8) in float32, from the caption and the sizes before and after cropping."""
    if conditioning.pooled is None:
        raise ValueError("SDXL needs the pooled text embedding")
    dtype, numbers = input_dtype(model.denoiser), sizes.numbers
    if numbers is None:
        numbers = send(time_ids(sizes, len(noisy_latents)), noisy_latents.device)
    added = {"text_embeds": conditioning.pooled.to(dtype), "time_ids": numbers}
    text = conditioning.encoder_hidden_states.to(dtype)
    prediction = model.denoiser(noisy_latents.to(dtype), timesteps, encoder_hidden_states=text, added_cond_kwargs=added)
    sample: torch.Tensor = prediction.sample
    return sample.float()


def _matches_configs(configs: Mapping[str, Config]) -> bool:
    return (
        "text_encoder" in configs
        and "text_encoder_2" in configs
        and configs["unet"].get("addition_embed_type") == "text_time"
    )


SDXL = Family(
    name="sdxl",
    title="Stable Diffusion XL",
    pipeline_class="StableDiffusionXLPipeline",
    text_encoders=(
        TextEncoderSlot(
            "text_encoder", "tokenizer", "CLIPTextModel", "conditioner.embedders.0.transformer.", "hf", "lora_te1"
        ),
        TextEncoderSlot(
            "text_encoder_2",
            "tokenizer_2",
            "CLIPTextModelWithProjection",
            "conditioner.embedders.1.model.",
            "openclip",
            "lora_te2",
        ),
    ),
    encode_prompt=TokenizedPrompts(encode_two_encoders),
    count_windows=count_windows,
    predict=predict_from_text_and_sizes,
    latent_space=kl_space(4),
    layout=Layout(
        convert.to_single_file,
        convert.from_single_file,
        lora_stem=convert.single_file_stem,
        renames=convert.unet_renames,
    ),
    index={"feature_extractor": [None, None], "image_encoder": [None, None], "force_zeros_for_empty_prompt": True},
    matches_configs=_matches_configs,
    modelspec_architecture="stable-diffusion-xl-v1-base",
    kohya_base="sdxl_base_v1-0",
    distilled=distilled_from("stabilityai/stable-diffusion-xl-base-1.0"),
    zeros_for_empty=True,
    size_numbers=time_ids,
)
