"""Training on several processes: ranks, and exchange between them.

Each process holds the whole model and takes its share of every batch; gradients are summed over the processes once per
optimizer step (`gradient_sums`). That is data parallelism without a module wrapper: the losses are already divided by the
images of all processes, so one process with batch B and two with batch B/2 compute the same sums. Numbers of the host go
through a group of their own, from host memory, so that no GPU is waited for. accelerate says which process this is and opens
the process group, whether it was started by `accelerate launch` or `torchrun`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from everydream_kit.errors import HostError
from everydream_kit.gpu_support import describe_unsupported
from everydream_kit.training.losses import ImageLosses


@dataclass(frozen=True)
class Ranks:
    """This process among all. With one process, everything here costs nothing.

    Attributes:
        host_group: torch's group for what is in host memory; None: the default one.
    """

    rank: int
    num_ranks: int
    device: torch.device
    host_group: Any = field(default=None, repr=False, compare=False)

    @classmethod
    def find(cls, gpuid: int = 0) -> Ranks:
        """Ask accelerate; choose the device (`gpuid` counts for a single process).

        Raises:
            HostError: torch has no code for this GPU.
        """
        from accelerate import PartialState

        state = PartialState(cpu=not torch.cuda.is_available())
        device = state.device
        if device.type == "cuda" and state.num_processes == 1:
            device = torch.device("cuda", gpuid)
            torch.cuda.set_device(device)
        if device.type == "cuda":
            refuse_unsupported(device)
        host_group = dist.new_group(backend="gloo") if state.num_processes > 1 else None
        return cls(state.process_index, state.num_processes, device, host_group)

    @property
    def is_main(self) -> bool:
        """The one that writes."""
        return self.rank == 0

    def largest(self, *numbers: float) -> list[float]:
        """The largest of each number over all processes."""
        if self.num_ranks == 1:
            return list(numbers)
        words = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(words, dist.ReduceOp.MAX, group=self.host_group)
        return [float(word) for word in words.tolist()]

    def share(self, number: int) -> int:
        """The main process's number, for all."""
        if self.num_ranks == 1:
            return number
        return self.share_list([number])[0]

    def share_list(self, numbers: list[int]) -> list[int]:
        """The main process's numbers, for all; as many on each."""
        if self.num_ranks > 1:
            words = torch.tensor(numbers)
            dist.broadcast(words, src=0, group=self.host_group)
            numbers = words.tolist()
        return numbers

    def gather(self, losses: ImageLosses) -> ImageLosses:
        """The losses of all processes, in the order of their ranks."""
        losses.read()
        if self.num_ranks == 1:
            return losses
        parts: list[ImageLosses] = [losses] * self.num_ranks
        dist.all_gather_object(parts, losses, group=self.host_group)
        return ImageLosses(
            images=[i for part in parts for i in part.images],
            losses=[loss for part in parts for loss in part.losses],
            loss_scales=[scale for part in parts for scale in part.loss_scales],
            paths=[path for part in parts for path in part.paths],
        )

    def barrier(self) -> None:
        """Wait for the others."""
        if self.num_ranks > 1:
            dist.barrier(group=self.host_group)


def refuse_unsupported(device: torch.device) -> None:
    """Check that torch has code for a GPU, which otherwise fails only at the first kernel.

    Raises:
        HostError: it has none; the message says which torch to install.
    """
    problem = describe_unsupported(
        torch.cuda.get_device_name(device),
        torch.cuda.get_device_capability(device),
        torch.cuda.get_arch_list(),
        torch.__version__,
    )
    if problem:
        raise HostError(problem)
