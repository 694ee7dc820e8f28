"""An update that is skipped on the device, so that the host need not know whether it was.

The fused Adam and AdamW of torch look at a number on the device, `found_inf`, before they change anything; GradScaler's own
way to them. Others change weights or states whatever they are given, so the host asks the device before it calls them.
bitsandbytes is among those: it waits for the device after each tensor anyway.
"""

from __future__ import annotations

from typing import Any

import torch

from everydream_kit.training.flat import flat_optimizers
from everydream_kit.training.optimizers import unwrap_optimizers
from everydream_kit.training.rounding import RoundedOptimizer


def step_unless(optimizer: Any, skip: torch.Tensor) -> None:
    """Step an optimizer, or leave weights, states and step counters as they are.

    Args:
        skip: () bool, on the weights' device.
    """
    for flat in flat_optimizers(optimizer):
        flat.take_out_unused()  # it makes its inner optimizers anew
    inner = unwrap_optimizers(optimizer)
    if not (_steps_at_once(optimizer) and all(map(_skips_on_device, inner))):
        if not bool(skip):
            optimizer.step()
        return
    found_inf = skip.float()
    for one in inner:
        one.found_inf = found_inf
    try:
        optimizer.step()
    finally:
        for one in inner:
            del one.found_inf


def _steps_at_once(optimizer: Any) -> bool:
    """Whether it does nothing but step its inner optimizers: a rounding one also counts its steps."""
    if isinstance(optimizer, RoundedOptimizer):
        return False
    return all(map(_steps_at_once, getattr(optimizer, "optimizers", ())))


def _skips_on_device(optimizer: Any) -> bool:
    """Not SGD: skipped at its first step, it keeps a momentum that nobody has filled. Not the slices of `sharding`."""
    if not isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW):
        return False
    return all(
        group.get("fused") and not any(hasattr(p, "full_tensor") for p in group["params"])
        for group in optimizer.param_groups
    )
