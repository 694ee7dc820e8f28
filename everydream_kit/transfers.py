"""Tensors between host and GPU, without stopping the GPU's queue.

A plain `.to` from ordinary host memory waits until the GPU has done all that it was asked for. From pinned memory the copy
itself is queued, and so is one to pinned memory; an event says when that one has arrived.
"""

from __future__ import annotations

from typing import Any

import torch


def send(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """Copy a tensor of the host to a device, without synchronizing: the copy is queued."""
    device = torch.device(device)
    if tensor.device == device or device.type == "cpu":
        return tensor.to(device)
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()  # torch keeps the memory until the copy is done
    return tensor.to(device, non_blocking=True)


class Fetched:
    """A tensor on its way to host memory. What is queued on the device after it is not waited for."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._copy = tensor.detach().to("cpu", non_blocking=True)  # pinned memory, if it comes from a GPU
        self._arrived: Any = None
        if tensor.device.type == "cuda":
            self._arrived = torch.cuda.Event()
            self._arrived.record(torch.cuda.current_stream(tensor.device))

    def read(self) -> torch.Tensor:
        """The copy, when it has arrived."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._copy

    def number(self) -> float:
        """The value of a tensor of one number."""
        return float(self.read())
