"""Which parameters are trained. Everything else gets requires_grad off.

A frozen parameter with requires_grad left on still gets its gradient computed and kept forever (EveryDream 2 paid for
that in time and memory), so selecting and freezing are one act here. Layers of the text encoder are recognized by name,
so that transformers 4 (`text_model.encoder...`) and 5 (`encoder...`) are alike.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from everydream_kit.config.part_settings import TextEncoderGroup
from everydream_kit.errors import ConfigError

if TYPE_CHECKING:
    import torch

NamedParameter = tuple[str, "torch.nn.Parameter"]

_LAYER = re.compile(r"(?:^|\.)encoder\.layers\.(\d+)\.")


@dataclass
class TrainedPart:
    """A part of the model that is trained with settings of its own.

    Attributes:
        name: "unet" or "text encoder".
        modules: its modules; all text encoders are one part.
        parameters: (name, parameter) of what is trained, in the modules' order. Names of several text encoders begin
            with their number.
    """

    name: str
    modules: list[torch.nn.Module]
    parameters: list[NamedParameter] = field(default_factory=list)

    @property
    def num_parameters(self) -> int:
        """Trained numbers, not tensors."""
        return sum(parameter.numel() for _, parameter in self.parameters)


def select_parameters(
    model: Any,
    *,
    train_unet: bool,
    train_text_encoder: bool,
    freezing: TextEncoderGroup,
    unet_patterns: Sequence[str] | None,
    unet_frozen_patterns: Sequence[str] | None,
) -> list[TrainedPart]:
    """Choose what is trained, and freeze the rest of the UNet, the text encoders and the VAE.

    Args:
        model: has `denoiser`, `vae` and `text_encoders`.
        train_unet, train_text_encoder: False freezes the whole part.
        freezing: says which layers of the text encoders stay.
        unet_patterns: train only UNet parameters in whose name one of these regular expressions is found.
        unet_frozen_patterns: and none in whose name one of these is found.

    Returns:
        The trained parts, UNet first; a part without trained parameters is skipped.

    Raises:
        ConfigError: nothing is left to train, or a pattern is invalid or matches nothing.
    """
    unet_names = [name for name, _ in model.denoiser.named_parameters()]
    trained_names = _match_names(unet_names, unet_patterns, unet_frozen_patterns) if train_unet else set()
    unet = TrainedPart("unet", [model.denoiser], _freeze_except(model.denoiser, trained_names))
    text = TrainedPart("text encoder", list(model.text_encoders))
    for number, text_encoder in enumerate(model.text_encoders):
        names = trained_text_encoder_names(text_encoder, freezing) if train_text_encoder else set()
        kept = _freeze_except(text_encoder, names)
        prefix = f"{number}." if len(model.text_encoders) > 1 else ""
        text.parameters += [(prefix + name, parameter) for name, parameter in kept]
    model.vae.requires_grad_(False)
    parts = [part for part in (unet, text) if part.parameters]
    if not parts:
        raise ConfigError(
            "disable_unet_training, disable_textenc_training, what is frozen: nothing is left to train; "
            "switch one of them off"
        )
    return parts


def trained_text_encoder_names(text_encoder: torch.nn.Module, freezing: TextEncoderGroup) -> set[str]:
    """Names of a text encoder's parameters that are trained under this freezing."""
    names = [name for name, _ in text_encoder.named_parameters()]
    num_layers = 1 + max((int(found[1]) for found in map(_LAYER.search, names) if found), default=-1)
    first_trained = num_layers - num_trained_layers(freezing, num_layers)
    return {name for name in names if not _is_frozen(name, freezing, first_trained)}


def num_trained_layers(freezing: TextEncoderGroup, num_layers: int) -> int:
    """How many of a text encoder's layers are trained, counted from the end."""
    if freezing.text_encoder_freeze_front_n_layers is not None:
        front = freezing.text_encoder_freeze_front_n_layers
        return min(num_layers, max(0, num_layers - front if front >= 0 else -front))
    last = freezing.text_encoder_unfreeze_last_n_layers
    return num_layers if last is None else min(last, num_layers)


def _is_frozen(name: str, freezing: TextEncoderGroup, first_trained: int) -> bool:
    layer = _LAYER.search(name)
    if layer is not None:
        return int(layer[1]) < first_trained
    plain = name.removeprefix("text_model.")
    if plain.startswith("embeddings."):
        return freezing.text_encoder_freeze_embeddings
    return plain.startswith("final_layer_norm.") and freezing.text_encoder_freeze_final_layer_norm


def _freeze_except(module: torch.nn.Module, names: set[str]) -> list[NamedParameter]:
    kept = []
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name in names)
        if name in names:
            kept.append((name, parameter))
        else:
            parameter.grad = None
    return kept


def _match_names(names: Sequence[str], train: Sequence[str] | None, freeze: Sequence[str] | None) -> set[str]:
    chosen = set(names) if train is None else _union(names, train, "unet_train_layers")
    return chosen - _union(names, freeze or (), "unet_freeze_layers")


def _union(names: Sequence[str], patterns: Iterable[str], setting: str) -> set[str]:
    found: set[str] = set()
    for pattern in patterns:
        try:
            matches = [name for name in names if re.search(pattern, name)]
        except re.error as error:
            raise ConfigError(f"{setting}: {pattern!r} is not a regular expression: {error}") from error
        if not matches:
            near = difflib.get_close_matches(pattern, names, n=1, cutoff=0.0)
            raise ConfigError(
                f"{setting}: {pattern!r} is found in no parameter of the denoiser"
                + (f"; one of them is {near[0]}" if near else "")
            )
        found.update(matches)
    return found
