"""Building diffusers' and transformers' own modules from a config and lazy tensors.

A module to be loaded is built on the meta device (no memory, no random numbers) and then given its weights, each read,
cast and assigned once. Every name and shape must match: a weight that is missing would otherwise train from noise
without a word, as transformers 4 does with the text encoders that transformers 5 writes.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError

from everydream_kit.errors import ModelError
from everydream_kit.models.family import Config, text_tower
from everydream_kit.models.imports import make_lazy
from everydream_kit.models.part_configs import diffusers_values, text_encoder_values
from everydream_kit.models.tensors import LazyTensor, Tensors

BOOKKEEPING = frozenset({"_class_name", "_diffusers_version", "_name_or_path", "_use_default_values"})
"""Keys of a config that describe the file, not the module."""

ATTENTION = "sdpa"
BUILD_ERRORS = (
    *(TypeError, ValueError, RuntimeError, KeyError, IndexError, AttributeError, ArithmeticError, AssertionError),
    StrictDataclassError,
)
"""What the libraries raise for values that their modules cannot be built from."""

_OLD_VAE_ATTENTION = re.compile(r"(?<=attentions\.0\.)(query|key|value|proj_attn)(?=\.)")
_NEW_VAE_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def build_unet(config: Config, device: str = "meta") -> torch.nn.Module:
    """A UNet, without memory unless another device is named."""
    make_lazy()
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    return _build_diffusers(UNet2DConditionModel, config, device)


def build_vae(config: Config, device: str = "meta") -> torch.nn.Module:
    """A VAE, without memory unless another device is named."""
    make_lazy()
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    return _build_diffusers(AutoencoderKL, config, device)


def build_text_encoder(config: Config, class_name: str, device: str = "meta") -> torch.nn.Module:
    """A text encoder, without memory unless another device is named."""
    make_lazy()
    from transformers.models.clip.configuration_clip import CLIPTextConfig
    from transformers.models.clip.modeling_clip import CLIPTextModel, CLIPTextModelWithProjection

    builders: dict[str, Callable[[Any], torch.nn.Module]] = {
        "CLIPTextModel": CLIPTextModel,
        "CLIPTextModelWithProjection": CLIPTextModelWithProjection,
    }
    architectures = config.get("architectures") or [class_name]
    named = architectures[0] if isinstance(architectures, list) else architectures
    if named not in ("CLIPTextModel", "CLIPTextModelWithProjection", "CLIPModel"):
        raise ModelError(f"text encoder: its config.json names the class {named!r}, which the kit does not know.")
    config_values = text_encoder_values(config)
    try:
        with torch.device(device):
            known = CLIPTextConfig(**config_values)
            known._attn_implementation = ATTENTION  # never the file's: it may name a kernel on the Hub
            return builders[class_name](known)
    except BUILD_ERRORS as error:
        raise ModelError(f"text encoder: its config.json cannot be built ({error}).") from error


def _build_diffusers(cls: Any, config: Config, device: str) -> torch.nn.Module:
    named = config.get("_class_name", cls.__name__)
    if named != cls.__name__:
        raise ModelError(
            f"{cls.__name__}: the config.json names the class {named!r} instead. The kit trains models made of "
            "UNet2DConditionModel, AutoencoderKL and CLIP text encoders."
        )
    try:
        with torch.device(device):
            return cls.from_config(diffusers_values(cls, config))
    except BUILD_ERRORS as error:
        raise ModelError(f"{cls.__name__}: its config.json cannot be built ({error}).") from error


def fill(module: torch.nn.Module, tensors: Tensors, dtype: torch.dtype, where: str) -> torch.nn.Module:
    """Give a module that was built on the meta device its weights.

    Args:
        tensors: by the module's own names, or with a text encoder's `text_model.` prefix put on or left off.
        dtype: floating-point format of the module.
        where: file or folder, for messages.

    Returns:
        The module, in evaluation mode, with its weights in memory.

    Raises:
        ModelError: names or shapes do not match.
    """
    wanted = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    found = _renamed(tensors, wanted)
    missing = sorted(wanted.keys() - found.keys())
    unknown = sorted(found.keys() - wanted.keys())
    if missing or unknown:
        raise ModelError(
            f"{where}: weights do not fit the {type(module).__name__} that its config describes: "
            + "; ".join(
                f"{len(names)} {what}, such as {names[0]}"
                for names, what in ((missing, "missing"), (unknown, "unknown"))
                if names
            )
        )
    wrong = [name for name in wanted if found[name].shape != wanted[name]]
    if wrong:
        name = wrong[0]
        raise ModelError(
            f"{where}: {name} has the shape {found[name].shape}, but the config asks for {wanted[name]}"
            + (f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else "")
        )
    # Copies: a mapped file must be free to change or go while the model trains.
    state = {name: found[name].read().to(dtype=dtype, copy=True).contiguous() for name in wanted}
    module.load_state_dict(state, strict=True, assign=True)
    _fill_position_ids(module)
    left = [name for name, value in (*module.named_parameters(), *module.named_buffers()) if value.is_meta]
    if left:
        raise ModelError(f"{where}: {left[0]} of the {type(module).__name__} has no value in the file.")
    return module.requires_grad_(True).eval()


def _renamed(tensors: Tensors, wanted: dict[str, tuple[int, ...]]) -> Tensors:
    """Older and newer spellings of the same weights, as this module spells them."""
    renamed: dict[str, LazyTensor] = {}
    for name, tensor in tensors.items():
        current = _OLD_VAE_ATTENTION.sub(lambda match: _NEW_VAE_ATTENTION[match[0]], name)
        if current.endswith("position_ids"):
            continue  # counted, not learnt; transformers stopped saving them
        if current not in wanted:
            if current.startswith("text_model.") and current.removeprefix("text_model.") in wanted:
                current = current.removeprefix("text_model.")
            elif f"text_model.{current}" in wanted:
                current = f"text_model.{current}"
        if current in wanted and len(tensor.shape) == 4 and len(wanted[current]) == 2 and tensor.shape[2:] == (1, 1):
            renamed[current] = tensor.reshaped(*tensor.shape[:2])  # a 1 x 1 convolution is a linear layer
        elif current in wanted and len(tensor.shape) == 2 and wanted[current][2:] == (1, 1):
            renamed[current] = (
                tensor.reshaped(*wanted[current][:2], 1, 1) if tensor.shape == wanted[current][:2] else tensor
            )
        else:
            renamed[current] = tensor
    return renamed


def _fill_position_ids(module: torch.nn.Module) -> None:
    """The one buffer that files do not hold."""
    embeddings = getattr(text_tower(module), "embeddings", None)
    if embeddings is not None and getattr(embeddings, "position_ids", None) is not None:
        length = embeddings.position_embedding.weight.shape[0]
        embeddings.position_ids = torch.arange(length).expand((1, -1))
