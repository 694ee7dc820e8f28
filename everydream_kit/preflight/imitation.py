"""What a CUDA device does differently with the same code, imitated on tensors of the CPU.

Fake tensors "on cuda" cannot be differentiated without a driver, so the pre-flight's tensors are on the CPU. Two things
would then be other than on the GPU that is estimated, and are corrected here: autocast keeps norms in float32 there (a
CPU computes them in the low format), and the optimizers of bitsandbytes want values that do not exist.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch

from everydream_kit.preflight.tracker import StorageTracker
from everydream_kit.training.flat_weights import FlatOptimizer

PAGED_FROM = 100_000
"""Numbers from which bitsandbytes pages a state (optimizer.py, `get_state_buffer`: `p.numel() < 1e5` is not paged)."""


BITSANDBYTES_LAUNCHES = 3
"""Launches that a tensor's update counts as: its Python costs about 104 µs where a launch costs 37 (docs/gpu.md)."""


def imitate_autocast(modules: Iterable[torch.nn.Module]) -> None:
    """Let norms, upsampling and the softmax of sliced attention work in float32 under autocast, as they do on CUDA.

    By hooks on the modules rather than by a mode: what checkpointing computes again, inside the backward pass, is theirs too.
    Attention needs nothing: the CPU's fused kernel keeps the same tensors as CUDA's, in the same layout.
    """
    for module in modules:
        for part in module.modules():
            if isinstance(part, (torch.nn.GroupNorm, torch.nn.LayerNorm)) or type(part).__name__ == "Upsample2D":
                part.register_forward_pre_hook(_raise_first)
            if hasattr(part, "upcast_softmax"):
                attention: Any = part
                attention.upcast_softmax = True


def _raise_first(module: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """ATen/autocast_mode.h, AT_FORALL_FP32: group_norm, layer_norm, upsample_nearest2d."""
    if not torch.is_autocast_enabled("cpu") or args[0].dtype not in (torch.float16, torch.bfloat16):
        return args
    return (args[0].float(), *args[1:])


def replace_bitsandbytes(optimizer: Any, tracker: StorageTracker, host: str, *, device_type: str) -> None:
    """Let the optimizers of bitsandbytes make their states by their own rule, and skip their kernels.

    The rule is `init_state` of bitsandbytes/optim/optimizer.py itself: 8-bit states are one byte a number, a float32
    scale for each 256 numbers; tensors under `min_8bit_size` (4096) have float32 states. Its CUDA kernels work in
    place; on a CPU it computes in float32 copies (backends/cpu/ops.py, `_optimizer_update_8bit_blockwise_cpu`).

    Args:
        host: the category of paged states, which live in host memory.
        device_type: "cpu" or "cuda".
    """
    for one in _watchable(optimizer):
        if isinstance(one, FlatOptimizer):
            one.watch(partial(_replace, tracker=tracker, host=host, device_type=device_type))
        else:
            _replace(one, tracker, host, device_type)


def _watchable(optimizer: Any) -> list[Any]:
    """The torch optimizers, but flat ones as a whole: theirs are made at the first step."""
    inner = None if isinstance(optimizer, FlatOptimizer) else getattr(optimizer, "optimizers", None)
    return [optimizer] if inner is None else [one for part in inner for one in _watchable(part)]


def _replace(optimizer: Any, tracker: StorageTracker, host: str, device_type: str) -> None:
    if type(optimizer).__module__.startswith("bitsandbytes."):
        # The two tables that all 8-bit states share; made by a sort that needs values.
        optimizer.name2qmap = {name: torch.empty(256) for name in ("dynamic", "udynamic")}
        optimizer._cpu_paged_warned = True
        optimizer.step = partial(_step, optimizer, tracker, host, device_type)


def _step(
    optimizer: Any, tracker: StorageTracker, host: str, device_type: str, closure: Callable[[], Any] | None = None
) -> None:
    for index, group in enumerate(optimizer.param_groups):
        for position, parameter in enumerate(group["params"]):
            if parameter.grad is None:
                continue
            tracker.add_launches(BITSANDBYTES_LAUNCHES)
            state = optimizer.state[parameter]
            if not state:
                optimizer.init_state(group, parameter, index, position)
                state = optimizer.state[parameter]
            states = [state[key] for key in ("state1", "state2") if key in state]
            if device_type == "cpu" and states[0].dtype == torch.uint8:
                # Both states, the gradient, the root of the second state and its quotient.
                tracker.add_scratch((2 * len(states) + 1) * 4 * parameter.numel())
            elif device_type != "cpu" and optimizer.is_paged and parameter.numel() >= PAGED_FROM:
                tracker.label(states, host)
