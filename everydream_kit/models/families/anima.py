"""Anima: Cosmos-Predict2's flow transformer, behind Qwen3-0.6B and a text conditioner, with Qwen-Image's VAE.

A caption is tokenized twice: Qwen3 encodes it, and the conditioner, six blocks that were trained with the transformer,
embeds its T5 tokens and looks from them at Qwen3's states. What comes out has one row for each T5 token, and zeros behind
them up to a fixed length, which the transformer attends to. Text encoder and conditioner are frozen; the conditioner is
the second of the text encoders here, since it is fed from a tokenizer and its output is what a caption's cache keeps.

Its single files hold transformer and conditioner, in NVIDIA's own names with `net.` before them.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from everydream_kit.models.distilled import why_distilled
from everydream_kit.models.family import (
    Conditioning,
    Config,
    Family,
    SamplerSpec,
    Sizes,
    TextEncoderSlot,
    input_dtype,
    join_conditioning,
    parameter_dtype,
)
from everydream_kit.models.flow_transformers import (
    TransformerNames,
    bare,
    flow_family,
    having,
    transformer,
)
from everydream_kit.models.latent_spaces import QWEN_IMAGE_VAE, frame_space
from everydream_kit.models.qwen_text import MAX_TOKENS, QWEN3
from everydream_kit.models.tensors import Tensors

if TYPE_CHECKING:
    from everydream_kit.models.family import Model, ModelFiles, PromptSettings

TRANSFORMER = transformer("transformer_cosmos", "CosmosTransformer3DModel", "CosmosTransformerBlock", since="0.39")
CONDITIONER = "text_conditioner"


def encode_prompt(model: Model, prompts: Sequence[str], settings: PromptSettings) -> Conditioning:
    """The conditioner's states (B, L, D), one for each T5 token; the zeros behind them are added in `predict`."""
    text_encoder, conditioner = model.text_encoders
    tokenizer, t5_tokenizer = model.tokenizers
    device = next(text_encoder.parameters()).device
    rows = []
    for prompt in prompts:
        ids = tokenizer(prompt, truncation=True, max_length=MAX_TOKENS)["input_ids"]
        if ids:
            states = text_encoder(input_ids=torch.tensor([ids], device=device), use_cache=False).last_hidden_state
        else:  # the empty caption has no tokens of Qwen's, and its states are zeros
            states = torch.zeros(1, 1, _width(text_encoder), device=device)
        t5_ids = t5_tokenizer(prompt, truncation=True, max_length=MAX_TOKENS)["input_ids"]
        with torch.autocast(device.type, enabled=False):
            texts = conditioner(states.to(parameter_dtype(conditioner)), torch.tensor([t5_ids], device=device))
        rows.append(Conditioning(texts[:, : len(t5_ids)]))
    return join_conditioning(rows)


def _width(text_encoder: torch.nn.Module) -> int:
    """Numbers of a token's state."""
    config: Any = text_encoder.config
    return int(config.hidden_size)


def predict(
    model: Model, noisy_latents: torch.Tensor, timesteps: torch.Tensor, conditioning: Conditioning, sizes: Sizes
) -> torch.Tensor:
    """The velocity (B, 16, h, w) in float32."""
    _resize_without_torchvision()
    dtype = input_dtype(model.denoiser)
    config: Any = model.text_encoders[1].config
    texts = conditioning.encoder_hidden_states
    missing = max(0, config.min_sequence_length - texts.shape[1])
    output = model.denoiser(
        hidden_states=noisy_latents.unsqueeze(2).to(dtype),  # (B, 16, 1, h, w): one frame
        timestep=(timesteps / 1000).to(dtype),
        encoder_hidden_states=torch.nn.functional.pad(texts, (0, 0, 0, missing)).to(dtype),
        padding_mask=noisy_latents.new_zeros(1, 1, *noisy_latents.shape[2:], dtype=dtype),  # nothing is padded
        return_dict=False,
    )[0]
    velocity: torch.Tensor = output.float().squeeze(2)
    return velocity


def _resize_without_torchvision() -> None:
    """Let diffusers' transformer do without torchvision, by which it scales the padding mask; ours has the right size."""
    module: Any = importlib.import_module(TRANSFORMER.module)
    if not hasattr(module, "transforms"):
        nearest = SimpleNamespace(NEAREST="nearest")
        functional = SimpleNamespace(resize=_resize)
        module.transforms = SimpleNamespace(functional=functional, InterpolationMode=nearest)


def _resize(mask: torch.Tensor, size: list[int], interpolation: str) -> torch.Tensor:
    return torch.nn.functional.interpolate(mask, size, mode=interpolation)


ADAPTER = "llm_adapter."
"""What the file calls the conditioner; its names are diffusers'."""
_ATTENTION = {
    "to_q": "q_proj",
    "to_k": "k_proj",
    "to_v": "v_proj",
    "to_out.0": "output_proj",
    "norm_q": "q_norm",
    "norm_k": "k_norm",
}
_INSIDE = {
    **{f"attn1.{ours}": f"self_attn.{theirs}" for ours, theirs in _ATTENTION.items()},
    **{f"attn2.{ours}": f"cross_attn.{theirs}" for ours, theirs in _ATTENTION.items()},
    **{
        f"norm{place}.linear_{number}": f"adaln_modulation_{part}.{number}"
        for place, part in enumerate(("self_attn", "cross_attn", "mlp"), 1)
        for number in (1, 2)
    },
    "ff.net.0.proj": "mlp.layer1",
    "ff.net.2": "mlp.layer2",
}
"""diffusers' names of layers in a block -> the file's."""
NAMES = TransformerNames(
    outside={
        "patch_embed.proj": "x_embedder.proj.1",
        "time_embed.t_embedder": "t_embedder.1",
        "time_embed.norm": "t_embedding_norm",
        "norm_out.linear_1": "final_layer.adaln_modulation.1",
        "norm_out.linear_2": "final_layer.adaln_modulation.2",
        "proj_out": "final_layer.linear",
    },
    blocks={"transformer_blocks": ("blocks", _INSIDE)},
    unused=r"^(pos_embedder|accum_)|_extra_state$",  # counters of the training, and ranges that are computed
    prefix="net.",
)


def to_single_file(files: ModelFiles) -> Tensors:
    """Transformer and conditioner by the names that image apps know."""
    conditioner = {f"{NAMES.prefix}{ADAPTER}{name}": value for name, value in files.tensors[CONDITIONER].items()}
    return NAMES.to_single_file(files) | conditioner


def from_single_file(tensors: Tensors, family: Family, configs: dict[str, Config]) -> dict[str, Tensors]:
    """Transformer and conditioner by diffusers' names; the conditioner may be missing, and stays as it is then."""
    own = {bare(name): value for name, value in tensors.items()}
    conditioner = {name.removeprefix(ADAPTER): own.pop(name) for name in list(own) if name.startswith(ADAPTER)}
    found = {**NAMES.from_single_file(own, family, configs), CONDITIONER: conditioner}
    return {folder: part for folder, part in found.items() if part}


ANIMA = flow_family(
    name="anima",
    title="Anima",
    pipeline_class="AnimaModularPipeline",
    index={"_blocks_class_name": "AnimaAutoBlocks"},
    denoiser=TRANSFORMER,
    vae=QWEN_IMAGE_VAE,
    text_encoders=(
        QWEN3,
        TextEncoderSlot(
            CONDITIONER,
            "t5_tokenizer",
            "AnimaTextConditioner",
            trains=frozenset(),
            blocks=("AnimaTextConditionerBlock",),
            module="diffusers.models.condition_embedders.condition_embedder_anima",
            tokenizer_class="T5TokenizerFast",
            since="0.39",
        ),
    ),
    encode_prompt=encode_prompt,
    predict=predict,
    latent_space=frame_space(16),
    sampler=SamplerSpec("flow", "cfg", size_multiple=16, num_steps=30, cfgs=(4.0,)),
    layout=replace(
        NAMES.layout("kohya"),
        to_single_file=to_single_file,
        from_single_file=from_single_file,
        also_holds=(CONDITIONER,),
    ),
    lora_targets=(r"transformer_blocks\.\d+\.(attn[12]\.(to_q|to_k|to_v|to_out\.0)|ff\.net\.(0\.proj|2))",),
    matches_configs=lambda configs: CONDITIONER in configs,
    matches_keys=having("blocks.0.self_attn.q_proj.weight", "x_embedder.proj.1.weight"),
    modelspec_architecture="anima",
    kohya_base="anima",
    distilled=lambda source: why_distilled(
        source, "anima.*turbo", "Anima Turbo", "Anima Base (circlestone-labs/Anima-Base-v1.0-Diffusers)", "Turbo"
    ),
    caption_tokens=MAX_TOKENS - 1,
    prompt_version=f"last states of {MAX_TOKENS} tokens, conditioned by T5's",
)
