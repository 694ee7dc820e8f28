"""Out of memory: recognizing it, and what can be lowered, the cheapest first.

`measures_left` is the one list: what a run that ran out of memory advises in words, and what the pre-flight tries out
before anything is spent. It is ordered by what each measure costs in speed, and what changes the result comes after all
that does not; only what the present settings leave open is named.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import psutil

from everydream_kit.config import facts
from everydream_kit.errors import MemoryLimitError

if TYPE_CHECKING:
    import torch

    from everydream_kit.config import TrainConfig

_SIGNS = (
    "out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
)
"""What libraries write where they have no exception of their own for it."""


def memory_in_use(device: torch.device) -> int:
    """Bytes of device memory in use at its peak on a GPU, of the process's memory on a CPU."""
    import torch

    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return int(psutil.Process().memory_info().rss)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that host or device memory ran out."""
    import torch

    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)


@dataclass(frozen=True)
class Measure:
    """One thing that can be lowered.

    Attributes:
        name: the setting, or the settings, by name.
        changes: settings as they would be.
        why: what it does, in words.
        costs: `nothing` worth mentioning, `time`, or the `result`: what is learned, or how large.
        is_estimated: a rehearsal on paper shows its effect.
    """

    name: str
    changes: dict[str, Any]
    why: str
    costs: Literal["nothing", "time", "result"]
    is_estimated: bool = True

    def __str__(self) -> str:
        return f"{self.name}: {self.why}"


def explain_out_of_memory(error: BaseException, config: TrainConfig, family: str | None = None) -> MemoryLimitError:
    """The error to raise in its place: one message that lists what to lower, in order.

    Args:
        error: the original error; raise from it.
        config: the run's settings.
        family: the model's, by name, where it is known.
    """
    cures = list(measures_left(config, family))
    lines = "\n".join(f"  {number}. {cure}" for number, cure in enumerate(cures, start=1))
    first_line = (str(error) or type(error).__name__).splitlines()[0]
    if not cures:
        lines = "  Everything that could be lowered is: take a device with more memory, or a smaller base model."
    return MemoryLimitError(
        f"The device ran out of memory ({first_line}). Nothing is lost up to the last checkpoint. "
        f"Lower, in this order, and resume:\n{lines}"
    )


def measures_left(c: TrainConfig, family: str | None = None) -> Iterator[Measure]:
    """Measures that these settings have not taken yet, the cheapest in speed first, and those that change the result last.

    Args:
        family: the model's, by name: what means nothing for it is not offered. None: not known.
    """
    found = (*_measures_for_nothing(c), *_measures_that_cost_time(c), *_measures_that_change_the_result(c, family))
    yield from (
        measure
        for measure in found
        if (c.parallel != "fsdp2" or _works_sharded(measure)) and _is_for(family, measure.changes)
    )


def _is_for(family: str | None, names: Iterable[str]) -> bool:
    return family is None or all(family in facts()[name].families for name in names)


def _works_sharded(measure: Measure) -> bool:
    allowed = {name: facts()[name].fsdp2 for name in measure.changes}
    return all(values is None or measure.changes[name] in values for name, values in allowed.items())


def _measures_for_nothing(c: TrainConfig) -> Iterator[Measure]:
    if not c.amp or c.disable_amp:
        changes = {"amp": True, "disable_amp": False}
        yield Measure("amp", changes, "switch it on (disable_amp off); it halves the activations", "nothing")
    if c.frozen_dtype == "float32" and (c.training_kind != "full" or c.disable_textenc_training):
        why = "auto; what is not trained takes half, with the same losses"
        yield Measure("frozen_dtype", {"frozen_dtype": "auto"}, why, "nothing")
    if c.cache_latents == "off":
        why = "auto; the VAE is not needed while training"
        yield Measure("cache_latents", {"cache_latents": "auto"}, why, "nothing")
    if c.ema_device != "cpu" and (c.ema_decay_rate is not None or c.ema_strength_target is not None):
        why = f"cpu instead of {c.ema_device}; it saves a copy of the weights"
        yield Measure("ema_device", {"ema_device": "cpu"}, why, "nothing")
    if not c.offload_idle_models:
        why = "switch it on; the VAE and frozen text encoders are kept in host memory"
        yield Measure("offload_idle_models", {"offload_idle_models": True}, why, "nothing")


def _measures_that_cost_time(c: TrainConfig) -> Iterator[Measure]:
    if c.cuda_graphs == "on":
        why = "off; gradients and a pass's activations are not kept"
        yield Measure("cuda_graphs", {"cuda_graphs": "off"}, why, "time")
    if not c.gradient_checkpointing:
        why = "switch it on with checkpointing_share 0.5; half of the blocks, those that hold most, cost least to recompute"
        changes = {"gradient_checkpointing": True, "checkpointing_share": 0.5}
        yield Measure("gradient_checkpointing", changes, why, "time")
    if not c.gradient_checkpointing or c.checkpointing_share < 1.0:
        why = "switch it on with checkpointing_share 1; it saves most of the activations, for a quarter of the speed"
        changes = {"gradient_checkpointing": True, "checkpointing_share": 1.0}
        yield Measure("gradient_checkpointing", changes, why, "time")
    if isinstance(c.batch_size, int) and c.batch_size > 1:
        half = c.batch_size // 2
        accum = math.ceil(c.batch_size * c.grad_accum / half)
        why = f"{half} and {accum} instead of {c.batch_size} and {c.grad_accum}; the same step in smaller pieces"
        changes = {"batch_size": half, "grad_accum": accum}
        if c.fused_backward:  # steps inside the backward pass, so nothing can be accumulated
            changes, why = {"batch_size": half}, f"{half} instead of {c.batch_size}"
        yield Measure("batch_size, grad_accum" if "grad_accum" in changes else "batch_size", changes, why, "time")
    if c.blocks_to_swap != "auto" and c.training_kind != "full" and not c.torch_compile and c.parallel != "fsdp2":
        why = (
            "auto; as many blocks of the denoiser as it takes are kept in host memory, for the time that copying takes"
        )
        yield Measure("blocks_to_swap", {"blocks_to_swap": "auto"}, why, "time")
    if c.attn_type != "slice":
        why = "slice; slower, and less for attention at high resolutions where torch has no kernel of its own for it"
        yield Measure("attn_type", {"attn_type": "slice"}, why, "time", is_estimated=False)


def _measures_that_change_the_result(c: TrainConfig, family: str | None) -> Iterator[Measure]:
    if c.training_kind != "full" and c.quantization == "none":
        why = "int8; the frozen base takes half, and the adapter learns nearly the same; steps take longer"
        yield Measure("quantization", {"quantization": "int8"}, why, "result")
    if c.optimizer is not None and "8bit" not in c.optimizer.lower():
        why = f"adamw8bit instead of {c.optimizer}; its states take a quarter"
        yield Measure("optimizer", {"optimizer": "adamw8bit"}, why, "result")
    if not c.fused_backward and c.grad_accum == 1 and c.clip_grad_norm is None:
        why = "switch it on; gradients are never all alive"
        yield Measure("fused_backward", {"fused_backward": True}, why, "result")
    if not c.disable_textenc_training and not c.disable_unet_training and c.training_kind == "full":
        why = "switch it on; it saves the text encoder's gradients and optimizer states"
        yield Measure("disable_textenc_training", {"disable_textenc_training": True}, why, "result")
    if c.weight_dtype == "float32":
        why = "bfloat16; halves weights and gradients"
        yield Measure("weight_dtype", {"weight_dtype": "bfloat16"}, why, "result")
    if c.training_kind == "lora" and c.text_quantization == "none" and family is not None:
        why = "int8; the language model that encodes captions takes half, and encodes them slightly otherwise"
        yield Measure("text_quantization", {"text_quantization": "int8"}, why, "result")
    if c.training_kind != "full" and c.quantization in ("fp8", "int8"):
        why = "nf4; the frozen base takes 28 % of its size in bfloat16, and is rounded more than by int8"
        yield Measure("quantization", {"quantization": "nf4"}, why, "result")
    largest = max(c.resolutions)
    if largest > 256:
        smaller = largest - 128 if largest > 512 else largest - 64
        kept = [r for r in c.resolutions if r < smaller]
        changes = {"resolution": [*kept, smaller] if kept else smaller}
        yield Measure("resolution", changes, f"{smaller} instead of {largest}", "result")
    if c.training_kind == "full":
        why = "lora; gradients and optimizer states for about 1 % of the weights"
        yield Measure("training_kind", {"training_kind": "lora"}, why, "result")
