"""Optimizers of EveryDream 2 that scale every coordinate by itself and that no library of ours has."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch


class AdaCoor(torch.optim.Adagrad):
    """EveryDream 2's `adacoor`: AdaGrad whose rate is sqrt(eps), since it weighs every gradient by eps.

    With v the sum of eps·g², its step eps·g / (sqrt(v) + eps) is AdaGrad's with rate and eps both sqrt(eps). There `lr`
    has no effect; here it is a factor, and 1 gives the same.

    Args:
        params: parameters or groups.
        lr: factor on the rate that follows from `eps`.
        eps: EveryDream 2's `epsilon`.
        weight_decay: added to the gradient, as AdaGrad does.
    """

    def __init__(self, params: Iterable[Any], lr: float = 1.0, eps: float = 1e-8, weight_decay: float = 0.0) -> None:
        super().__init__(params, lr=lr, eps=eps, weight_decay=weight_decay)

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # nobody gives a closure
        """One update of every parameter that has a gradient."""
        asked = [(group["lr"], group["eps"]) for group in self.param_groups]
        try:
            for group in self.param_groups:
                root = group["eps"] ** 0.5
                group["lr"], group["eps"] = group["lr"] * root, root
            super().step()
        finally:
            for group, (lr, eps) in zip(self.param_groups, asked, strict=True):
                group["lr"], group["eps"] = lr, eps


class CoordinateDoWG(torch.optim.Optimizer):
    """DoWG (arXiv 2305.16284) with a distance and a sum for every coordinate: x <- x - lr · r²/sqrt(v) · g.

    Args:
        params: parameters or groups.
        lr: factor on the rate that is found.
        d0: first guess of every coordinate's distance.
        weight_decay: decoupled: each step also takes lr · r²/sqrt(v) · weight_decay · x away.
    """

    def __init__(self, params: Iterable[Any], lr: float = 1.0, d0: float = 1e-6, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "d0": d0, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # nobody gives a closure
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, group)

    def _update(self, p: torch.Tensor, group: dict[str, Any]) -> None:
        state = self.state[p]
        if not state:
            state["start"] = p.detach().clone()
            state["distance_squared"] = torch.full_like(p, group["d0"] ** 2, dtype=torch.float32)
            state["weighted_squares"] = torch.zeros_like(p, dtype=torch.float32)
        farthest = state["distance_squared"]
        torch.maximum(farthest, (p - state["start"]).float().square(), out=farthest)
        gradient = p.grad.float()  # type: ignore[union-attr]
        state["weighted_squares"].addcmul_(farthest, gradient.square())
        # sqrt(v) is at least r·|g|, but v of a tiny gradient is no longer a float32 number: a step is never longer than r.
        least = farthest.sqrt() * gradient.abs()
        rate = farthest / torch.maximum(state["weighted_squares"].sqrt(), least).clamp_min(1e-30)
        decay = (rate * group["weight_decay"]).clamp_max(1.0)  # nor does decay turn a weight's sign
        p.sub_((group["lr"] * (rate * gradient + decay * p)).to(p.dtype))
