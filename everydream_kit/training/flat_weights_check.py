"""Whether flat weights do on this device what separate ones do, found out on a few small tensors before a run.

Flat weights hand views and sums of tensors to kernels of torch and bitsandbytes, whose versions and GPUs are more than tests
cover. The check costs a few updates of some ten thousand numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from everydream_kit.training.optimizers import build_optimizer_for_parts, default_optimizer_name, is_elementwise
from everydream_kit.training.parameters import TrainedPart
from everydream_kit.training.parts import TEXT_ENCODER, UNET, PartSettings, part_settings

if TYPE_CHECKING:
    from everydream_kit.config import TrainConfig
    from everydream_kit.training.journal import Journal

SHAPES = ((70, 60), (5,), (300,), (4096,), (16, 8, 3, 3), (1,), (64, 65), (129, 257))
"""Small and large for 8-bit states, odd, and of one number. None in channels_last, whose order bitsandbytes changes by itself:
its blocks are others then, and so are its last digits."""
NUM_UPDATES = 3
RELATIVE, ABSOLUTE = 1e-5, 1e-7
"""Kernels may round the last numbers of a tensor otherwise than eight at a time."""


def lays_flat(config: TrainConfig, device_type: str) -> bool:
    """Whether these settings ask for flat weights on this device; not every optimizer has them."""
    return config.flat_weights == "on" or (config.flat_weights == "auto" and device_type == "cuda")


def check_flat_weights(config: TrainConfig, device: torch.device, journal: Journal) -> TrainConfig:
    """The settings, without flat weights where those give other numbers on this device; that is a warning."""
    stays_separate = config.fused_backward or config.weight_dtype == "bfloat16"
    if stays_separate or not lays_flat(config, device.type):
        return config
    default = default_optimizer_name(device.type)
    optimizer = find_disagreement([part_settings(config, part, default) for part in (UNET, TEXT_ENCODER)], device)
    if optimizer is None:
        return config
    journal.warn(
        f"flat_weights: with {optimizer}, this device updates flat weights otherwise than separate ones, so they stay "
        "separate. Please report this with the output of everydream doctor."
    )
    return config.replace(flat_weights="off")


def find_disagreement(settings: Sequence[PartSettings], device: torch.device) -> str | None:
    """The optimizer whose updates differ with flat weights, or None.

    Args:
        settings: how the parts are trained; optimizers that have no flat weights are passed over.
    """
    for how in settings:
        if is_elementwise(how.optimizer):
            separate, flat = (_train(how, device, flat=flat) for flat in (False, True))
            for one, other in zip(separate, flat, strict=True):
                if not torch.allclose(one, other, rtol=RELATIVE, atol=ABSOLUTE):
                    return how.optimizer
    return None


def _train(how: PartSettings, device: torch.device, *, flat: bool) -> list[torch.Tensor]:
    """Some weights after a few updates, on the host."""
    generator = torch.Generator().manual_seed(0)
    named = [(str(shape), torch.nn.Parameter(torch.randn(shape, generator=generator).to(device))) for shape in SHAPES]
    parts, settings = [TrainedPart("check", [], named)], [replace(how, part="check", lr=1e-2)]
    optimizer = build_optimizer_for_parts(parts, settings, device_type=device.type, flat=flat)
    for _ in range(NUM_UPDATES):
        for _, parameter in named:
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(device)
        optimizer.step()
        optimizer.zero_grad()
    return [parameter.detach().cpu() for _, parameter in named]
