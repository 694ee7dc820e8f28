"""Qwen-Image (also 2512): a flow transformer of two streams, Qwen2.5-VL's last state, and a VAE of videos.

A caption stands behind a system prompt whose tokens are dropped after encoding. Texts are as long as they are: a batch of
different lengths has a mask. Where guidance makes two predictions, each token of the result is as long as the caption's
own. The text encoder's half that sees images is loaded, since diffusers' pipeline expects it, and not used. Its single
files hold the transformer alone, by diffusers' names.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from everydream_kit.models.distilled import why_distilled
from everydream_kit.models.family import (
    Conditioning,
    Layout,
    PromptSettings,
    SamplerSpec,
    Sizes,
    input_dtype,
    join_conditioning,
)
from everydream_kit.models.flow import packed, unpacked
from everydream_kit.models.flow_transformers import TransformerNames, flow_family, having, transformer
from everydream_kit.models.latent_spaces import QWEN_IMAGE_VAE, frame_space
from everydream_kit.models.qwen_text import language_model

if TYPE_CHECKING:
    from everydream_kit.models.family import Model

TRANSFORMER = transformer(
    "transformer_qwenimage", "QwenImageTransformer2DModel", "QwenImageTransformerBlock", since="0.35"
)
TEMPLATE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    "relationships of the objects and background:<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
DROPPED = 34
"""Tokens of the template before the caption."""
MAX_TOKENS = 1024
"""Of the caption and what follows it; the rest is cut off."""


def encode_prompt(model: Model, prompts: Sequence[str], settings: PromptSettings) -> Conditioning:
    """The last states of the caption's tokens and of those that follow in the template."""
    tokenizer = model.tokenizers[0]
    text_encoder = model.text_encoders[0].get_submodule("language_model")
    device = next(text_encoder.parameters()).device
    rows = []
    for prompt in prompts:
        ids = tokenizer(TEMPLATE.format(prompt), truncation=True, max_length=MAX_TOKENS + DROPPED)["input_ids"]
        states = text_encoder(input_ids=torch.tensor([ids], device=device), use_cache=False).last_hidden_state
        rows.append(Conditioning(states[:, DROPPED:]))
    return join_conditioning(rows)


def predict(
    model: Model, noisy_latents: torch.Tensor, timesteps: torch.Tensor, conditioning: Conditioning, sizes: Sizes
) -> torch.Tensor:
    """The velocity (B, 16, h, w) in float32."""
    dtype = input_dtype(model.denoiser)
    height, width = noisy_latents.shape[2:]
    output = model.denoiser(
        hidden_states=packed(noisy_latents.to(dtype)),
        encoder_hidden_states=conditioning.encoder_hidden_states.to(dtype),
        encoder_hidden_states_mask=conditioning.mask(noisy_latents.device),
        timestep=(timesteps / 1000).to(dtype),
        img_shapes=[[(1, height // 2, width // 2)]] * len(noisy_latents),
        return_dict=False,
    )[0]
    return unpacked(output.float(), height, width)


def with_own_lengths(guided: torch.Tensor, conditional: torch.Tensor) -> torch.Tensor:
    """A guided prediction whose tokens are as long as those of the caption's own, as diffusers' pipeline has it."""
    tokens, own = packed(guided), packed(conditional)
    scaled = tokens * (own.norm(dim=-1, keepdim=True) / tokens.norm(dim=-1, keepdim=True))
    return unpacked(scaled, *guided.shape[2:])


NAMES = TransformerNames()  # diffusers' own

QWEN_IMAGE = flow_family(
    name="qwen_image",
    title="Qwen-Image",
    pipeline_class="QwenImagePipeline",
    denoiser=TRANSFORMER,
    vae=QWEN_IMAGE_VAE,
    text_encoders=(
        language_model(
            "Qwen2_5_VLModel",
            "Qwen2_5_VLDecoderLayer",
            "qwen2_5_vl",
            index_class="Qwen2_5_VLForConditionalGeneration",
        ),
    ),
    encode_prompt=encode_prompt,
    predict=predict,
    latent_space=frame_space(16),
    sampler=SamplerSpec("flow", "cfg", size_multiple=16, num_steps=50, cfgs=(4.0,), after_guidance=with_own_lengths),
    layout=Layout(NAMES.to_single_file, NAMES.from_single_file, holds_all=False, lora_for_apps="diffusers"),
    lora_targets=(
        r"transformer_blocks\.\d+\.attn\.(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)",
    ),
    matches_configs=lambda configs: not configs[TRANSFORMER.folder].get("use_layer3d_rope", False),
    matches_keys=having("txt_norm.weight", "transformer_blocks.0.img_mod.1.weight"),
    modelspec_architecture="qwen-image",
    kohya_base="qwen_image",
    resolution=lambda prediction_type: 1328,
    distilled=lambda source: why_distilled(
        source,
        r"(lightning|turbo|distill|lcm|[48][-_]?steps?\b)[^/]*/?$",
        "a variant of Qwen-Image",
        "Qwen/Qwen-Image-2512 or Qwen/Qwen-Image",
    ),
    caption_tokens=MAX_TOKENS - 5,  # of what follows in the template
    not_captured="diffusers sends the length of the texts from the host within each prediction",
    prompt_version=f"last layer of {MAX_TOKENS} tokens after {DROPPED} of {TEMPLATE}",
)
