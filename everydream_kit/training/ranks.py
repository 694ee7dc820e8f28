"""Training on several processes: who am I, and what do the others have.

Each process holds the whole model and takes its share of every batch; gradients are summed over the processes once per
optimizer step, after accumulation, in flat buckets. That is data parallelism without a module wrapper: the losses are
already divided by the images of all processes, so one process with batch B and two with batch B/2 compute the same
sums. accelerate says which process this is and opens the process group, whether it was started by `accelerate launch`
or `torchrun`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from everydream_kit.errors import HostError
from everydream_kit.gpu_support import describe_unsupported
from everydream_kit.training.losses import ImageLosses

BUCKET_BYTES = 25 * 2**20
"""Gradients are sent in pieces of about this size, as torch's own DDP does."""


@dataclass(frozen=True)
class Ranks:
    """This process among all. With one process, everything here costs nothing."""

    rank: int
    num_ranks: int
    device: torch.device

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
        return cls(state.process_index, state.num_processes, device)

    @property
    def is_main(self) -> bool:
        """The one that writes."""
        return self.rank == 0

    def largest(self, *numbers: float) -> list[float]:
        """The largest of each number over all processes."""
        if self.num_ranks == 1:
            return list(numbers)
        words = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        dist.all_reduce(words, dist.ReduceOp.MAX)
        return [float(word) for word in words.tolist()]

    def share(self, number: int) -> int:
        """The main process's number, for all."""
        if self.num_ranks == 1:
            return number
        word = torch.tensor(number, device=self.device)
        dist.broadcast(word, src=0)
        return int(word.item())

    def gather(self, losses: ImageLosses) -> ImageLosses:
        """The losses of all processes, in the order of their ranks."""
        losses.read()
        if self.num_ranks == 1:
            return losses
        parts: list[ImageLosses] = [losses] * self.num_ranks
        dist.all_gather_object(parts, losses)
        return ImageLosses(
            images=[i for part in parts for i in part.images],
            losses=[loss for part in parts for loss in part.losses],
            loss_scales=[scale for part in parts for scale in part.loss_scales],
            paths=[path for part in parts for path in part.paths],
        )

    def sum_gradients(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Add up every parameter's gradient over the processes, in place.

        A parameter that has no gradient on any process keeps none: with zeros, the optimizer would decay it.
        """
        if self.num_ranks == 1 or not parameters:
            return
        have = torch.tensor([parameter.grad is not None for parameter in parameters], dtype=torch.uint8)
        have = have.to(self.device)
        dist.all_reduce(have, dist.ReduceOp.MAX)
        bucket: list[torch.Tensor] = []
        size = 0
        for parameter, has_one in zip(parameters, have.tolist(), strict=True):
            if not has_one:
                continue
            if parameter.grad is None:  # a process whose share was empty sends zeros, or the others would wait
                parameter.grad = torch.zeros_like(parameter)
            bucket.append(parameter.grad)
            size += parameter.grad.nbytes
            if size >= BUCKET_BYTES:
                _sum_bucket(bucket)
                bucket, size = [], 0
        _sum_bucket(bucket)

    def barrier(self) -> None:
        """Wait for the others."""
        if self.num_ranks > 1:
            dist.barrier()


def _sum_bucket(gradients: list[torch.Tensor]) -> None:
    for dtype in dict.fromkeys(gradient.dtype for gradient in gradients):  # no set: its order differs between processes
        same = [gradient for gradient in gradients if gradient.dtype == dtype]
        flat = torch.cat([gradient.reshape(-1) for gradient in same])
        dist.all_reduce(flat)
        pieces = flat.split([gradient.numel() for gradient in same])
        for gradient, piece in zip(same, pieces, strict=True):
            gradient.copy_(piece.view_as(gradient))


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
