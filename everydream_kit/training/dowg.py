"""DoWG, "Distance over Weighted Gradients" (arXiv 2305.16284, algorithm 1): gradient descent that finds its own rate.

Neither torch, bitsandbytes nor pytorch_optimizer has it. It keeps a copy of the starting weights, and three numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch


class DoWG(torch.optim.Optimizer):
    """x <- x - lr · r²/sqrt(v) · g with r the largest distance from the start so far and v the sum of r²·|g|².

    Distances and norms run over all parameters together, as in the paper.

    Args:
        params: parameters or groups.
        lr: factor on the rate that is found; 1 is the paper's.
        d0: first guess of the distance (r_eps in the paper), as a share of 1 + |x_0|.
        weight_decay: decoupled: each step also takes lr · r²/sqrt(v) · weight_decay · x away.
    """

    def __init__(self, params: Iterable[Any], lr: float = 1.0, d0: float = 1e-6, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "d0": d0, "weight_decay": weight_decay})
        # In the groups, where load_state_dict keeps Python numbers as they are; equal in all groups.
        for group in self.param_groups:
            group.setdefault("distance_squared", None)
            group.setdefault("weighted_norms", 0.0)

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # nobody gives a closure
        """One update of every parameter that has a gradient."""
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        if not parameters:
            return
        for p in parameters:
            if not self.state[p]:
                self.state[p]["start"] = p.detach().clone()
        starts = [self.state[p]["start"] for p in parameters]
        first = self.param_groups[0]
        farthest = first["distance_squared"]
        if farthest is None:
            farthest = (first["d0"] * (1.0 + _squared_norm(starts) ** 0.5)) ** 2
        moved = torch._foreach_sub([p.detach() for p in parameters], starts)
        farthest = max(farthest, _squared_norm(moved))
        weighted_norms = first["weighted_norms"] + farthest * _squared_norm([p.grad for p in parameters])
        rate = farthest / weighted_norms**0.5 if weighted_norms > 0 else 0.0
        for group in self.param_groups:
            group["distance_squared"], group["weighted_norms"] = farthest, weighted_norms
            self._update_group(group, group["lr"] * rate)

    def _update_group(self, group: dict[str, Any], rate: float) -> None:
        parameters = [p for p in group["params"] if p.grad is not None]
        if not parameters:
            return
        if group["weight_decay"]:
            torch._foreach_mul_(parameters, 1.0 - rate * group["weight_decay"])
        torch._foreach_add_(parameters, [p.grad for p in parameters], alpha=-rate)


def _squared_norm(tensors: Sequence[torch.Tensor]) -> float:
    """Sum of squares over all tensors, in float64."""
    norms = torch.stack(torch._foreach_norm([tensor.float() for tensor in tensors]))
    return float(norms.double().square().sum())
