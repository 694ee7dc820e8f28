"""FLUX.1: a flow transformer of two streams and then one, CLIP's pooled text and T5's states, and a VAE of 16 channels.

The transformer works on squares of 2 x 2 cells. Text is 512 tokens long, padding included: neither T5 nor the denoiser
has a mask. dev has the guidance scale as an input, from which it was distilled: it is trained with 1 and sampled with 3.5,
in one prediction. schnell was distilled to few steps, too, and has no such input.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from everydream_kit.models.clip_text import tokenize
from everydream_kit.models.distilled import why_distilled
from everydream_kit.models.family import (
    Conditioning,
    PromptSettings,
    SamplerSpec,
    Shapes,
    Sizes,
    TextEncoderSlot,
    input_dtype,
)
from everydream_kit.models.flow import packed, positions, unpacked
from everydream_kit.models.flow_transformers import TransformerNames, flow_family, transformer
from everydream_kit.models.latent_spaces import kl_space
from everydream_kit.strict_json import read_json
from everydream_kit.transfers import send

if TYPE_CHECKING:
    from everydream_kit.models.family import Model

TRANSFORMER = transformer(
    "transformer_flux", "FluxTransformer2DModel", "FluxTransformerBlock", "FluxSingleTransformerBlock", since="0.30"
)
MAX_TOKENS = 512
"""Of T5, its end included; what does not fit is cut off."""
IN_CHANNELS = 64
"""Of dev and schnell; Fill, Depth and Canny have more."""


def encode_prompt(model: Model, prompts: Sequence[str], settings: PromptSettings) -> Conditioning:
    """T5's states (B, 512, D), and CLIP's pooled text from its first 77 tokens."""
    clip, t5 = model.text_encoders
    token_ids = tokenize(model.tokenizers[0], prompts).flatten(0, 1)
    pooled = clip(send(token_ids, next(clip.parameters()).device)).pooler_output
    device = next(t5.parameters()).device
    tokenizer: Any = model.tokenizers[1]
    rows = []
    for prompt in prompts:  # each alone, as the cache has them
        ids = tokenizer(prompt, truncation=True, max_length=MAX_TOKENS)["input_ids"]
        ids = ids + [tokenizer.pad_token_id] * (MAX_TOKENS - len(ids))
        rows.append(t5(input_ids=torch.tensor([ids], device=device)).last_hidden_state)
    return Conditioning(torch.cat(rows), pooled)


def predict(
    model: Model, noisy_latents: torch.Tensor, timesteps: torch.Tensor, conditioning: Conditioning, sizes: Sizes
) -> torch.Tensor:
    """The velocity (B, 16, h, w) in float32."""
    dtype, device = input_dtype(model.denoiser), noisy_latents.device
    height, width = noisy_latents.shape[2:]
    texts = conditioning.encoder_hidden_states.to(dtype)
    config: Any = model.denoiser.config
    guidance = conditioning.guidance
    if guidance is None:
        guidance = torch.ones(len(noisy_latents), device=device)
    if conditioning.pooled is None:
        raise ValueError("FLUX.1 needs the pooled text embedding")
    output = model.denoiser(
        hidden_states=packed(noisy_latents.to(dtype)),
        encoder_hidden_states=texts,
        pooled_projections=conditioning.pooled.to(dtype),
        timestep=(timesteps / 1000).to(dtype),
        guidance=guidance if config["guidance_embeds"] else None,
        img_ids=positions(1, height // 2, width // 2, device=device),
        txt_ids=torch.zeros(texts.shape[1], 3, device=device),
        return_dict=False,
    )[0]
    return unpacked(output.float(), height, width)


SWAPPED = "final_layer.adaLN_modulation.1"
"""(shift, scale) in files of Black Forest Labs, and (scale, shift) in diffusers."""
DOUBLE_ATTENTION = {
    **dict.fromkeys(("attn.to_q", "attn.to_k", "attn.to_v"), "img_attn.qkv"),
    **dict.fromkeys(("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"), "txt_attn.qkv"),
    "attn.norm_q.weight": "img_attn.norm.query_norm.scale",
    "attn.norm_k.weight": "img_attn.norm.key_norm.scale",
    "attn.to_out.0": "img_attn.proj",
    "attn.norm_added_q.weight": "txt_attn.norm.query_norm.scale",
    "attn.norm_added_k.weight": "txt_attn.norm.key_norm.scale",
    "attn.to_add_out": "txt_attn.proj",
}
SINGLE_NORMS = {"attn.norm_q.weight": "norm.query_norm.scale", "attn.norm_k.weight": "norm.key_norm.scale"}
_DOUBLE = {
    **DOUBLE_ATTENTION,
    "norm1.linear": "img_mod.lin",
    "norm1_context.linear": "txt_mod.lin",
    "ff.net.0.proj": "img_mlp.0",
    "ff.net.2": "img_mlp.2",
    "ff_context.net.0.proj": "txt_mlp.0",
    "ff_context.net.2": "txt_mlp.2",
}
_SINGLE = {
    **SINGLE_NORMS,
    **dict.fromkeys(("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"), "linear1"),
    "norm.linear": "modulation.lin",
    "proj_out": "linear2",
}
NAMES = TransformerNames(
    outside={
        "x_embedder": "img_in",
        "context_embedder": "txt_in",
        "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
        "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
        "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
        "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
        "time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
        "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
        "norm_out.linear": SWAPPED,
        "proj_out": "final_layer.linear",
    },
    blocks={
        "transformer_blocks": ("double_blocks", _DOUBLE),
        "single_transformer_blocks": ("single_blocks", _SINGLE),
    },
    shares={"linear1": (1, 1, 1, 4)},  # the MLP is four times as wide as the model
    swapped=(SWAPPED,),
)


def _matches_keys(shapes: Shapes) -> bool:
    return "vector_in.in_layer.weight" in shapes and shapes.get("img_in.weight", ())[1:] == (IN_CHANNELS,)


def _distilled(source: str) -> str | None:
    config = Path(source).expanduser() / "transformer" / "config.json"
    says = config.is_file() and read_json(config).get("guidance_embeds") is False
    pattern = "" if says else "(schnell|turbo|lightning|hyper)[^/]*/?$"
    return why_distilled(source, pattern, "FLUX.1-schnell or another variant", "black-forest-labs/FLUX.1-dev")


FLUX1 = flow_family(
    name="flux1",
    title="FLUX.1",
    pipeline_class="FluxPipeline",
    denoiser=TRANSFORMER,
    text_encoders=(
        TextEncoderSlot("text_encoder", "tokenizer", "CLIPTextModel", kohya_prefix="lora_te1", trains=frozenset()),
        TextEncoderSlot(
            "text_encoder_2",
            "tokenizer_2",
            "T5EncoderModel",
            kohya_prefix="lora_te3",  # sd-scripts' number of it; OneTrainer's is 2
            trains=frozenset(),
            blocks=("T5Block",),
            module="transformers.models.t5.modeling_t5",
            tokenizer_class="T5TokenizerFast",
        ),
    ),
    encode_prompt=encode_prompt,
    predict=predict,
    latent_space=kl_space(16),
    sampler=SamplerSpec("flow", "embedded", size_multiple=16, num_steps=28, cfgs=(3.5,), few_steps=4),
    layout=NAMES.layout("diffusers"),
    lora_targets=(
        r"transformer_blocks\.\d+\.attn\.(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)",
        r"single_transformer_blocks\.\d+\.attn\.(to_q|to_k|to_v)",
    ),
    index={"feature_extractor": [None, None], "image_encoder": [None, None]},
    matches_configs=lambda configs: configs[TRANSFORMER.folder].get("in_channels", IN_CHANNELS) == IN_CHANNELS,
    matches_keys=_matches_keys,
    modelspec_architecture="flux-1-dev",
    kohya_base="flux1",
    distilled=_distilled,
    caption_tokens=MAX_TOKENS - 1,
    prompt_version=f"{MAX_TOKENS} tokens of T5 with padding, pooled CLIP",
)
