"""In which number formats the run computes: autocast, and the gradient scaler of float16.

What happens to bfloat16 weights at an update is in `rounding`.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from everydream_kit.config import mixes_precision
from everydream_kit.config.precision_settings import PrecisionGroup
from everydream_kit.errors import ConfigError
from everydream_kit.training.skipped_updates import step_unless
from everydream_kit.transfers import Fetched

INITIAL_SCALE = 2**17.5
SCALER_STAGES = ((0, 2.0, 25), (500, 1.8, 100), (1000, 1.6, 200), (2000, 1.3, 500), (4000, 1.15, 2000))
"""(from this step, growth factor, steps without overflow before growing), as EveryDream 2 tunes its scaler: the scale
finds its place quickly, and later overflows, each of which costs a step, become rare."""

FROZEN = {"auto": None, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass
class Precision:
    """How a run computes. Made by `choose_precision`.

    Attributes:
        device_type: "cpu", "cuda" ...
        dtype: format of the arithmetic inside autocast; float32 means no autocast.
        weight_dtype: format of the trained weights.
        frozen_dtype: format of the matrices in parts that are not trained; None: everything is as the trained weights.
        scaler: gradient scaler, with float16 only.
        num_steps: optimizer steps taken with the scaler.
    """

    device_type: str
    dtype: torch.dtype
    weight_dtype: torch.dtype
    frozen_dtype: torch.dtype | None = None
    scaler: torch.amp.GradScaler | None = None
    tune_scaler: bool = True
    num_steps: int = field(default=0, repr=False)
    _scale: Fetched | None = field(default=None, init=False, repr=False)

    def autocast(self, *, keep_casts: bool = True) -> AbstractContextManager[Any]:
        """Where the forward pass belongs.

        Args:
            keep_casts: keep a copy of each trained weight in half precision until the end. Training needs them for the
                backward pass; where nothing is learned they are a second model, and casting again costs little.
        """
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device_type, self.dtype, cache_enabled=keep_casts)

    def scale(self, loss: torch.Tensor) -> torch.Tensor:
        """The loss to call backward on."""
        return loss if self.scaler is None else self.scaler.scale(loss)

    def unscale(self, optimizer: Any) -> torch.Tensor | None:
        """Bring the gradients back to their true size, before they are measured or clipped.

        Returns:
            () bool on the device: whether one overflowed. None without a scaler.
        """
        if self.scaler is None:
            return None
        self.scaler.unscale_(optimizer)
        found: torch.Tensor
        (found,) = self.scaler._found_inf_per_device(optimizer).values()  # one device
        return found.bool()

    def step(self, optimizer: Any, *, skip: torch.Tensor) -> None:
        """Step the optimizer, unless something is not finite.

        With float16, gradients that overflowed lower the scale instead. The scale is updated first: it is read while the
        weights are still being updated.

        Args:
            skip: () bool, on the weights' device.
        """
        if self.scaler is not None:
            if self.tune_scaler:
                tune_scaler(self.scaler, self.num_steps)
            self.scaler.update()
            self._scale = Fetched(self.scaler.scale(torch.ones((), device=skip.device)))
            self.num_steps += 1
        step_unless(optimizer, skip)

    @property
    def gradient_scale(self) -> float | None:
        """The scaler's factor, None without one."""
        if self.scaler is None:
            return None
        return self.scaler.get_scale() if self._scale is None else self._scale.number()

    def state_dict(self) -> dict[str, Any]:
        scaler = None if self.scaler is None else self.scaler.state_dict()
        return {"scaler": scaler, "num_steps": self.num_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """A scaler's state is taken where there is a scaler; a change of format starts fresh."""
        self.num_steps = int(state["num_steps"])
        if self.scaler is not None and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
            self._scale = None


def choose_precision(device: torch.device | str, settings: PrecisionGroup) -> Precision:
    """Choose the formats.

    Args:
        device: where the model runs.
        settings: with `amp_dtype` auto, the arithmetic is bfloat16 on a GPU that has it and else float16, elsewhere float32,
            or `frozen_dtype` where that is in half precision; bfloat16 weights compute in bfloat16. With `frozen_dtype`
            auto, frozen parts have the arithmetic's format on a GPU, elsewhere that of the trained weights.

    Raises:
        ConfigError: float16 arithmetic together with bfloat16 weights, or with a fused backward, which updates weights
            before its scaled gradients can be brought back to their size.
    """
    device_type = torch.device(device).type
    amp, frozen = mixes_precision(settings), FROZEN[settings.frozen_dtype]
    if settings.weight_dtype == "bfloat16":
        if amp and settings.amp_dtype == "fp16":
            raise ConfigError(
                "weight_dtype, amp_dtype: bfloat16 weights compute in bfloat16; set amp_dtype to auto or bf16"
            )
        return Precision(device_type, torch.bfloat16, torch.bfloat16, frozen)
    dtype = _amp_dtype(device_type, settings.amp_dtype) if amp else torch.float32
    if frozen is None and device_type == "cuda" and dtype != torch.float32:
        frozen = dtype
    if frozen not in (None, torch.float32) and dtype == torch.float32:
        dtype = frozen
    scaler = None
    if dtype == torch.float16:
        if settings.fused_backward:
            raise ConfigError(
                "fused_backward, amp_dtype: float16 needs its gradients unscaled before the update, and a fused backward "
                "does not wait for that; set amp_dtype to bf16, or fused_backward off"
            )
        scaler = torch.amp.GradScaler(
            device_type, init_scale=INITIAL_SCALE, growth_factor=2.0, backoff_factor=0.5, growth_interval=25
        )
    return Precision(device_type, dtype, torch.float32, frozen, scaler, settings.apply_grad_scaler_step_tweaks)


def _amp_dtype(device_type: str, amp_dtype: str) -> torch.dtype:
    if amp_dtype != "auto":
        return {"bf16": torch.bfloat16, "fp16": torch.float16}[amp_dtype]
    if device_type != "cuda":
        return torch.float32
    # Without the argument, GPUs that only imitate bfloat16 (a T4) say yes, and are several times slower with it.
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def tune_scaler(scaler: torch.amp.GradScaler, num_steps: int) -> None:
    """Set how fast the scale grows after so many optimizer steps, see SCALER_STAGES."""
    factor, interval = next(stage[1:] for stage in reversed(SCALER_STAGES) if num_steps >= stage[0])
    scaler.set_growth_factor(factor)
    scaler.set_backoff_factor(1.0 / factor)
    scaler.set_growth_interval(interval)
