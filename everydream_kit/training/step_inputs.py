"""What one pass of a micro-batch reads, apart from weights: drawn and sent before it, so that it needs nothing from the host.

A pass that was captured on a GPU is replayed on the same memory. Whatever differs from step to step is therefore a tensor here,
and whatever is not a tensor belongs to the shape of the pass.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import torch

from everydream_kit.models.captures import changed, described, tensors_in
from everydream_kit.models.family import Conditioning, Sizes


@dataclass(slots=True)
class StepInputs:
    """A micro-batch, ready on the device.

    Attributes:
        latents, noise: (B, C, h, w); the target is made of this noise.
        timesteps: (B,).
        loss_scale: (B,) float32, weight of each image.
        loss_divisor: () float32, the same for all steps of an epoch.
        sizes: with `numbers` where the family is conditioned on them, without what belongs to single images.
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
        return described(self)

    def tensors(self) -> list[torch.Tensor]:
        """All that differs from step to step, in one order."""
        return tensors_in(self)

    def clone(self) -> StepInputs:
        """The same in memory of its own, which further inputs of this shape are copied into."""
        copied: StepInputs = changed(self, torch.clone)
        return copied

    def take(self, other: StepInputs) -> None:
        """Copy other inputs of the same shape to this memory."""
        for own, new in zip(self.tensors(), other.tensors(), strict=True):
            own.copy_(new)
