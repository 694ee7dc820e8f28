"""Z-Image: a single-stream flow transformer, a Qwen3 text encoder, and FLUX.1's VAE.

The transformer takes lists, its time runs from noise to image (1 - sigma), and its output is the negative velocity; both
are turned here. Text stands behind the image's tokens, without padding. Its single files hold the transformer alone, with
q, k and v of each attention in one matrix.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

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
)
from everydream_kit.models.flow import REFUSES, trained_as_flux
from everydream_kit.models.latent_spaces import kl_space
from everydream_kit.models.qwen_text import CHAT, MAX_TOKENS, qwen_prompt_encoder
from everydream_kit.models.tensors import Tensors, concatenated

if TYPE_CHECKING:
    from everydream_kit.models.family import Model, ModelFiles

TRANSFORMER = Component(
    "transformer",
    "diffusers.models.transformers.transformer_z_image",
    "ZImageTransformer2DModel",
    "denoiser",
    frozenset({"full", "lora"}),
    ("ZImageTransformerBlock",),
    since="0.36",
)


def predict(
    model: Model, noisy_latents: torch.Tensor, timesteps: torch.Tensor, conditioning: Conditioning, sizes: Sizes
) -> torch.Tensor:
    """The velocity (B, 16, h, w) in float32."""
    dtype = input_dtype(model.denoiser)
    texts = [text.to(dtype) for text in conditioning.texts()]
    images = list(noisy_latents.to(dtype).unsqueeze(2))  # (16, 1, h, w) each
    time = ((1000 - timesteps) / 1000).to(dtype)
    output = model.denoiser(images, time, texts, return_dict=False)[0]
    return -torch.stack([image.float() for image in output]).squeeze(2)


def _matches_configs(configs: Mapping[str, Config]) -> bool:
    return configs["transformer"].get("_class_name") == TRANSFORMER.class_name


def _matches_keys(shapes: Shapes) -> bool:
    names = {name.removeprefix(PREFIX) for name in shapes}
    return {"layers.0.adaLN_modulation.0.weight", "x_pad_token"} <= names


PREFIX = "model.diffusion_model."
"""Before the names in files that were cut out of whole checkpoints."""
_RENAMES = {
    "all_x_embedder.2-1.": "x_embedder.",
    "all_final_layer.2-1.": "final_layer.",
    ".attention.norm_q.": ".attention.q_norm.",
    ".attention.norm_k.": ".attention.k_norm.",
    ".attention.to_out.0.": ".attention.out.",
}
"""diffusers' part of a name -> the single file's."""
_PART = re.compile(r"^(.*\.attention\.)to_([qkv])\.weight$")
_FUSED = ".attention.qkv.weight"


def to_single_file(files: ModelFiles) -> Tensors:
    """The transformer's weights by the names that image apps know, q, k and v in one."""
    ours = files.tensors[TRANSFORMER.folder]
    theirs: Tensors = {}
    for name, value in ours.items():
        part = _PART.match(name)
        if part is None:
            theirs[_renamed(name, _RENAMES)] = value
        elif part[2] == "q":
            theirs[f"{part[1]}qkv.weight"] = concatenated([ours[f"{part[1]}to_{one}.weight"] for one in "qkv"])
    return theirs


def from_single_file(tensors: Tensors, family: Family, configs: dict[str, Config]) -> dict[str, Tensors]:
    """The transformer by diffusers' names, from a file of either spelling; `norm_final` is used by nothing."""
    ours: Tensors = {}
    back = {theirs: mine for mine, theirs in _RENAMES.items()}
    for full_name, value in tensors.items():
        name = full_name.removeprefix(PREFIX)
        if name == "norm_final.weight":
            continue
        if not name.endswith(_FUSED):
            ours[name if name.startswith("all_") else _renamed(name, back)] = value
            continue
        width = value.shape[0] // 3
        for index, part in enumerate("qkv"):
            stem = name.removesuffix("qkv.weight")
            ours[f"{stem}to_{part}.weight"] = value.rows(index * width, (index + 1) * width)
    return {TRANSFORMER.folder: ours}


def _renamed(name: str, table: Mapping[str, str]) -> str:
    for one, other in table.items():
        if one in name:
            return name.replace(one, other)
    return name


def _distilled(source: str) -> str | None:
    if "turbo" not in source.lower():
        return None
    return (
        "looks like Z-Image-Turbo, whose few steps without guidance are lost when it is trained on. Train on Z-Image "
        "(Tongyi-MAI/Z-Image), and sample with the LoRA on Turbo."
    )


Z_IMAGE = Family(
    name="z_image",
    title="Z-Image",
    pipeline_class="ZImagePipeline",
    denoiser=TRANSFORMER,
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
    ),
    objective="flow",
    encode_prompt=qwen_prompt_encoder([-2], CHAT),
    predict=predict,
    latent_space=kl_space(16),
    shift=trained_as_flux,  # the technical report says so; the scheduler's 6 is for sampling
    sampler=SamplerSpec("flow", "cfg", size_multiple=16, num_steps=30, cfg=5.0),
    layout=Layout(to_single_file, from_single_file, holds_all=False, lora_for_apps="diffusers"),
    lora_targets=(r"layers\.\d+\.attention\.(to_q|to_k|to_v|to_out\.0)",),
    matches_configs=_matches_configs,
    matches_keys=_matches_keys,
    modelspec_architecture="z-image",
    kohya_base="zimage",
    resolution=lambda prediction_type: 1024,
    refuses=REFUSES,
    distilled=_distilled,
    prompt_version=f"layer -2 of {MAX_TOKENS} tokens of {CHAT}",
)
