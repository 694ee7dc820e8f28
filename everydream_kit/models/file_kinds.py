"""What a weight file is, by the names in it: used to name a file that is not a Stable Diffusion checkpoint, and to
complete one that is.

Scaled fp8 weights (ComfyUI's `scaled_fp8`) become ordinary numbers here, and a VAE that lies next to a checkpoint
without one is found.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path

import torch

from everydream_kit.errors import ModelError
from everydream_kit.models.convert import UNET_PREFIX, VAE_PREFIX
from everydream_kit.models.model_files import refuse_unsupported
from everydream_kit.models.tensors import LazyTensor, Tensors
from everydream_kit.models.weight_files import WEIGHT_SUFFIXES, open_weights

logger = logging.getLogger(__name__)

LORA_NAME = re.compile(
    r"(^|[._])lora[._]|_lora\.|\.lora_|\.hada_[wt]|\.lokr_[wt]|^lycoris_|\.oft_|\.dora_scale$|\.(a1|b1)\.weight$"
)
"""A tensor of a LoRA file of any kind."""
_SCALES = (".scale_weight", ".scale_input", ".weight_scale", ".input_scale")

FIRST_WEIGHT = UNET_PREFIX + "input_blocks.0.0.weight"
"""Of every Stable Diffusion checkpoint."""
_PARTS = {
    "a UNet": re.compile(r"^((model\.)?diffusion_model\.)?input_blocks\."),
    "a VAE": re.compile(rf"^(encoder|decoder|{re.escape(VAE_PREFIX[:-1])})\."),
    "a text encoder": re.compile(r"^(text_model|transformer\.resblocks|cond_stage_model|conditioner)\."),
}
"""The parts of a model by the names of their tensors."""


_KINDS = {
    "a LoRA, not a model: give it together with its base model (`everydream merge BASE LORA OUT`)": LORA_NAME,
    "a ControlNet, not a model": re.compile(r"(^|\.)(control_model|zero_convs|controlnet_)"),
    "an IP-Adapter, not a model": re.compile(r"^(ip_adapter|image_proj)\."),
    "an SD 3, Flux or later model, which this version cannot train": re.compile(
        r"(joint|double|single)_(transformer_)?blocks\.|^(model\.diffusion_model\.)?layers\."
    ),
    **_PARTS,
    "one part of a diffusers model: give the folder that holds model_index.json": re.compile(r"down_blocks\."),
    "a textual-inversion embedding, not a model": re.compile(r"^(emb_params|clip_l|clip_g)$|^string_to_param"),
}
"""Kinds of files by the names of their tensors; the first that fits is said."""


def refuse_other_kinds(path: Path, tensors: Tensors) -> None:
    """Name a file that is not a Stable Diffusion model for training.

    Raises:
        ModelError: with the kind of file.
    """
    if not tensors:
        raise ModelError(f"{path}: holds no weights at all.")
    if FIRST_WEIGHT in tensors:
        shape = tensors[FIRST_WEIGHT].shape
        refuse_unsupported(str(path), {"unet": {"in_channels": shape[1] if len(shape) > 1 else 0}}, {})
        if any(name.startswith("conditioner.embedders.0.model.") for name in tensors):
            raise ModelError(
                f"{path}: this is an SDXL refiner, which this version cannot train. Take the SDXL base model."
            )
        return
    for kind, pattern in _KINDS.items():
        if any(map(pattern.search, tensors)):
            raise ModelError(f"{path}: {say_parts(tensors) if kind in _PARTS else f'this is {kind}'}.")
    raise ModelError(f"{path}: not a Stable Diffusion model; its first tensor is named {next(iter(tensors))!r}.")


def held_parts(tensors: Tensors) -> list[str]:
    """Which parts of a model a file holds: a UNet, a VAE, a text encoder."""
    return [part for part, pattern in _PARTS.items() if any(map(pattern.search, tensors))]


def say_parts(tensors: Tensors) -> str:
    """What a file holds and what it lacks, for a message about one that is not a full model."""
    held = held_parts(tensors)
    missing = " and ".join(f"no {part.removeprefix('a ')}" for part in _PARTS if part not in held)
    return (f"{held[0]} alone, with " if len(held) == 1 else f"holds {' and '.join(held)}, but ") + (
        f"{missing}. Take the full checkpoint"
    )


def without_wrapper(tensors: Tensors) -> Tensors:
    """A checkpoint's tensors without a prefix that a trainer's wrapper put before its names, such as `module.`."""
    wrapped = "." + FIRST_WEIGHT
    found = None if FIRST_WEIGHT in tensors else next((name for name in tensors if name.endswith(wrapped)), None)
    if found is None:
        return tensors
    prefix = found.removesuffix(FIRST_WEIGHT)
    own = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    return {**{name: value for name, value in tensors.items() if not name.startswith(prefix)}, **own}


def without_scales(tensors: Tensors) -> Tensors:
    """Weights with ComfyUI's fp8 scales multiplied in; without scales, the same tensors."""
    kept: Tensors = {}
    for name, tensor in tensors.items():
        if name.endswith(_SCALES) or name.rpartition(".")[2] == "scaled_fp8":
            continue
        stem = name.removesuffix(".weight")
        scale = tensors.get(f"{stem}.scale_weight") or tensors.get(f"{stem}.weight_scale")
        kept[name] = tensor if scale is None or stem == name else _scaled(tensor, scale)
    return kept


def _scaled(tensor: LazyTensor, scale: LazyTensor) -> LazyTensor:
    def read() -> torch.Tensor:
        factor = scale.read().float()  # one number, or one for each row
        return tensor.read().float() * factor.reshape(-1, *[1] * (len(tensor.shape) - 1))

    return LazyTensor(tensor.shape, torch.float32, read)


def with_vae(path: Path, tensors: Tensors) -> Tensors:
    """A checkpoint with the VAE of its own, or the one that lies next to it as `NAME.vae.safetensors` (or `.pt`).

    Raises:
        ModelError: there is none.
    """
    if any(name.startswith(VAE_PREFIX + "decoder.") for name in tensors):
        return tensors
    for suffix in WEIGHT_SUFFIXES:
        near = path.with_name(f"{path.stem}.vae{suffix}")
        if near.is_file():
            logger.info("%s holds no VAE; the one in %s is used.", path, near.name)
            own = {name.removeprefix(VAE_PREFIX): value for name, value in open_weights(near)[0].items()}
            return {**tensors, **{VAE_PREFIX + name: value for name, value in own.items()}}
    raise ModelError(
        f"{path}: holds no VAE. Give its VAE, or the one of its family's base model, with --vae PATH (in Python: vae), put "
        f"it next to the file as {path.stem}.vae.safetensors, or take the full checkpoint."
    )
