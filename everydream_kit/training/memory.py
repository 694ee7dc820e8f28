"""Out of memory: recognising it, and saying what to lower.

The list is ordered by what costs least in quality and speed; only what the present settings leave open is named.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from everydream_kit.errors import MemoryLimitError

if TYPE_CHECKING:
    from everydream_kit.config import TrainConfig

_SIGNS = (
    "out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
)
"""What libraries write where they have no exception of their own for it."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that host or device memory ran out."""
    import torch

    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)


def explain_out_of_memory(error: BaseException, config: TrainConfig) -> MemoryLimitError:
    """The error to raise in its place: one message that lists what to lower, in order.

    Args:
        error: the original error; raise from it.
        config: the run's settings.
    """
    cures = list(_cures(config))
    lines = "\n".join(f"  {number}. {cure}" for number, cure in enumerate(cures, start=1))
    first_line = (str(error) or type(error).__name__).splitlines()[0]
    if not cures:
        lines = "  Everything that could be lowered is: take a device with more memory, or a smaller base model."
    return MemoryLimitError(
        f"The device ran out of memory ({first_line}). Nothing is lost up to the last checkpoint. "
        f"Lower, in this order, and resume:\n{lines}"
    )


def _cures(c: TrainConfig) -> Iterator[str]:
    """What is left to lower, the cheapest first."""
    yield from _cures_that_cost_time(c)
    yield from _cures_that_change_the_result(c)


def _cures_that_cost_time(c: TrainConfig) -> Iterator[str]:
    if not c.amp or c.disable_amp:
        yield "amp: switch it on (disable_amp off); it halves the activations"
    if not c.gradient_checkpointing:
        yield "gradient_checkpointing: switch it on; it saves most of the activations, for a quarter of the speed"
    if isinstance(c.batch_size, int) and c.batch_size > 1:
        half = c.batch_size // 2
        accum = math.ceil(c.batch_size * c.grad_accum / half)
        yield (
            f"batch_size, grad_accum: {half} and {accum} instead of {c.batch_size} and {c.grad_accum}; "
            "the same step in smaller pieces"
        )
    if not c.offload_idle_models:
        yield "offload_idle_models: switch it on; the VAE and frozen text encoders wait in host memory"
    if c.cache_latents == "off":
        yield "cache_latents: auto; the VAE is not needed while training"
    if c.ema_device != "cpu" and (c.ema_decay_rate is not None or c.ema_strength_target is not None):
        yield f"ema_device: cpu instead of {c.ema_device}; it saves a copy of the weights"
    if c.attn_type != "slice":
        yield "attn_type: slice; slower, and less for attention at high resolutions"


def _cures_that_change_the_result(c: TrainConfig) -> Iterator[str]:
    if c.optimizer is not None and "8bit" not in c.optimizer.lower():
        yield f"optimizer: adamw8bit instead of {c.optimizer}; its states take a quarter"
    if not c.fused_backward and c.grad_accum == 1 and c.clip_grad_norm is None:
        yield "fused_backward: switch it on; gradients are never all alive"
    if not c.disable_textenc_training and not c.disable_unet_training and c.training_kind == "full":
        yield "disable_textenc_training: switch it on; it saves the text encoder's gradients and optimizer states"
    if c.weight_dtype == "float32":
        yield "weight_dtype: bfloat16; halves weights and gradients"
    largest = max(c.resolutions)
    if largest > 256:
        yield f"resolution: {largest - 128 if largest > 512 else largest - 64} instead of {largest}"
    if c.training_kind == "full":
        yield "training_kind: lora; gradients and optimizer states for about 1 % of the weights"
