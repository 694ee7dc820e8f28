"""One loss for each image of a step, fetched from the device once, and the refusal of NaN and infinite losses."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from everydream_kit.errors import NonFiniteLossError
from everydream_kit.plain_text import printable

if TYPE_CHECKING:
    import torch

    from everydream_kit.data.records import Batch


@dataclass
class ImageLosses:
    """The losses of one step, a number for each image (fillers skipped)."""

    images: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    loss_scales: list[float] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    _waiting: list[tuple[Batch, torch.Tensor]] = field(default_factory=list, repr=False)

    def add(self, batch: Batch, losses: torch.Tensor) -> None:
        """Note a micro-batch's losses, (B,). They stay on the device until `read`, so that it is not waited for."""
        self._waiting.append((batch, losses))

    def read(self) -> ImageLosses:
        """Fetch what is still on the device."""
        for batch, losses in self._waiting:
            for row, (draw, loss) in enumerate(zip(batch.planned.draws, losses.tolist(), strict=True)):
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


def refuse_non_finite(losses: ImageLosses, step: int) -> None:
    """Raises: NonFiniteLossError, naming the step and the images, if any loss is NaN or infinite."""
    losses.read()
    bad = [path for path, loss in zip(losses.paths, losses.losses, strict=True) if not math.isfinite(loss)]
    if bad:
        raise NonFiniteLossError(
            f"step {step}: loss is NaN or infinite for {', '.join(map(printable, bad[:4]))}"
            + (f" and {len(bad) - 4} more" if len(bad) > 4 else "")
            + ". Nothing was updated in this step. Lower lr, set clip_grad_norm 1.0, or choose amp_dtype bf16; "
            "then resume from the last checkpoint."
        )
