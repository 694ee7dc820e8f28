"""Gradients that stay where they are from step to step.

A captured pass adds to the same memory at every replay, so that memory must not be freed: an update is followed by zeroing it.
Gradients of flat weights lie as the weights do, in buffers that the optimizer steps without copying them together first; those
of other weights lie one behind the other by format.
"""

from __future__ import annotations

from typing import Any

import torch

from everydream_kit.training.flat_weights import flat_optimizers, is_dense, lay_out, place_of
from everydream_kit.training.optimizers import parameters_of


class KeptGradients:
    """The memory of an optimizer's gradients.

    A parameter gets its place after the first step that has a gradient for it: what is never used keeps none, since with
    zeros the optimizer would decay it.
    """

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        self._parameters = parameters_of(optimizer)
        self._places: dict[torch.nn.Parameter, torch.Tensor] = {}
        self._buffers: list[torch.Tensor] = []

    @property
    def buffers(self) -> list[torch.Tensor]:
        """All that memory, in a few tensors."""
        return self._buffers

    def has_places(self) -> bool:
        """Whether every gradient that exists now has its place, and at least one exists."""
        present = [(p, p.grad) for p in self._parameters if p.grad is not None]
        return bool(present) and all(self._places.get(p) is gradient for p, gradient in present)

    @torch.no_grad()
    def clear(self) -> None:
        """After an update, in the place of dropping the gradients: give places to new ones, and fill all with zeros."""
        new = [p for p in self._parameters if p.grad is not None and p not in self._places]
        if new:
            self._make_places(new)
        for buffer in self._buffers:
            buffer.zero_()
        for parameter in self._parameters:
            parameter.grad = self._places.get(parameter)

    def _make_places(self, parameters: list[torch.nn.Parameter]) -> None:
        for parameter in parameters:
            parameter.grad = None  # freed before the memory that it goes to is taken
        for flat in flat_optimizers(self._optimizer):
            for buffer, places in flat.keep_gradients():
                self._buffers.append(buffer)
                self._places.update(places)
        bundles: dict[Any, list[torch.nn.Parameter]] = {}
        for parameter in parameters:
            if parameter not in self._places:
                bundles.setdefault((parameter.dtype, parameter.device), []).append(parameter)
        for (dtype, device), bundle in bundles.items():
            starts, num_numbers = lay_out(bundle)
            buffer = torch.zeros(num_numbers, dtype=dtype, device=device)
            self._buffers.append(buffer)
            for parameter, start in zip(bundle, starts, strict=True):
                like = parameter if is_dense(parameter) else torch.empty(parameter.shape)
                self._places[parameter] = place_of(buffer, start, like)
