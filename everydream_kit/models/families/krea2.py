"""Krea 2: a single-stream flow transformer, twelve layers of Qwen3-VL-4B, and Qwen-Image's VAE.

A caption stands in Qwen-Image's template, whose instruction the text encoder sees and the transformer does not. What the
transformer gets of each token are twelve hidden states, which its first blocks fuse. Its text has no positions, and
padding is masked away in all of it, so only tokens of the text are kept, and batches of texts that differ in length have a
mask. The text encoder's half that sees images is loaded, since diffusers' pipeline expects it, and not used.

Its single files hold the transformer alone, in Krea's own names; each block's six modulations are one vector there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from everydream_kit.models.distilled import why_distilled
from everydream_kit.models.family import (
    Conditioning,
    Config,
    Family,
    SamplerSpec,
    Sizes,
    input_dtype,
    join_conditioning,
)
from everydream_kit.models.flow import mu_of, packed, positions, unpacked
from everydream_kit.models.flow_transformers import TransformerNames, flow_family, having, transformer
from everydream_kit.models.latent_spaces import QWEN_IMAGE_VAE, frame_space
from everydream_kit.models.qwen_text import MAX_TOKENS, hidden_states, language_model
from everydream_kit.models.tensors import Tensors

if TYPE_CHECKING:
    from everydream_kit.models.family import Model, ModelFiles, PromptSettings

TRANSFORMER = transformer("transformer_krea2", "Krea2Transformer2DModel", "Krea2TransformerBlock", since="0.39")
TEXT_LAYERS = (2, 5, 8, 11, 14, 17, 20, 23, 26, 29, 32, 35)
"""Hidden states that are stacked for each token, as diffusers' pipeline takes them."""
INSTRUCTION = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    "relationships of the objects and background:<|im_end|>\n<|im_start|>user\n"
)
END = "<|im_end|>\n<|im_start|>assistant\n"
NUM_INSTRUCTION, NUM_END = 34, 5
"""Tokens of the two in Qwen's vocabulary; so many are dropped, and left room for, whatever the vocabulary is."""


def encode_prompt(model: Model, prompts: Sequence[str], settings: PromptSettings) -> Conditioning:
    """Of each token of a prompt and of what follows it, the states of all layers side by side (B, L, 12 D)."""
    tokenizer, text_encoder = model.tokenizers[0], model.text_encoders[0].get_submodule("language_model")
    device = next(text_encoder.parameters()).device
    longest = MAX_TOKENS + NUM_INSTRUCTION - NUM_END
    end = tokenizer(END)["input_ids"]
    rows = []
    for prompt in prompts:
        ids = tokenizer(INSTRUCTION + prompt, truncation=True, max_length=longest)["input_ids"] + end
        states = hidden_states(text_encoder, torch.tensor([ids], device=device), TEXT_LAYERS, len(ids))
        rows.append(Conditioning(torch.cat(states, dim=-1)[:, NUM_INSTRUCTION:]))
    return join_conditioning(rows)


def predict(
    model: Model, noisy_latents: torch.Tensor, timesteps: torch.Tensor, conditioning: Conditioning, sizes: Sizes
) -> torch.Tensor:
    """The velocity (B, 16, h, w) in float32."""
    dtype, device = input_dtype(model.denoiser), noisy_latents.device
    height, width = noisy_latents.shape[2:]
    texts = conditioning.encoder_hidden_states.unflatten(2, (len(TEXT_LAYERS), -1)).to(dtype)
    nowhere = torch.zeros(texts.shape[1], 3, device=device)  # where the text is
    output = model.denoiser(
        hidden_states=packed(noisy_latents).to(dtype),
        encoder_hidden_states=texts,
        timestep=(timesteps / 1000).to(dtype),
        position_ids=torch.cat([nowhere, positions(1, height // 2, width // 2, device=device)]),
        encoder_attention_mask=conditioning.mask(device),
        return_dict=False,
    )[0]
    return unpacked(output.float(), height, width)


DISTILLED_MU = 1.15


def sampling_mu(scheduler_config: Mapping[str, Any], width: int, height: int, num_steps: int) -> float:
    """The logarithm of the shift in sampling: by the image's tokens, or for the distilled model the same at every size."""
    return DISTILLED_MU if scheduler_config.get("is_distilled") else mu_of(scheduler_config, width, height)


_OUTSIDE = {
    "img_in": "first",
    "time_embed.linear_1": "tmlp.0",
    "time_embed.linear_2": "tmlp.2",
    "time_mod_proj": "tproj.1",
    "txt_in.norm.weight": "txtmlp.0.scale",
    "txt_in.linear_1": "txtmlp.1",
    "txt_in.linear_2": "txtmlp.3",
    "text_fusion.projector": "txtfusion.projector",
    "final_layer.linear": "last.linear",
    "final_layer.norm.weight": "last.norm.scale",
    "final_layer.scale_shift_table": "last.modulation.lin",
}
"""diffusers' names, or their starts -> the file's, outside the blocks."""
_INSIDE = {
    "attn.to_q": "attn.wq",
    "attn.to_k": "attn.wk",
    "attn.to_v": "attn.wv",
    "attn.to_out.0": "attn.wo",
    "attn.to_gate": "attn.gate",
    "attn.norm_q.weight": "attn.qknorm.qnorm.scale",
    "attn.norm_k.weight": "attn.qknorm.knorm.scale",
    "ff.gate": "mlp.gate",
    "ff.up": "mlp.up",
    "ff.down": "mlp.down",
    "norm1.weight": "prenorm.scale",
    "norm2.weight": "postnorm.scale",
    "scale_shift_table": "mod.lin",
}
NAMES = TransformerNames(
    _OUTSIDE,
    {
        "transformer_blocks": ("blocks", _INSIDE),
        "text_fusion.layerwise_blocks": ("txtfusion.layerwise_blocks", _INSIDE),
        "text_fusion.refiner_blocks": ("txtfusion.refiner_blocks", _INSIDE),
    },
)
_MODULATION = ".mod.lin"


def to_single_file(files: ModelFiles) -> Tensors:
    """The transformer's weights by the names that image apps know."""
    return {
        name: value.reshaped(value.shape[0] * value.shape[1]) if name.endswith(_MODULATION) else value
        for name, value in NAMES.to_single_file(files).items()
    }


def from_single_file(tensors: Tensors, family: Family, configs: dict[str, Config]) -> dict[str, Tensors]:
    """The transformer by diffusers' names."""
    matrices = {
        name: value.reshaped(6, value.shape[0] // 6) if name.endswith(_MODULATION) else value
        for name, value in tensors.items()
    }
    return NAMES.from_single_file(matrices, family, configs)


KREA2 = flow_family(
    name="krea2",
    title="Krea 2",
    pipeline_class="Krea2Pipeline",
    denoiser=TRANSFORMER,
    vae=QWEN_IMAGE_VAE,
    text_encoders=(language_model("Qwen3VLModel", "Qwen3VLTextDecoderLayer", "qwen3_vl"),),
    encode_prompt=encode_prompt,
    predict=predict,
    latent_space=frame_space(16),
    sampler=SamplerSpec("flow", "cfg", size_multiple=16, num_steps=28, cfgs=(5.5,), mu=sampling_mu),
    layout=replace(NAMES.layout("comfy"), to_single_file=to_single_file, from_single_file=from_single_file),
    lora_targets=(r"transformer_blocks\.\d+\.(attn\.(to_q|to_k|to_v|to_gate|to_out\.0)|ff\.(gate|up|down))",),
    index={"is_distilled": False, "patch_size": 2, "text_encoder_select_layers": list(TEXT_LAYERS)},
    matches_keys=having("txtfusion.projector.weight"),
    modelspec_architecture="krea-2",
    kohya_base="krea2",
    distilled=lambda source: why_distilled(
        source, "krea[-_.]?2.*turbo", "Krea 2 Turbo", "Krea 2 Raw (krea/Krea-2-Raw)", "Turbo"
    ),
    caption_tokens=MAX_TOKENS - NUM_END,
    prompt_version=f"layers {TEXT_LAYERS} of {MAX_TOKENS} tokens of {INSTRUCTION}...{END}",
)
