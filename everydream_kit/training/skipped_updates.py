"""An update that is skipped on the device, so that the host need not know whether it was.

The fused Adam and AdamW of torch look at a number on the device, `found_inf`, before they change anything; GradScaler's own
way to them. Others change weights or states whatever they are given, so the host asks the device before it calls them.
bitsandbytes is among those: it waits for the device after each tensor anyway.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from everydream_kit.training.flat_weights import flat_optimizers
from everydream_kit.training.optimizers import unwrap_optimizers
from everydream_kit.training.rounding import RoundedOptimizer
from everydream_kit.transfers import Fetched

CHECKED_FORMATS = (torch.float32, torch.float16)
"""Of gradients that GradScaler's check is made for on every device."""


@dataclass(frozen=True)
class Update:
    """What became of an update. Values are on their way; asking for one waits until it is there.

    Attributes:
        norm: of all gradients before clipping; None where nobody wanted it.
        skip: () whether a gradient was not finite, so that nothing was updated; None where updates cannot be skipped.
    """

    norm: Fetched | None = None
    skip: Fetched | None = None

    @property
    def gradient_norm(self) -> float | None:
        return None if self.norm is None else self.norm.number()

    @property
    def was_skipped(self) -> bool:
        return self.skip is not None and bool(self.skip.number())


def finds_non_finite(parameters: Sequence[torch.nn.Parameter]) -> bool:
    """Whether `find_non_finite` knows these gradients: complete ones of formats that it is made for."""
    return all(p.dtype in CHECKED_FORMATS and not hasattr(p, "full_tensor") for p in parameters)


@torch.no_grad()
def find_non_finite(parameters: Sequence[torch.nn.Parameter]) -> torch.Tensor:
    """() bool on the weights' device: whether some gradient is NaN or infinite. One kernel's launch for many gradients."""
    device = parameters[0].device
    found, one = torch.zeros((), device=device), torch.ones((), device=device)
    by_format: dict[torch.dtype, list[torch.Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            by_format.setdefault(parameter.dtype, []).append(parameter.grad)
    for gradients in by_format.values():  # GradScaler's own operator; the factor of 1 leaves every number as it is
        torch._amp_foreach_non_finite_check_and_unscale_(gradients, found, one)
    return found.bool()


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
