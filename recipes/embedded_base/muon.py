"""Muon for convolutions: momentum, made orthogonal, as the update (Keller Jordan, 2024).

In 75 seconds from scratch the autoencoder came 0.8 dB further with it than with AdamW, at 7 % fewer steps. Norms,
biases and the first and last convolutions stay with AdamW, as Muon's author recommends.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from embedded_base.peers import Peers


def orthogonalised(matrix: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Nearly the closest (semi-)orthogonal matrix, by the quintic Newton-Schulz iteration with Muon's coefficients."""
    transposed = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if transposed else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if transposed else x


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum; a weight of more than two dimensions counts as (out, rest).

    Making updates orthogonal took a sixth of a step, so each process does its share of the weights, then all exchange.
    """

    def __init__(
        self, parameters: Iterable[torch.nn.Parameter], lr: float, peers: Peers, momentum: float = 0.95
    ) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum})
        self.peers = peers

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            updates = []
            for number, parameter in enumerate(group["params"]):
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                momentum = state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
                update = torch.zeros(parameter.shape)
                if number % self.peers.count == self.peers.rank:
                    matrix = parameter.grad.lerp(momentum, group["momentum"]).reshape(len(parameter), -1)
                    scale = max(1.0, matrix.shape[0] / matrix.shape[1]) ** 0.5
                    update = (scale * orthogonalised(matrix)).reshape(parameter.shape)
                updates.append(update)
            self.peers.add_up(updates)
            for parameter, update in zip(group["params"], updates, strict=True):
                parameter.add_(update, alpha=-group["lr"])
