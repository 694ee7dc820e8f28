"""What one pass of a micro-batch reads, apart from weights: drawn and sent before it, so that the pass asks the host nothing.

A pass that was captured on a GPU is replayed on the same memory. Whatever differs from step to step is therefore a tensor here,
and whatever is not a tensor belongs to the shape of the pass.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch

from everydream_kit.models.family import Conditioning, Sizes


@dataclass(slots=True)
class StepInputs:
    """A micro-batch, ready on the device.

    Attributes:
        latents, noise: (B, C, h, w); the target is made of this noise.
        timesteps: (B,).
        loss_scale: (B,) float32, weight of each image.
        loss_divisor: () float32, the same for all steps of an epoch.
        sizes: with `numbers` where the family is told of them, without what belongs to single images.
        input_noise: (B, C, h, w), what is mixed in where it differs from `noise`.
        mask: (B, 1, H/8, W/8).
        conditioning: of frozen text encoders; None: the pass encodes `token_ids`.
        token_ids: (B, windows, 77) for each text encoder.
        text_rows: (B,) what each caption's embeddings are multiplied by.
        text_noise: standard normal, of the hidden states' shape.
    """

    latents: torch.Tensor
    noise: torch.Tensor
    timesteps: torch.Tensor
    loss_scale: torch.Tensor
    loss_divisor: torch.Tensor
    sizes: Sizes
    input_noise: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    conditioning: Conditioning | None = None
    token_ids: tuple[torch.Tensor, ...] = ()
    text_rows: torch.Tensor | None = None
    text_noise: torch.Tensor | None = None

    def shape(self) -> Hashable:
        """What two passes have in common where the same kernels can do both: shapes and formats, and all that is no tensor."""
        return _described(self)

    def tensors(self) -> list[torch.Tensor]:
        """All that differs from step to step, in one order."""
        found: list[torch.Tensor] = []

        def note(tensor: torch.Tensor) -> torch.Tensor:
            found.append(tensor)
            return tensor

        _changed(self, note)
        return found

    def clone(self) -> StepInputs:
        """The same in memory of its own, which further inputs of this shape are copied into."""
        copied: StepInputs = _changed(self, torch.clone)
        return copied

    def take(self, other: StepInputs) -> None:
        """Copy other inputs of the same shape to this memory."""
        for own, new in zip(self.tensors(), other.tensors(), strict=True):
            own.copy_(new)


def _changed(value: Any, change: Callable[[torch.Tensor], Any]) -> Any:
    """The same with each tensor changed, however deep it lies in records and tuples."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{one.name: _changed(getattr(value, one.name), change) for one in fields(value)})
    return tuple(_changed(one, change) for one in value) if isinstance(value, tuple) else value


def _described(value: Any) -> Hashable:
    if isinstance(value, torch.Tensor):
        return tuple(value.shape), value.dtype
    if is_dataclass(value):
        return tuple(_described(getattr(value, one.name)) for one in fields(value))
    return tuple(map(_described, value)) if isinstance(value, tuple) else value
