"""Several optimizers behind one face: for parts with different optimizers, and for stepping inside the backward pass.

In a fused backward each parameter is updated as soon as its gradient is complete, and the gradient is dropped: all
gradients are never alive together, which saves one copy of the trained weights. It follows that there is nothing left
to accumulate, to clip, or to unscale, and that an update cannot be refused after the backward pass has begun.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

Group = dict[str, Any]


class CombinedOptimizer:
    """Several optimizers that step as one. Has what a training loop and a GradScaler use of torch's Optimizer."""

    def __init__(self, optimizers: Sequence[Any]) -> None:
        self.optimizers = list(optimizers)

    @property
    def param_groups(self) -> list[Group]:
        """The groups of all of them; setting a group's lr works."""
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    @property
    def state(self) -> dict[torch.Tensor, Any]:
        return {key: value for optimizer in self.optimizers for key, value in optimizer.state.items()}

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=set_to_none)

    def state_dict(self) -> dict[str, Any]:
        return {"optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for optimizer, one in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(one)


class FusedBackwardOptimizer(CombinedOptimizer):
    """One optimizer for each parameter, stepped by a hook when the parameter's gradient is complete.

    `step` and `zero_grad` do nothing; both have happened. Only for optimizers whose update of a parameter depends on
    that parameter alone (`optimizers.may_step_by_parameter`).

    Args:
        build: makes an optimizer from a list of one group.
        param_groups: groups of the parameters; their settings go to each parameter's own group.
    """

    def __init__(self, build: Callable[[list[dict[str, Any]]], Any], param_groups: Sequence[dict[str, Any]]) -> None:
        optimizers = []
        self.measures_norm = False
        self._squared_norms: list[torch.Tensor] = []
        for group in param_groups:
            for parameter in group["params"]:
                optimizer = build([{**group, "params": [parameter]}])
                optimizers.append(optimizer)
                parameter.register_post_accumulate_grad_hook(self._make_hook(optimizer))
        super().__init__(optimizers)

    def _make_hook(self, optimizer: Any) -> Callable[[torch.Tensor], None]:
        def update(parameter: torch.Tensor) -> None:
            assert parameter.grad is not None
            if self.measures_norm:
                self._squared_norms.append(parameter.grad.float().square().sum())
            optimizer.step()
            parameter.grad = None

        return update

    def step(self) -> None:
        """Does nothing: the backward pass has updated the parameters."""

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Nothing: the gradients are gone."""

    def take_gradient_norm(self) -> float:
        """Norm of all gradients of the step, if `measures_norm` was set before its backward pass; else 0."""
        if not self._squared_norms:
            return 0.0
        norm = torch.stack([one.to(self._squared_norms[0].device) for one in self._squared_norms]).sum().sqrt()
        self._squared_norms.clear()
        return float(norm)


def measure_gradient_norm(optimizer: Any, wanted: bool) -> None:
    """Set whether a fused optimizer, or those behind a combined one, measure the next backward pass."""
    for one in _fused(optimizer):
        one.measures_norm = wanted


def take_gradient_norm(optimizer: Any) -> torch.Tensor | None:
    """Norm of all gradients of the last backward pass, None where it was not measured."""
    fused = _fused(optimizer)
    if not any(one.measures_norm for one in fused):
        return None
    return torch.tensor(sum(one.take_gradient_norm() ** 2 for one in fused) ** 0.5)


def _fused(optimizer: Any) -> list[FusedBackwardOptimizer]:
    if isinstance(optimizer, FusedBackwardOptimizer):
        return [optimizer]
    return [one for one in optimizer.optimizers if isinstance(one, FusedBackwardOptimizer)]
