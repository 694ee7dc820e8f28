"""Gradients added up over the processes, piece by piece, during the backward pass.

A piece is sent when all its gradients are complete, in one order on all processes: the one in which they were complete in the
first step, as torch's own DDP does it. A piece's memory becomes that of its gradients, so sending takes no copy of them all.

No wrapper around the modules, and no parameter has to be used: what a process has no gradient for counts as zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from everydream_kit.training.chunks import cut
from everydream_kit.training.flat_weights import is_dense, place_of
from everydream_kit.training.ranks import Ranks

PIECE_BYTES = 25 * 2**20
"""Gradients are sent in pieces of about this size, as torch's own DDP does."""
ALIGNMENT = 64
"""Numbers that every gradient in a piece begins at a multiple of, for kernels that read 16 bytes at a time."""


class GradientSums:
    """Adds up the gradients of several processes.

    Args:
        parameters: the same on all processes, in one order.
        ranks: the processes.
    """

    def __init__(self, parameters: Sequence[torch.nn.Parameter], ranks: Ranks) -> None:
        self._parameters, self._ranks = list(parameters), ranks
        self._order: list[int] = []  # in which the gradients were complete, in the first step
        self._pieces: list[list[int]] | None = None  # indices of parameters; None until that order is known
        self._piece_of: dict[int, int] = {}
        self._is_last = False
        self._begin()
        for index, parameter in enumerate(self._parameters):
            parameter.register_post_accumulate_grad_hook(partial(self._note, index))

    def watch(self) -> None:
        """The next backward pass is the last one of its step: what it completes can be sent."""
        self._is_last = True

    def finish(self) -> None:
        """Send the rest, and wait for all. Every gradient is the sum then.

        A parameter that has no gradient on any process keeps none: with zeros, the optimizer would decay it.
        """
        if not self._parameters:
            return
        have = self._ranks.largest(*(parameter.grad is not None for parameter in self._parameters))
        if self._pieces is None:
            self._plan()
        assert self._pieces is not None
        while len(self._sent) < len(self._pieces):
            self._send(self._pieces[len(self._sent)])
        for sent in self._sent:
            sent.wait()
        for index, parameter in enumerate(self._parameters):
            parameter.grad = self._sums[index] if have[index] else None
        self._begin()

    def _begin(self) -> None:
        self._is_last = False
        self._sent: list[Any] = []
        self._sums: dict[int, torch.Tensor] = {}
        self._missing = [len(piece) for piece in self._pieces or []]

    def _note(self, index: int, parameter: torch.Tensor) -> None:
        """A gradient is complete."""
        if not self._is_last:
            return
        if self._pieces is None:
            self._order.append(index)
            return
        self._missing[self._piece_of[index]] -= 1
        while len(self._sent) < len(self._pieces) and self._missing[len(self._sent)] == 0:
            self._send(self._pieces[len(self._sent)])

    def _plan(self) -> None:
        """Divide the gradients into pieces, as the main process saw them arrive."""
        order = self._ranks.share_list([*dict.fromkeys([*self._order, *range(len(self._parameters))])])
        place = {index: number for number, index in enumerate(order)}
        by_format: dict[Any, list[int]] = {}
        for index in order:
            by_format.setdefault((self._parameters[index].dtype, self._parameters[index].device), []).append(index)
        pieces = [
            piece
            for bundle in by_format.values()
            for piece in cut(bundle, lambda i: self._parameters[i].nbytes, PIECE_BYTES)
        ]
        self._pieces = sorted(pieces, key=lambda piece: place[piece[-1]])  # in the order in which they are complete
        self._piece_of = {index: number for number, piece in enumerate(self._pieces) for index in piece}

    @torch.no_grad()
    def _send(self, piece: list[int]) -> None:
        """Lay a piece's gradients one behind the other, let them live there, and begin to add."""
        parameters = [self._parameters[index] for index in piece]
        starts = [0]
        for parameter in parameters:
            starts.append(starts[-1] + -(-parameter.numel() // ALIGNMENT) * ALIGNMENT)
        together = torch.zeros(starts[-1], dtype=parameters[0].dtype, device=parameters[0].device)
        for index, parameter, start in zip(piece, parameters, starts, strict=False):
            like = parameter if is_dense(parameter) else torch.empty(parameter.shape)
            self._sums[index] = place_of(together, start, like)
            if parameter.grad is not None:
                self._sums[index].copy_(parameter.grad)
                parameter.grad = self._sums[index]
        self._sent.append(dist.all_reduce(together, async_op=True))
