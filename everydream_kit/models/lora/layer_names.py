"""How LoRA files name a model's layers, from 2023 to 2026, and which parts a layer has.

A tensor's name is a layer and a part (`lora_unet_..._to_q` + `lora_down.weight`). Layers are found by spelling the base's
own layers in every way that a tool writes them, so no name is split by guessing.
"""

from __future__ import annotations

import re

from everydream_kit.models.convert import rename
from everydream_kit.models.family import Config, Family, ModelFiles

Place = tuple[str, str]
"""(component, layer by its diffusers name; text encoders' with `text_model.`)"""

PARTS = {
    "lora_down.weight": "down",
    "lora_up.weight": "up",
    "lora_mid.weight": "mid",
    "lora_A.weight": "down",
    "lora_B.weight": "up",
    "lora_A.default.weight": "down",
    "lora_B.default.weight": "up",
    "lora.down.weight": "down",
    "lora.up.weight": "up",
    "lora_linear_layer.down.weight": "down",
    "lora_linear_layer.up.weight": "up",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
    "lora_magnitude_vector.default.weight": "magnitude",
    "dora_scale": "dora_scale",
    "alpha": "alpha",
    "network_alpha": "alpha",
    **{
        name: name
        for name in (
            *("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
            *("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
        )
    },
    "diff": "diff",
    "diff_b": "bias_diff",
    "w_norm": "diff",
    "b_norm": "bias_diff",
}
"""The end of a tensor's name -> what it is; kohya's, LyCORIS', peft's and diffusers' names."""
_ENDS = sorted(PARTS, key=len, reverse=True)

OTHER_KINDS = {
    r"\.oft_|\.boft_": "OFT",
    r"\.on_input$|\.ia3_": "(IA)³",
    r"\.(a1|a2|b1|b2|bm)\.weight$": "GLoRA",
    r"\.bias_(indices|values|size)$": "LoRA with sparse biases",
    r"\.lora_(up|down|A|B)(\.default)?\.bias$": "LoRA with biases in its layers",
    r"lora_embedding_[AB]": "LoRA of an embedding table",
    r"\.(mag|dora_norm|vera_lambda)|vera_": "VeRA",
    r"^lora_controlnet|controlnet": "ControlNet LoRA",
}
"""What else a file can hold; it is refused by this name."""

_PROCESSOR = re.compile(r"^(.*)\.processor\.(to_q|to_k|to_v|to_out)_lora\.(down|up)\.weight$")
_OLD_TEXT = re.compile(r"^(.*self_attn)\.(to_q|to_k|to_v|to_out)_lora\.(down|up)\.weight$")
_OLD_TEXT_NAMES = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


def split_name(name: str) -> tuple[str, str] | None:
    """A tensor's layer, as the file spells it, and part; None where the part is of no known kind."""
    if found := _PROCESSOR.match(name):  # diffusers 0.14 to 0.21, before layers had adapters of their own
        return f"{found[1]}.{'to_out.0' if found[2] == 'to_out' else found[2]}", found[3]
    if found := _OLD_TEXT.match(name):
        return f"{found[1]}.{_OLD_TEXT_NAMES[found[2]]}", found[3]
    for end in _ENDS:
        if name.endswith("." + end):
            return name[: -len(end) - 1], PARTS[end]
    return None


def kohya_name(component: str, name: str, family: Family, unet_config: Config) -> str:
    """A layer's name in kohya's layout, as it is written."""
    if component == family.denoiser.folder:
        return "lora_unet_" + family.layout.lora_stem(name, unet_config)
    prefix = next(slot.kohya_prefix for slot in family.text_encoders if slot.folder == component)
    return f"{prefix}_{name.replace('.', '_')}"


def spellings(base: ModelFiles) -> dict[str, Place]:
    """Every spelling of every layer of a base, by what LoRA files may call it."""
    table: dict[str, Place] = {}
    denoiser = base.family.denoiser.folder
    single_file = dict(base.family.layout.renames(base.configs[denoiser]))
    for slot in reversed([slot for slot in base.family.text_encoders if slot.kohya_prefix]):
        for key in base.tensors[slot.folder]:
            bare = key.rpartition(".")[0].removeprefix("text_model.")
            is_short = bare.startswith("text_projection") or not slot.class_name.startswith("CLIP")
            long = bare if is_short else f"text_model.{bare}"
            table |= dict.fromkeys(_text_spellings(slot.folder, bare, base.family), (slot.folder, long))
    for key in base.tensors[denoiser]:
        name, theirs = key.rpartition(".")[0], rename(key, single_file).rpartition(".")[0]
        table |= dict.fromkeys(_denoiser_spellings(denoiser, name, theirs), (denoiser, name))
    return table


def is_of_text_encoder(layer: str) -> bool:
    """Whether a layer, as a file spells it, belongs to a text encoder, whatever model the file is for."""
    return re.match(r"(base_model\.model\.)?(lora_te|lycoris_te|text_encoder|te\d|clip_[lg]\.)", layer) is not None


def fused_spellings(base: ModelFiles) -> dict[str, tuple[str, list[str]]]:
    """Every spelling of the single file's layers, with its name and the spellings by diffusers' names of its parts."""
    denoiser = base.family.denoiser.folder
    names = [key.removesuffix(".weight") for key in base.tensors[denoiser] if key.endswith(".weight")]
    table: dict[str, tuple[str, list[str]]] = {}
    for theirs, ours in base.family.layout.app_layers(names).items():
        joined = theirs.replace(".", "_")
        dotted = [f"{prefix}{theirs}" for prefix in ("diffusion_model.", "model.diffusion_model.", "base_model.model.")]
        spelled = [*dotted, theirs, f"lora_unet_{joined}", f"lycoris_{joined}"]
        table |= {spelling: (theirs, [f"{denoiser}.{name}" for name in ours]) for spelling in spelled}
    return table


def _denoiser_spellings(folder: str, name: str, theirs: str) -> list[str]:
    stems = {name, name.removesuffix(".0")} if name.endswith("to_out.0") else {name}
    found = []
    for stem in stems:
        joined = stem.replace(".", "_")
        found += [f"lora_unet_{joined}", f"lycoris_{joined}", f"lora_unet.{stem}", f"{folder}.{stem}", stem]
        found.append(f"lora_{folder}_{joined}")  # OneTrainer's
        found += [f"base_model.model.{stem}", f"{folder}.base_model.model.{stem}", f"base_model.model.{folder}.{stem}"]
    joined = theirs.replace(".", "_")
    return [
        *found,
        f"lora_unet_{joined}",
        f"lycoris_{joined}",
        f"diffusion_model.{theirs}",
        f"model.diffusion_model.{theirs}",
    ]


def _text_spellings(component: str, bare: str, family: Family) -> list[str]:
    index = [slot.folder for slot in family.text_encoders].index(component)
    slot = family.text_encoders[index]
    prefixes = [slot.kohya_prefix, f"lora_te{index + 1}", f"lycoris_te{index + 1}", f"lycoris_{component}"]
    dotted = [*prefixes, component, f"text_encoder_{index + 1}" if len(family.text_encoders) == 1 else component]
    dotted.append("clip_l" if index == 0 else "clip_g")
    found = []
    for stem in (bare, f"text_model.{bare}"):
        found += [f"{prefix}_{stem.replace('.', '_')}" for prefix in prefixes]
        found += [f"{prefix}.{stem}" for prefix in dotted]
        found += [f"{component}.base_model.model.{stem}", f"base_model.model.{component}.{stem}"]
        if len(family.text_encoders) == 1:
            found += [stem, f"base_model.model.{stem}"]
    return found
