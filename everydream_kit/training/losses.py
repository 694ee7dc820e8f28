"""One loss for each image of a step, fetched from the device once, and the refusal of NaN and infinite losses."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from everydream_kit.errors import NonFiniteLossError
from everydream_kit.plain_text import printable
from everydream_kit.transfers import Fetched

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from everydream_kit.data.records import Batch


@dataclass
class ImageLosses:
    """The losses of one step, a number for each image (fillers skipped)."""

    images: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    loss_scales: list[float] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    _waiting: list[tuple[Batch, Fetched]] = field(default_factory=list, repr=False)

    def add(self, batch: Batch, losses: torch.Tensor) -> None:
        """Note a micro-batch's losses, (B,). They are on their way until `read`, so that the device is not waited for."""
        self._waiting.append((batch, Fetched(losses)))

    def read(self) -> ImageLosses:
        """Take in what is still on its way."""
        for batch, losses in self._waiting:
            for row, (draw, loss) in enumerate(zip(batch.planned.draws, losses.read().tolist(), strict=True)):
                if not draw.filler:
                    self.images.append(draw.image)
                    self.losses.append(loss)
                    self.loss_scales.append(float(batch.loss_scale[row]))
                    self.paths.append(batch.paths[row])
        self._waiting.clear()
        return self

    @property
    def mean(self) -> float:
        """Mean loss of the images, each weighed by its loss_scale, as the gradient saw it."""
        if not self.losses:
            return 0.0
        return sum(loss * scale for loss, scale in zip(self.losses, self.loss_scales, strict=True)) / len(self.losses)


def refuse_non_finite(losses: ImageLosses, step: int, *, base: str, gradients_are_finite: bool = True) -> None:
    """Refuse a step whose losses or gradients are not finite.

    Args:
        step: optimizer steps done.
        base: where the model came from.
        gradients_are_finite: True also where it is not known, or where they may overflow (float16).

    Raises:
        NonFiniteLossError: a loss or a gradient is NaN or infinite; it names the step and the images.
    """
    losses.read()
    bad = [path for path, loss in zip(losses.paths, losses.losses, strict=True) if not math.isfinite(loss)]
    if bad and step == 0:
        raise NonFiniteLossError(
            f"step 0: loss is NaN or infinite for {_named(bad)}, and nothing has been trained yet. The base model is damaged "
            f"({base}), or its numbers exceed the format. Fetch it again, or choose amp_dtype bf16 or amp off."
        )
    if bad:
        raise NonFiniteLossError(
            f"step {step}: loss is NaN or infinite for {_named(bad)}. Nothing was updated in this step. "
            "Lower lr, set clip_grad_norm 1.0, or choose amp_dtype bf16; then resume from the last checkpoint."
        )
    if not gradients_are_finite:
        raise NonFiniteLossError(
            f"step {step}: gradients are NaN or infinite, although the losses of {_named(losses.paths)} are finite. "
            "Nothing was updated in this step. Lower lr, or choose amp off; then resume from the last checkpoint."
        )


def _named(paths: Sequence[str]) -> str:
    return ", ".join(map(printable, paths[:4])) + (f" and {len(paths) - 4} more" if len(paths) > 4 else "")
