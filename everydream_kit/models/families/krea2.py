"""Krea 2: a single-stream flow transformer, twelve layers of Qwen3-VL-4B, and Qwen-Image's VAE.

A caption stands in Qwen-Image's template, whose instruction the text encoder sees and the transformer does not. What the
transformer gets of each token are twelve hidden states, which its first blocks fuse. Its text has no positions, and
padding is masked away in all of it, so only tokens of the text are kept, and batches of texts that differ in length have a
mask. The text encoder's half that sees images is loaded, since diffusers' pipeline expects it, and not used.

Its single files hold the transformer alone, in Krea's own names; each block's six modulations are one vector there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
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
)
from everydream_kit.models.flow import REFUSES, mu_of, says_distilled, shift_of
from everydream_kit.models.latent_spaces import QWEN_IMAGE_VAE, frame_space
from everydream_kit.models.qwen_text import MAX_TOKENS, hidden_states
from everydream_kit.models.tensors import Tensors

if TYPE_CHECKING:
    from everydream_kit.models.family import Model, ModelFiles, PromptSettings

TRANSFORMER = Component(
    "transformer",
    "diffusers.models.transformers.transformer_krea2",
    "Krea2Transformer2DModel",
    "denoiser",
    frozenset({"full", "lora"}),
    ("Krea2TransformerBlock",),
    since="0.39",
)
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
    squares = torch.nn.functional.pixel_unshuffle(noisy_latents, 2)  # (B, 64, h/2, w/2)
    rows, columns = squares.shape[2:]
    texts = conditioning.encoder_hidden_states.unflatten(2, (len(TEXT_LAYERS), -1)).to(dtype)
    output = model.denoiser(
        hidden_states=squares.flatten(2).transpose(1, 2).to(dtype),
        encoder_hidden_states=texts,
        timestep=(timesteps / 1000).to(dtype),
        position_ids=_positions(texts.shape[1], rows, columns, device),
        encoder_attention_mask=_mask(conditioning, device),
        return_dict=False,
    )[0]
    velocity = output.float().transpose(1, 2).unflatten(2, (rows, columns))
    return torch.nn.functional.pixel_shuffle(velocity, 2)


def _positions(length: int, rows: int, columns: int, device: torch.device) -> torch.Tensor:
    """(length + rows columns, 3): zeros for the text, then time, row and column of each square of the image."""
    axes = [torch.arange(size, device=device, dtype=torch.float32) for size in (1, rows, columns)]
    return torch.cat([torch.zeros(length, 3, device=device), torch.cartesian_prod(*axes)])


def _mask(conditioning: Conditioning, device: torch.device) -> torch.Tensor | None:
    """(B, L) of which tokens are text; None where all are."""
    if conditioning.lengths is None:
        return None
    places = torch.arange(conditioning.encoder_hidden_states.shape[1], device=device)
    return torch.stack([places < length for length in conditioning.lengths])


DISTILLED_MU = 1.15


def sampling_mu(scheduler_config: Mapping[str, Any], width: int, height: int, num_steps: int) -> float:
    """The logarithm of the shift in sampling: by the image's tokens, or for the distilled model the same at every size."""
    return DISTILLED_MU if scheduler_config.get("is_distilled") else mu_of(scheduler_config, width, height)


def _matches_configs(configs: Mapping[str, Config]) -> bool:
    return configs["transformer"].get("_class_name") == TRANSFORMER.class_name


def _matches_keys(shapes: Shapes) -> bool:
    return "txtfusion.projector.weight" in {name.removeprefix(PREFIX) for name in shapes}


PREFIX = "model.diffusion_model."
"""Before the names in files that were cut out of whole checkpoints."""
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
_BLOCKS = {"transformer_blocks": "blocks", "text_fusion": "txtfusion"}
_OUR_BLOCK = re.compile(r"^(transformer_blocks|text_fusion)((?:\.\w+_blocks)?\.\d+)\.(.+)$")
_THEIR_BLOCK = re.compile(r"^(blocks|txtfusion)((?:\.\w+_blocks)?\.\d+)\.(.+)$")
_MODULATION = ".mod.lin"


def _renamed(name: str, block: re.Pattern[str], tables: Sequence[Mapping[str, str]]) -> str:
    """A name by the tables of blocks, of what is in them, and of the rest."""
    blocks, inside, outside = tables
    found = block.match(name)
    if found is None:
        return _whole_or_start(name, outside)
    return f"{blocks[found[1]]}{found[2]}.{_whole_or_start(found[3], inside)}"


def _whole_or_start(name: str, table: Mapping[str, str]) -> str:
    return table[name] if name in table else rename(name, dict(table))


def _theirs(name: str) -> str:
    return _renamed(name, _OUR_BLOCK, (_BLOCKS, _INSIDE, _OUTSIDE))


def _ours(name: str) -> str:
    back = [{theirs: ours for ours, theirs in table.items()} for table in (_BLOCKS, _INSIDE, _OUTSIDE)]
    return _renamed(name, _THEIR_BLOCK, back)


def to_single_file(files: ModelFiles) -> Tensors:
    """The transformer's weights by the names that image apps know."""
    theirs = {_theirs(name): value for name, value in files.tensors[TRANSFORMER.folder].items()}
    return {
        name: value.reshaped(value.shape[0] * value.shape[1]) if name.endswith(_MODULATION) else value
        for name, value in theirs.items()
    }


def from_single_file(tensors: Tensors, family: Family, configs: dict[str, Config]) -> dict[str, Tensors]:
    """The transformer by diffusers' names."""
    bare = {name.removeprefix(PREFIX): value for name, value in tensors.items()}
    ours = {
        _ours(name): value.reshaped(6, value.shape[0] // 6) if name.endswith(_MODULATION) else value
        for name, value in bare.items()
    }
    return {TRANSFORMER.folder: ours}


def app_layers(names: Sequence[str]) -> dict[str, list[str]]:
    """diffusers' layers by the names that image apps know; each is one of theirs."""
    return {_theirs(f"{name}.weight").removesuffix(".weight"): [name] for name in names}


_DISTILLED_NAME = re.compile(r"krea[-_.]?2.*turbo", re.IGNORECASE)


def _distilled(source: str) -> str | None:
    if not says_distilled(source) and not _DISTILLED_NAME.search(source):
        return None
    return (
        "looks like Krea 2 Turbo, whose few steps without guidance are lost when it is trained on. Train on Krea 2 Raw "
        "(krea/Krea-2-Raw), and sample with the LoRA on Turbo."
    )


KREA2 = Family(
    name="krea2",
    title="Krea 2",
    pipeline_class="Krea2Pipeline",
    denoiser=TRANSFORMER,
    vae=QWEN_IMAGE_VAE,
    text_encoders=(
        TextEncoderSlot(
            "text_encoder",
            "tokenizer",
            "Qwen3VLModel",
            trains=frozenset(),
            blocks=("Qwen3VLTextDecoderLayer",),
            module="transformers.models.qwen3_vl.modeling_qwen3_vl",
            tokenizer_class="Qwen2Tokenizer",
        ),
    ),
    objective="flow",
    encode_prompt=encode_prompt,
    predict=predict,
    latent_space=frame_space(16),
    shift=shift_of,
    sampler=SamplerSpec("flow", "cfg", size_multiple=16, num_steps=28, cfg=5.5, mu=sampling_mu),
    layout=Layout(to_single_file, from_single_file, holds_all=False, lora_for_apps="comfy", app_layers=app_layers),
    lora_targets=(r"transformer_blocks\.\d+\.(attn\.(to_q|to_k|to_v|to_gate|to_out\.0)|ff\.(gate|up|down))",),
    index={"is_distilled": False, "patch_size": 2, "text_encoder_select_layers": list(TEXT_LAYERS)},
    matches_configs=_matches_configs,
    matches_keys=_matches_keys,
    modelspec_architecture="krea-2",
    kohya_base="krea2",
    resolution=lambda prediction_type: 1024,
    refuses=REFUSES,
    distilled=_distilled,
    prompt_version=f"layers {TEXT_LAYERS} of {MAX_TOKENS} tokens of {INSTRUCTION}...{END}",
)
