"""Stable Diffusion 1.x: one CLIP ViT-L text encoder, 64-cell latents, usually epsilon prediction.

`encode_one_encoder` and `predict_from_text` serve every family whose UNet is conditioned on one encoder's text alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
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
    text_tower,
)
from everydream_kit.models.latent_spaces import kl_space

if TYPE_CHECKING:
    from everydream_kit.models.family import Model


def encode_one_encoder(model: Model, token_ids: Sequence[torch.Tensor], clip_skip: int) -> Conditioning:
    """Hidden states of the only text encoder, with the final layer norm as Stable Diffusion was trained.

    Args:
        token_ids: one tensor (B, 77) of int64.
        clip_skip: 0 and 1 are the last hidden layer, 2 the penultimate, and so on.
    """
    text_encoder = model.text_encoders[0]
    if clip_skip < 2:
        return Conditioning(text_encoder(token_ids[0]).last_hidden_state)
    _, hidden_states = run_text_encoder(text_encoder, token_ids[0], clip_skip)
    return Conditioning(text_tower(text_encoder).final_layer_norm(hidden_states))


def predict_from_text(
    model: Model, noisy_latents: torch.Tensor, timesteps: torch.Tensor, conditioning: Conditioning, sizes: Sizes
) -> torch.Tensor:
    """The UNet's prediction (B, 4, H/8, W/8) in float32, from the caption alone: SD 1.x and 2.x ignore `sizes`."""
    dtype = input_dtype(model.denoiser)
    text = conditioning.encoder_hidden_states.to(dtype)
    sample: torch.Tensor = model.denoiser(noisy_latents.to(dtype), timesteps, encoder_hidden_states=text).sample
    return sample.float()


def has_one_encoder(configs: Mapping[str, Config], *, linear: bool) -> bool:
    """Whether a model has one text encoder and a UNet that is conditioned on nothing else.

    Args:
        linear: whether its attention has linear projections, as SD 2.x has them.
    """
    unet = configs["unet"]
    return (
        "text_encoder" in configs
        and "text_encoder_2" not in configs
        and unet.get("addition_embed_type") is None
        and bool(unet.get("use_linear_projection", False)) is linear
    )


LDM_LAYOUT = Layout(convert.to_single_file, convert.from_single_file, renames=convert.unet_renames)
"""Single files as CompVis and Stability AI publish them."""

CLIP_INDEX = {"feature_extractor": [None, None], "safety_checker": [None, None], "requires_safety_checker": False}

SD1 = Family(
    name="sd1",
    title="Stable Diffusion 1.x",
    pipeline_class="StableDiffusionPipeline",
    text_encoders=(
        TextEncoderSlot("text_encoder", "tokenizer", "CLIPTextModel", "cond_stage_model.transformer.", "hf", "lora_te"),
    ),
    encode_prompt=TokenizedPrompts(encode_one_encoder),
    count_windows=count_windows,
    predict=predict_from_text,
    latent_space=kl_space(4),
    layout=LDM_LAYOUT,
    index=CLIP_INDEX,
    matches_configs=partial(has_one_encoder, linear=False),
    modelspec_architecture="stable-diffusion-v1",
    kohya_base="sd_v1",
    distilled=distilled_from("stable-diffusion-v1-5/stable-diffusion-v1-5"),
    resolution=lambda prediction_type: 512,
)
