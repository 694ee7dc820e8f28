"""Anima: Cosmos-Predict2's flow transformer, behind Qwen3-0.6B and a text conditioner, with Qwen-Image's VAE.

A caption is tokenized twice: Qwen3 encodes it, and the conditioner, six blocks that were trained with the transformer,
embeds its T5 tokens and looks from them at Qwen3's states. What comes out has one row for each T5 token, and zeros behind
them up to a fixed length, which the transformer attends to. Text encoder and conditioner are frozen; the conditioner is
the second of the text encoders here, since it is fed from a tokenizer and its output is what a caption's cache keeps.

Its single files hold transformer and conditioner, in NVIDIA's own names with `net.` before them.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from everydream_kit.models.convert import rename
from everydream_kit.models.family import (
    Component,
    Conditioning,
    Config,
    Family,
    Layout,
    SamplerSpec,
    Shapes,
    Sizes,
    TextEncoderSlot,
    input_dtype,
    join_conditioning,
    parameter_dtype,
)
from everydream_kit.models.flow import REFUSES, shift_of
from everydream_kit.models.latent_spaces import QWEN_IMAGE_VAE, frame_space
from everydream_kit.models.qwen_text import MAX_TOKENS
from everydream_kit.models.tensors import Tensors

if TYPE_CHECKING:
    from everydream_kit.models.family import Model, ModelFiles, PromptSettings

TRANSFORMER = Component(
    "transformer",
    "diffusers.models.transformers.transformer_cosmos",
    "CosmosTransformer3DModel",
    "denoiser",
    frozenset({"full", "lora"}),
    ("CosmosTransformerBlock",),
    since="0.39",
)
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


def _matches_configs(configs: Mapping[str, Config]) -> bool:
    return configs["transformer"].get("_class_name") == TRANSFORMER.class_name and CONDITIONER in configs


def _matches_keys(shapes: Shapes) -> bool:
    names = {_bare(name) for name in shapes}
    return {"blocks.0.self_attn.q_proj.weight", "x_embedder.proj.1.weight"} <= names


PREFIX = "net."
_PREFIXES = (PREFIX, "model.diffusion_model.", "diffusion_model.")
"""Before the names, in NVIDIA's files and in those that were cut out of whole checkpoints."""
ADAPTER = "llm_adapter."
"""What the file calls the conditioner; its names are diffusers'."""
_UNUSED = re.compile(r"^(pos_embedder|accum_)|_extra_state$")
"""What such files hold besides: counters of the training, and ranges that are computed."""
_OUTSIDE = {
    "patch_embed.proj": "x_embedder.proj.1",
    "time_embed.t_embedder": "t_embedder.1",
    "time_embed.norm": "t_embedding_norm",
    "norm_out.linear_1": "final_layer.adaln_modulation.1",
    "norm_out.linear_2": "final_layer.adaln_modulation.2",
    "proj_out": "final_layer.linear",
}
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
_OUR_BLOCK = re.compile(r"^transformer_blocks\.(\d+)\.(.+)$")
_THEIR_BLOCK = re.compile(r"^blocks\.(\d+)\.(.+)$")


def _theirs(name: str) -> str:
    block = _OUR_BLOCK.match(name)
    return f"blocks.{block[1]}.{rename(block[2], _INSIDE)}" if block else rename(name, _OUTSIDE)


def _ours(name: str) -> str:
    block = _THEIR_BLOCK.match(name)
    if block is None:
        return rename(name, {theirs: ours for ours, theirs in _OUTSIDE.items()})
    inside = {theirs: ours for ours, theirs in _INSIDE.items()}
    return f"transformer_blocks.{block[1]}.{rename(block[2], inside)}"


def _bare(name: str) -> str:
    prefix = next((prefix for prefix in _PREFIXES if name.startswith(prefix)), "")
    return name.removeprefix(prefix)


def to_single_file(files: ModelFiles) -> Tensors:
    """Transformer and conditioner by the names that image apps know."""
    transformer, conditioner = files.tensors[TRANSFORMER.folder], files.tensors[CONDITIONER]
    theirs = {f"{PREFIX}{_theirs(name)}": value for name, value in transformer.items()}
    return theirs | {f"{PREFIX}{ADAPTER}{name}": value for name, value in conditioner.items()}


def from_single_file(tensors: Tensors, family: Family, configs: dict[str, Config]) -> dict[str, Tensors]:
    """Transformer and conditioner by diffusers' names; the conditioner may be missing, and stays as it is then."""
    transformer: Tensors = {}
    conditioner: Tensors = {}
    for full_name, value in tensors.items():
        name = _bare(full_name)
        if name.startswith(ADAPTER):
            conditioner[name.removeprefix(ADAPTER)] = value
        elif not _UNUSED.search(name):
            transformer[_ours(name)] = value
    found = {TRANSFORMER.folder: transformer, CONDITIONER: conditioner}
    return {folder: part for folder, part in found.items() if part}


def app_layers(names: Sequence[str]) -> dict[str, list[str]]:
    """diffusers' layers by the names that image apps know; each is one of theirs."""
    return {_layer(name): [name] for name in names}


def _layer(name: str) -> str:
    return _theirs(f"{name}.weight").removesuffix(".weight")


def lora_stem(name: str, config: Config) -> str:
    """A layer's name in kohya's layout: `blocks_0_self_attn_q_proj`."""
    return _layer(name).replace(".", "_")


_DISTILLED_NAME = re.compile(r"anima.*turbo", re.IGNORECASE)


def _distilled(source: str) -> str | None:
    if not _DISTILLED_NAME.search(source):
        return None
    return (
        "looks like Anima Turbo, whose few steps without guidance are lost when it is trained on. Train on Anima Base "
        "(circlestone-labs/Anima-Base-v1.0-Diffusers), and sample with the LoRA on Turbo."
    )


ANIMA = Family(
    name="anima",
    title="Anima",
    pipeline_class="AnimaModularPipeline",
    index={"_blocks_class_name": "AnimaAutoBlocks"},
    denoiser=TRANSFORMER,
    vae=QWEN_IMAGE_VAE,
    text_encoders=(
        TextEncoderSlot(
            "text_encoder",
            "tokenizer",
            "Qwen3Model",
            trains=frozenset(),
            blocks=("Qwen3DecoderLayer",),
            module="transformers.models.qwen3.modeling_qwen3",
            tokenizer_class="Qwen2Tokenizer",
        ),
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
    objective="flow",
    encode_prompt=encode_prompt,
    predict=predict,
    latent_space=frame_space(16),
    shift=shift_of,
    sampler=SamplerSpec("flow", "cfg", size_multiple=16, num_steps=30, cfg=4.0),
    layout=Layout(
        to_single_file,
        from_single_file,
        holds_all=False,
        also_holds=(CONDITIONER,),
        lora_for_apps="kohya",
        lora_stem=lora_stem,
        app_layers=app_layers,
    ),
    lora_targets=(r"transformer_blocks\.\d+\.(attn[12]\.(to_q|to_k|to_v|to_out\.0)|ff\.net\.(0\.proj|2))",),
    matches_configs=_matches_configs,
    matches_keys=_matches_keys,
    modelspec_architecture="anima",
    kohya_base="anima",
    resolution=lambda prediction_type: 1024,
    refuses=REFUSES,
    distilled=_distilled,
    prompt_version=f"last states of {MAX_TOKENS} tokens, conditioned by T5's",
)
