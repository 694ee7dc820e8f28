"""FLUX.2-klein, 4B and 9B: a flow transformer of two streams and then one, a Qwen3 text encoder, and FLUX.2's VAE.

What the denoiser works on are squares of 2 x 2 cells of the VAE: 128 channels for 16 pixels, normalized by the statistics
that the VAE's batch norm holds. Text is 512 tokens long, padding included: the denoiser was trained without a mask. Its
single files hold the transformer alone, in Black Forest Labs' own names, with q, k and v of each double block in one
matrix and the halves of the last modulation the other way round.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from everydream_kit.models.distilled import why_distilled
from everydream_kit.models.families.flux1 import DOUBLE_ATTENTION, SINGLE_NORMS, SWAPPED
from everydream_kit.models.family import Component, Conditioning, SamplerSpec, Shapes, Sizes, input_dtype
from everydream_kit.models.flow import positions, tokens_of
from everydream_kit.models.flow_transformers import TransformerNames, flow_family, transformer
from everydream_kit.models.latent_spaces import batch_norm_space
from everydream_kit.models.qwen_text import CHAT_WITHOUT_THINKING, MAX_TOKENS, QWEN3, qwen_prompt_encoder

if TYPE_CHECKING:
    from everydream_kit.models.family import Model

TRANSFORMER = transformer(
    "transformer_flux2", "Flux2Transformer2DModel", "Flux2TransformerBlock", "Flux2SingleTransformerBlock", since="0.37"
)
VAE = Component("vae", "diffusers.models.autoencoders.autoencoder_kl_flux2", "AutoencoderKLFlux2", "vae", since="0.37")
TEXT_LAYERS = (9, 18, 27)
"""Hidden states that stand side by side, as diffusers' pipeline takes them."""


def predict(
    model: Model, noisy_latents: torch.Tensor, timesteps: torch.Tensor, conditioning: Conditioning, sizes: Sizes
) -> torch.Tensor:
    """The velocity (B, 128, h, w) in float32."""
    dtype = input_dtype(model.denoiser)
    height, width = noisy_latents.shape[2:]
    texts = conditioning.encoder_hidden_states.to(dtype)
    output = model.denoiser(
        hidden_states=noisy_latents.flatten(2).transpose(1, 2).to(dtype),  # (B, h w, 128)
        encoder_hidden_states=texts,
        timestep=(timesteps / 1000).to(dtype),
        img_ids=positions(1, height, width, 1, device=noisy_latents.device),
        txt_ids=positions(1, 1, 1, texts.shape[1], device=noisy_latents.device),
        return_dict=False,
    )[0]
    velocity: torch.Tensor = output.float().transpose(1, 2).unflatten(2, (height, width))
    return velocity


def sampling_mu(scheduler_config: Mapping[str, Any], width: int, height: int, num_steps: int) -> float:
    """The logarithm of the shift in sampling, by tokens and steps: fitted by Black Forest Labs, as diffusers has it.

    It is higher than in training, which is shifted as the scheduler's settings say (OneTrainer's pull request 1516).
    """
    tokens = tokens_of(width, height)
    many = 0.00016927 * tokens + 0.45666666  # at 200 steps
    if tokens > 4300:
        return many
    few = 8.73809524e-05 * tokens + 1.89833333  # at 10 steps
    slope = (many - few) / 190
    return many + slope * (num_steps - 200)


def _matches_keys(shapes: Shapes) -> bool:
    return "single_stream_modulation.lin.weight" in shapes and "guidance_in.in_layer.weight" not in shapes


_DOUBLE = {
    **DOUBLE_ATTENTION,
    "ff.linear_in": "img_mlp.0",
    "ff.linear_out": "img_mlp.2",
    "ff_context.linear_in": "txt_mlp.0",
    "ff_context.linear_out": "txt_mlp.2",
}
_SINGLE = {**SINGLE_NORMS, "attn.to_qkv_mlp_proj": "linear1", "attn.to_out": "linear2"}
NAMES = TransformerNames(
    outside={
        "x_embedder": "img_in",
        "context_embedder": "txt_in",
        "time_guidance_embed.timestep_embedder.linear_1": "time_in.in_layer",
        "time_guidance_embed.timestep_embedder.linear_2": "time_in.out_layer",
        "double_stream_modulation_img.linear": "double_stream_modulation_img.lin",
        "double_stream_modulation_txt.linear": "double_stream_modulation_txt.lin",
        "single_stream_modulation.linear": "single_stream_modulation.lin",
        "norm_out.linear": SWAPPED,
        "proj_out": "final_layer.linear",
    },
    blocks={
        "transformer_blocks": ("double_blocks", _DOUBLE),
        "single_transformer_blocks": ("single_blocks", _SINGLE),
    },
    swapped=(SWAPPED,),
)


def _distilled(source: str) -> str | None:
    size = "9B" if "9b" in source.rstrip("/").rpartition("/")[2].lower() else "4B"
    base = f"black-forest-labs/FLUX.2-klein-base-{size}"
    return why_distilled(source, r"flux[-.]2-klein-[49]b(?!.*base)[^/]*/?$", "FLUX.2-klein", base)


NINE: dict[str, Any] = {
    "denoiser": {"num_layers": 8, "num_single_layers": 24, "num_attention_heads": 32, "joint_attention_dim": 12288},
    "text_encoders": [{"hidden_size": 4096, "intermediate_size": 12288, "tie_word_embeddings": False}],
}
"""What the 9B model's configs have otherwise than the shipped ones, which are 4B's: its text encoder is Qwen3-8B."""


FLUX2_KLEIN = flow_family(
    name="flux2_klein",
    title="FLUX.2-klein",
    pipeline_class="Flux2KleinPipeline",
    denoiser=TRANSFORMER,
    vae=VAE,
    text_encoders=(replace(QWEN3, tokenizer_class="Qwen2TokenizerFast", index_class="Qwen3ForCausalLM"),),
    encode_prompt=qwen_prompt_encoder(TEXT_LAYERS, CHAT_WITHOUT_THINKING, padded=True),
    predict=predict,
    latent_space=batch_norm_space(32),
    sampler=SamplerSpec("flow", "cfg", size_multiple=16, num_steps=50, cfgs=(4.0,), few_steps=4, mu=sampling_mu),
    layout=NAMES.layout("comfy"),
    lora_targets=(
        r"transformer_blocks\.\d+\.attn\.(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)",
        r"single_transformer_blocks\.\d+\.attn\.(to_qkv_mlp_proj|to_out)",
    ),
    index={"is_distilled": False},
    matches_configs=lambda configs: configs[TRANSFORMER.folder].get("guidance_embeds") is False,
    matches_keys=_matches_keys,
    modelspec_architecture="flux-2-klein",
    kohya_base="flux2_klein",
    distilled=_distilled,
    caption_tokens=MAX_TOKENS - 12,  # of the template
    prompt_version=f"layers {TEXT_LAYERS} of {MAX_TOKENS} tokens with padding of {CHAT_WITHOUT_THINKING}",
)
