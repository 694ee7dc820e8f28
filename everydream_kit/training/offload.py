"""Modules that are offloaded to host memory while they are not needed: the VAE, and text encoders that are not trained.

A module may be offloaded only where the steps themselves do without it: the VAE where latents are cached, text encoders
where captions are remembered. Then it comes to the device for sampling, for validation, and for an image or a caption
that is met for the first time. Where every step would need it, it stays: moving it back and forth would cost more than
it saves. On a CPU there is nothing to save.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


class IdleModels:
    """Holds modules in host memory except while they are in use.

    Args:
        modules: to offload; they are moved to host memory at once. With no modules this is a no-op.
        device: where they work.
    """

    def __init__(self, modules: Iterable[torch.nn.Module] = (), device: torch.device | str = "cpu") -> None:
        self.device = device
        self._users = dict.fromkeys(modules, 0)
        for module in self._users:
            module.to("cpu")

    @contextmanager
    def at_work(self, modules: Iterable[torch.nn.Module]) -> Iterator[None]:
        """While inside, those of the modules that wait here are on the device. May be nested."""
        waiting = [module for module in modules if module in self._users]
        for module in waiting:
            if not self._users[module]:
                module.to(self.device)
            self._users[module] += 1
        try:
            yield
        finally:
            for module in waiting:
                self._users[module] -= 1
                if not self._users[module]:
                    module.to("cpu")


@contextmanager
def in_host_memory(module: torch.nn.Module) -> Iterator[None]:
    """While inside, a module is in host memory; afterwards each of its tensors is where it was."""
    tensors = [tensor for tensor in (*module.parameters(), *module.buffers()) if tensor.device.type != "cpu"]
    devices = [tensor.device for tensor in tensors]
    for tensor in tensors:
        tensor.data = tensor.data.to("cpu")
    try:
        yield
    finally:
        for tensor, device in zip(tensors, devices, strict=True):
            tensor.data = tensor.data.to(device)
