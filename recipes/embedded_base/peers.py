"""Two processes of one thread each instead of one process of two threads.

At these sizes a second thread brought almost nothing (0.8 to 1.3 steps a second for either), while two processes of one
thread made 1.5 steps a second each; and a core that other work takes for a moment holds one process up, not each of the
thousand parallel regions of a step. Start with `torchrun --nproc_per_node 2`; alone it works too.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

import torch
import torch.distributed as dist


class Peers:
    """The processes that train one model together."""

    def __init__(self) -> None:
        self.rank = int(os.environ.get("RANK", "0"))
        self.count = int(os.environ.get("WORLD_SIZE", "1"))
        if self.count > 1:
            dist.init_process_group("gloo")
            torch.set_num_threads(1)

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def average(self, parameters: Iterable[torch.nn.Parameter], number: float) -> float:
        """Average the gradients in place over all processes, and return the average of `number` too.

        One message a step: the number travels in the same buffer, so that time-driven schedules agree everywhere.
        """
        if self.count == 1:
            return number
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        flat = torch.cat([*(gradient.reshape(-1) for gradient in gradients), torch.tensor([number])])
        dist.all_reduce(flat)
        flat /= self.count
        start = 0
        for gradient in gradients:
            # channels_last gradients are not contiguous: reshape reads in logical order, and so does this copy
            gradient.copy_(flat[start : start + gradient.numel()].view(gradient.shape))
            start += gradient.numel()
        return float(flat[-1])

    def add_up(self, tensors: list[torch.Tensor]) -> None:
        """Replace each tensor by its sum over all processes, in one message."""
        if self.count == 1:
            return
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        dist.all_reduce(flat)
        start = 0
        for tensor in tensors:
            tensor.copy_(flat[start : start + tensor.numel()].view(tensor.shape))
            start += tensor.numel()
