"""Between the diffusers layout and the single-file layout (LDM, as CompVis and Stability AI publish their models).

Names are derived from the components' configs, so models of any width and depth convert; weights stay lazy and keep
their bits. What the single-file layout holds beyond the diffusers one is filled in so that strict readers find the
published names and shapes:

- `position_ids`, the numbers 0 to 76;
- SD 2.x's last text block, which Stable Diffusion does not use and diffusers drops: written as an identity (its output
  projections are zero), so that even an app that reads the last layer gets the penultimate one;
- OpenCLIP's `logit_scale` (ln 100) and, for SD 2.x, an identity `text_projection`: unused by Stable Diffusion.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING

import torch

from everydream_kit.models.family import Config, Family, TextEncoderSlot
from everydream_kit.models.tensors import LazyTensor, Tensors, concatenated

if TYPE_CHECKING:
    from everydream_kit.models.family import ModelFiles

UNET_PREFIX = "model.diffusion_model."
VAE_PREFIX = "first_stage_model."
CLIP_VOCABULARY = 49408

VAE_TRAINING_ONLY = ("loss.", "model_ema.")
"""What a VAE's own training left in the file: its discriminator and averages."""
OLD_VAE_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""diffusers' names before 0.15, and after."""

Rename = tuple[str, str]
"""(diffusers prefix, single-file prefix); both end where a module's name ends."""

_LOGIT_SCALE = math.log(100)
_ATTENTION_MATRIX = re.compile(r"mid_block\.attentions\.0\.(to_q|to_k|to_v|to_out\.0)\.weight$")


def to_single_file(files: ModelFiles) -> Tensors:
    """All weights of a model by their single-file names. Learned tokens beyond CLIP's vocabulary stay out: UIs take
    them as embedding files."""
    renamed = {
        UNET_PREFIX + name: value
        for name, value in _forward(files.tensors["unet"], unet_renames(files.configs["unet"]))
    }
    for name, value in _forward(files.tensors["vae"], vae_renames(files.configs["vae"])):
        renamed[VAE_PREFIX + name] = value
    for slot in files.family.text_encoders:
        tensors = _with_prefix(files.tensors[slot.folder])
        export = _text_to_hf if slot.single_file_layout == "hf" else _text_to_openclip
        for name, value in export(tensors, slot).items():
            renamed[slot.single_file_prefix + name] = value
    return renamed


def from_single_file(tensors: Tensors, family: Family, configs: dict[str, Config]) -> dict[str, Tensors]:
    """A single file's weights by component and diffusers' names. What is not part of the model (EMA, schedules) is
    skipped."""
    parts: dict[str, Tensors] = {
        "unet": dict(_backward(_under(tensors, UNET_PREFIX), unet_renames(configs["unet"]))),
        "vae": vae_from_single_file(_under(tensors, VAE_PREFIX), configs["vae"]),
    }
    for slot in family.text_encoders:
        own = _under(tensors, slot.single_file_prefix)
        if slot.single_file_layout == "hf":
            parts[slot.folder] = _text_from_hf(own, slot)
        else:
            parts[slot.folder] = _text_from_openclip(own, slot, configs[slot.folder]["num_hidden_layers"])
    return parts


def vae_from_single_file(tensors: Tensors, config: Config) -> Tensors:
    """A VAE by diffusers' names. Its attention is spelled `q` or `to_q`, and is a matrix or a 1 x 1 convolution:
    diffusers' conversion script of 0.17 and later, which EveryDream 2 uses, writes the second name and the matrix."""
    pairs = vae_renames(config)
    for half in ("encoder", "decoder"):
        ours, theirs = f"{half}.mid_block.attentions.0", f"{half}.mid.attn_1"
        pairs += [(f"{ours}.{name}", f"{theirs}.{name}") for name in ("to_q", "to_k", "to_v", "to_out.0", "group_norm")]
        pairs += [(f"{ours}.{new}", f"{theirs}.{old}") for old, new in OLD_VAE_ATTENTION.items()]
    known = {name: value for name, value in tensors.items() if not name.startswith(VAE_TRAINING_ONLY)}
    return {
        name: value.reshaped(*value.shape[:2]) if _is_conv_matrix(name, value) else value
        for name, value in _backward(known, pairs)
    }


def unet_renames(config: Config) -> list[Rename]:
    """Names of a UNet's modules in both layouts, the single file's without `model.diffusion_model.`."""
    pairs: list[Rename] = [
        ("time_embedding.linear_1", "time_embed.0"),
        ("time_embedding.linear_2", "time_embed.2"),
        ("add_embedding.linear_1", "label_emb.0.0"),
        ("add_embedding.linear_2", "label_emb.0.2"),
        ("conv_in", "input_blocks.0.0"),
        ("conv_norm_out", "out.0"),
        ("conv_out", "out.2"),
        *_unet_resnet("mid_block.resnets.0", "middle_block.0"),
        ("mid_block.attentions.0", "middle_block.1"),
        *_unet_resnet("mid_block.resnets.1", "middle_block.2"),
    ]
    down_types, up_types = config["down_block_types"], config["up_block_types"]
    num_layers = config["layers_per_block"]
    last = len(down_types) - 1
    number = 1
    for block, kind in enumerate(down_types):
        for layer in range(num_layers):
            pairs += _unet_resnet(f"down_blocks.{block}.resnets.{layer}", f"input_blocks.{number}.0")
            if "CrossAttn" in kind:
                pairs.append((f"down_blocks.{block}.attentions.{layer}", f"input_blocks.{number}.1"))
            number += 1
        if block < last:
            pairs.append((f"down_blocks.{block}.downsamplers.0.conv", f"input_blocks.{number}.0.op"))
            number += 1
    number = 0
    for block, kind in enumerate(up_types):
        has_attention = "CrossAttn" in kind
        for layer in range(num_layers + 1):
            pairs += _unet_resnet(f"up_blocks.{block}.resnets.{layer}", f"output_blocks.{number}.0")
            if has_attention:
                pairs.append((f"up_blocks.{block}.attentions.{layer}", f"output_blocks.{number}.1"))
            if layer == num_layers and block < last:
                place = f"output_blocks.{number}.{2 if has_attention else 1}.conv"
                pairs.append((f"up_blocks.{block}.upsamplers.0.conv", place))
            number += 1
    return pairs


def _unet_resnet(ours: str, theirs: str) -> list[Rename]:
    names = {
        "norm1": "in_layers.0",
        "conv1": "in_layers.2",
        "time_emb_proj": "emb_layers.1",
        "norm2": "out_layers.0",
        "conv2": "out_layers.3",
        "conv_shortcut": "skip_connection",
    }
    return [(f"{ours}.{mine}", f"{theirs}.{other}") for mine, other in names.items()]


def vae_renames(config: Config) -> list[Rename]:
    """Names of a VAE's modules in both layouts, the single file's without `first_stage_model.`."""
    pairs: list[Rename] = [("quant_conv", "quant_conv"), ("post_quant_conv", "post_quant_conv")]
    num_blocks = len(config["block_out_channels"])
    num_layers = config["layers_per_block"]
    for half in ("encoder", "decoder"):
        pairs += [(f"{half}.conv_in", f"{half}.conv_in"), (f"{half}.conv_out", f"{half}.conv_out")]
        pairs.append((f"{half}.conv_norm_out", f"{half}.norm_out"))
        for layer in range(2):
            pairs += _vae_resnet(f"{half}.mid_block.resnets.{layer}", f"{half}.mid.block_{layer + 1}")
        attention = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
        pairs += [(f"{half}.mid_block.attentions.0.{a}", f"{half}.mid.attn_1.{b}") for a, b in attention.items()]
    for block in range(num_blocks):
        for layer in range(num_layers):
            pairs += _vae_resnet(f"encoder.down_blocks.{block}.resnets.{layer}", f"encoder.down.{block}.block.{layer}")
        pairs.append((f"encoder.down_blocks.{block}.downsamplers.0.conv", f"encoder.down.{block}.downsample.conv"))
        mirrored = num_blocks - 1 - block  # the single file counts the decoder's blocks from the image's side
        for layer in range(num_layers + 1):
            pairs += _vae_resnet(f"decoder.up_blocks.{block}.resnets.{layer}", f"decoder.up.{mirrored}.block.{layer}")
        pairs.append((f"decoder.up_blocks.{block}.upsamplers.0.conv", f"decoder.up.{mirrored}.upsample.conv"))
    return pairs


def _vae_resnet(ours: str, theirs: str) -> list[Rename]:
    names = {"norm1": "norm1", "conv1": "conv1", "norm2": "norm2", "conv2": "conv2", "conv_shortcut": "nin_shortcut"}
    return [(f"{ours}.{mine}", f"{theirs}.{other}") for mine, other in names.items()]


def _forward(tensors: Tensors, renames: list[Rename]) -> Iterable[tuple[str, LazyTensor]]:
    table = dict(renames)
    for name, value in tensors.items():
        if _ATTENTION_MATRIX.search(name) and len(value.shape) == 2:
            yield rename(name, table), value.reshaped(*value.shape, 1, 1)
        else:
            yield rename(name, table), value


def _backward(tensors: Tensors, renames: list[Rename]) -> Iterable[tuple[str, LazyTensor]]:
    table = {theirs: ours for ours, theirs in renames}
    for name, value in tensors.items():
        yield rename(name, table), value


def rename(name: str, table: Mapping[str, str]) -> str:
    """Replace the longest known start of a name; an unknown name stays, and the reader complains about it."""
    start = known_start(name, table)
    return table[start] + name.removeprefix(start) if start else name


def known_start(name: str, known: Collection[str]) -> str:
    """The name, if it is known, or the longest known start of it that ends at a dot; "" where none is."""
    while name and name not in known:
        name = name.rpartition(".")[0]
    return name


def single_file_stem(layer: str, unet_config: Config) -> str:
    """A UNet layer's name in the single-file layout, joined as kohya's files join it."""
    return rename(layer + ".weight", dict(unet_renames(unet_config))).removesuffix(".weight").replace(".", "_")


def _under(tensors: Tensors, prefix: str) -> Tensors:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _is_conv_matrix(name: str, value: LazyTensor) -> bool:
    """Whether a matrix is written as a 1 x 1 convolution."""
    return bool(_ATTENTION_MATRIX.search(name)) and len(value.shape) == 4


def _with_prefix(tensors: Tensors) -> Tensors:
    """A text encoder's weights with `text_model.`, which transformers 5 leaves off; cut to CLIP's own vocabulary."""
    prefixed = {}
    for name, value in tensors.items():
        if name.endswith("position_ids"):
            continue
        bare = name.startswith(("text_model.", "text_projection."))
        cut = name.endswith("token_embedding.weight") and value.shape[0] > CLIP_VOCABULARY
        prefixed[name if bare else f"text_model.{name}"] = value.rows(0, CLIP_VOCABULARY) if cut else value
    return prefixed


def _text_to_hf(tensors: Tensors, slot: TextEncoderSlot) -> Tensors:
    length = tensors["text_model.embeddings.position_embedding.weight"].shape[0]
    positions = torch.arange(length).expand((1, -1))
    return {**tensors, "text_model.embeddings.position_ids": LazyTensor.of(positions)}


def _text_from_hf(tensors: Tensors, slot: TextEncoderSlot) -> Tensors:
    return _with_prefix({name: value for name, value in tensors.items() if not name.startswith(slot.unused)})


_OPENCLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


def _text_to_openclip(tensors: Tensors, slot: TextEncoderSlot) -> Tensors:
    width = tensors["text_model.final_layer_norm.weight"].shape[0]
    num_layers = _num_layers(tensors, r"text_model\.encoder\.layers\.(\d+)\.")
    renamed = {
        "token_embedding.weight": tensors["text_model.embeddings.token_embedding.weight"],
        "positional_embedding": tensors["text_model.embeddings.position_embedding.weight"],
        "ln_final.weight": tensors["text_model.final_layer_norm.weight"],
        "ln_final.bias": tensors["text_model.final_layer_norm.bias"],
        "logit_scale": _made(torch.tensor(_LOGIT_SCALE), tensors),
    }
    projection = tensors.get("text_projection.weight")
    renamed["text_projection"] = projection.transposed() if projection else _made(torch.eye(width), tensors)
    for layer in range(num_layers):
        ours, theirs = f"text_model.encoder.layers.{layer}", f"transformer.resblocks.{layer}"
        for leaf in ("weight", "bias"):
            for mine, other in _OPENCLIP_LAYER.items():
                renamed[f"{theirs}.{other}.{leaf}"] = tensors[f"{ours}.{mine}.{leaf}"]
            qkv = [tensors[f"{ours}.self_attn.{part}_proj.{leaf}"] for part in "qkv"]
            renamed[f"{theirs}.attn.in_proj_{leaf}"] = concatenated(qkv)
    if slot.drops_last_block:
        model = f"transformer.resblocks.{num_layers - 1}."
        for name in [name for name in renamed if name.startswith(model)]:
            copy = name.replace(model, f"transformer.resblocks.{num_layers}.")
            fill = torch.ones if ".ln_" in name and name.endswith("weight") else torch.zeros
            renamed[copy] = _made(fill(renamed[name].shape), tensors)
    return renamed


def _made(value: torch.Tensor, like: Tensors) -> LazyTensor:
    """A tensor that the diffusers layout does not hold, in the format of those that it does."""
    dtype = like["text_model.final_layer_norm.weight"].dtype
    return LazyTensor.of(value.to(dtype))


def _text_from_openclip(tensors: Tensors, slot: TextEncoderSlot, num_layers: int) -> Tensors:
    """The blocks that the model uses. Some files hold one more (SD 2.x), which nothing reads."""
    fixed = {
        "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
        "positional_embedding": "text_model.embeddings.position_embedding.weight",
        "ln_final.weight": "text_model.final_layer_norm.weight",
        "ln_final.bias": "text_model.final_layer_norm.bias",
    }
    parts = {ours: tensors[theirs] for theirs, ours in fixed.items() if theirs in tensors}
    if slot.class_name == "CLIPTextModelWithProjection" and "text_projection" in tensors:
        parts["text_projection.weight"] = tensors["text_projection"].transposed()
    back = {theirs: ours for ours, theirs in _OPENCLIP_LAYER.items()}
    for name, value in tensors.items():
        found = re.match(r"transformer\.resblocks\.(\d+)\.(.+?)[._](weight|bias)$", name)
        if found is None or int(found[1]) >= num_layers:
            continue
        layer = f"text_model.encoder.layers.{found[1]}"
        if found[2] == "attn.in_proj":
            width = value.shape[0] // 3
            for index, part in enumerate("qkv"):
                rows = value.rows(index * width, (index + 1) * width)
                parts[f"{layer}.self_attn.{part}_proj.{found[3]}"] = rows
        else:
            parts[f"{layer}.{back.get(found[2], found[2])}.{found[3]}"] = value
    return parts


def num_text_blocks(tensors: Tensors, slot: TextEncoderSlot) -> int:
    """How many text blocks a single file holds for one of its text encoders."""
    return _num_layers(
        _under(tensors, slot.single_file_prefix),
        r"(?:text_model\.encoder\.layers|encoder\.layers|transformer\.resblocks)\.(\d+)\.",
    )


def _num_layers(tensors: Tensors, pattern: str) -> int:
    numbers = [int(found[1]) for name in tensors if (found := re.match(pattern, name))]
    return max(numbers, default=-1) + 1
