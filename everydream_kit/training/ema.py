"""EMA: a slowly moving average of the trained weights, kept next to them.

    average <- d · average + (1 - d) · weights

Kept in float32 on a device of its own (host memory costs none of the GPU's), updated with torch's foreach functions a
slice at a time, so that weights on another device are never copied all at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from everydream_kit.training.chunks import cut

SLICE_NUMBERS = 2**25
"""Numbers that are moved between devices together: 128 MiB in float32."""


class Ema:
    """The averages of a list of parameters.

    Args:
        parameters: what is averaged, in an order that stays the same.
        decay: share of the average that stays at each update.
            The same at every update: the number does what it says.
        device: where the averages live; None: with the parameters.
        update_interval: optimizer steps between two updates.
    """

    def __init__(
        self,
        parameters: Iterable[torch.nn.Parameter],
        decay: float,
        device: torch.device | str | None = None,
        update_interval: int = 1,
    ) -> None:
        self.parameters = list(parameters)
        self.decay = decay
        self.update_interval = update_interval
        self.num_updates = 0
        # The copy is explicit: `to` alone would hand out the parameter's own memory.
        self.averages = [p.detach().to(device or p.device, torch.float32, copy=True) for p in self.parameters]

    def after_step(self, step: int) -> None:
        """Update where that is due after so many optimizer steps."""
        if step % self.update_interval == 0:
            self.update(step // self.update_interval)

    @torch.no_grad()
    def update(self, num_updates: int | None = None) -> None:
        """Take the present weights into the averages.

        Args:
            num_updates: number of this update, from 1; by default one more than the last.
        """
        self.num_updates = self.num_updates + 1 if num_updates is None else num_updates
        weight = 1.0 - self.decay
        pairs = zip(self.averages, self.parameters, strict=True)
        for piece in cut(pairs, lambda pair: pair[0].numel(), SLICE_NUMBERS):
            weights = [p.detach().to(average.device, torch.float32) for average, p in piece]
            torch._foreach_lerp_([average for average, _ in piece], weights, weight)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """While inside, the model holds the averages; afterwards its own weights again, to the bit.

        The weights stay next to the averages meanwhile, which costs that device one more copy of them.
        """
        waiting = [
            p.detach().to(average.device, copy=True) for p, average in zip(self.parameters, self.averages, strict=True)
        ]
        try:
            self._put_into_model(self.averages)
            yield
        finally:
            self._put_into_model(waiting)

    @torch.no_grad()
    def _put_into_model(self, tensors: Sequence[torch.Tensor]) -> None:
        for parameter, tensor in zip(self.parameters, tensors, strict=True):
            parameter.copy_(tensor)

    def state_dict(self) -> dict[str, Any]:
        return {"num_updates": self.num_updates, "averages": self.averages}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises: ValueError, if the averages are of other parameters."""
        self.load_averages(state["averages"])
        self.num_updates = int(state["num_updates"])

    @torch.no_grad()
    def load_averages(self, averages: Sequence[torch.Tensor]) -> None:
        """Take other averages, for instance an earlier run's (`ema_resume_model`), in the order of the parameters.

        Raises:
            ValueError: number or shapes differ.
        """
        shapes = [tuple(tensor.shape) for tensor in averages]
        expected = [tuple(average.shape) for average in self.averages]
        if shapes != expected:
            raise ValueError(f"EMA: {len(shapes)} averages do not fit the {len(expected)} trained parameters")
        for own, other in zip(self.averages, averages, strict=True):
            own.copy_(other)


def decay_from_strength_target(target: float, num_steps: int, interval: int) -> float:
    """The decay that leaves `target` of the starting weights in the average after the run: target^(1 / updates).

    Args:
        target: share that is left at the end, between 0 and 1.
        num_steps: optimizer steps of the run.
        interval: optimizer steps between updates.
    """
    return float(target ** (1.0 / max(1.0, num_steps / interval)))
