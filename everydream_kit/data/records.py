"""The records that pass between the rooms of `data`, and from there to the trainer.

An `DatasetImage` is what the scan knows of one file. A `Draw` is one use of an image in one epoch: the address of every
random choice made for it. A `MicroBatch` is a planned batch (addresses only), a `Batch` a loaded one (tensors).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

Size = tuple[int, int]
"""(width, height) in pixels, as PIL says it. Tensors are (batch, channels, height, width)."""


@dataclass(frozen=True, slots=True)
class Draw:
    """One use of one image in one epoch.

    `(epoch, image, repeat)` is unique in a run and is the address of its crop, flip, caption, noise and timestep.
    A `filler` is in where a rank would otherwise have nothing to do: it is loaded, and counts for nothing.
    """

    image: int  # index into the Dataset
    repeat: int  # 0 .. number of uses in this epoch - 1
    filler: bool = False


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Images of one bucket that go through the model together (one rank's share of them)."""

    epoch: int
    step: int  # optimizer step within the epoch, from 0
    index: int  # position within the accumulation window, from 0
    bucket: Size
    draws: tuple[Draw, ...]
    position: int = 0  # images of this step before this batch, over all ranks and micro-batches


@dataclass(slots=True)
class Batch:
    """A micro-batch, loaded. Exactly one of `pixels` and `moments` is set.

    Attributes:
        planned: the addresses that this batch came from; `planned.draws[i]` belongs to row i of everything below.
        captions: what the text encoder reads, after tag shuffling and conditional dropout.
        loss_scale: (B,) float32, weight of each image in the loss; 0 for fillers.
        pixels: (B, 3, H, W) uint8.
        moments: (B, 8, H/8, W/8) mean and log-variance of the VAE's posterior, from the latent cache, unscaled.
        mask: (B, 1, H/8, W/8) float32 in 0..1, or None where no image of the batch has a loss mask.
        original_sizes: (width, height) of each file after EXIF rotation.
        crop_top_lefts: (left, top) pixels cut away at the bucket's scale, of each image (SDXL's conditioning).
        paths: file of each image, for messages.
    """

    planned: MicroBatch
    captions: list[str]
    loss_scale: torch.Tensor
    pixels: torch.Tensor | None
    moments: torch.Tensor | None
    mask: torch.Tensor | None
    original_sizes: list[Size]
    crop_top_lefts: list[tuple[int, int]]
    paths: list[str]


@dataclass(slots=True)
class StepBatches:
    """Everything one optimizer step needs on one rank."""

    epoch: int
    step: int  # within the epoch, from 0
    num_steps: int  # optimizer steps in this epoch
    num_images: int  # images in this step over all ranks, fillers not counted
    loss_divisor: int  # images in the fullest step of this epoch: the same for all its steps
    batches: list[Batch]
    num_empty_after: int = 0  # epochs without an image that follow this one
    encoding_seconds: float = 0.0  # of loading it, what went into latents that will be found from now on
