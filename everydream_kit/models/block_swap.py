"""Blocks of the denoiser that wait in host memory, and come to the device one ahead of their use.

Only frozen tensors move, so nothing has to go back: a block leaves when what it had on the device is dropped. A hook
before each waiting block's forward pass brings it, also where gradient checkpointing computes it again; in the backward
pass without checkpointing, what autograd saved of its weights is a note of the place, and the block comes when the note
is read. The order of the blocks is learned from the passes themselves; backward it is turned around.

On a GPU the copies run on a stream of their own, from pinned memory. The memory that they fill belongs to the stream
that computes: a copy begins when that one has done all that was queued before, and the block waits for its copy, so
nothing is overwritten while in use. On a CPU the copies are plain ones, in the same order.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from everydream_kit.errors import ConfigError, MemoryLimitError

ALIGNMENT = 512
"""Bytes that a tensor's place in its block's buffer is a multiple of, as torch's allocator for GPUs has it."""


def repeated_blocks(module: torch.nn.Module, classes: Collection[str]) -> dict[str, torch.nn.Module]:
    """A denoiser's repeated blocks by their names, those inside another block not counted."""
    found: dict[str, torch.nn.Module] = {}
    for name, part in module.named_modules():
        if type(part).__name__ in classes and not any(name.startswith(f"{outer}.") for outer in found):
            found[name] = part
    return found


def waiting_blocks(module: torch.nn.Module, classes: Collection[str], count: int | str) -> dict[str, torch.nn.Module]:
    """Those that wait in host memory: so many, evenly between the others, so that each copy has the time of several blocks.

    Args:
        classes: names of the blocks' classes.
        count: "auto" for all of them, which is what it may come to.

    Raises:
        ConfigError: there are not so many.
    """
    blocks = repeated_blocks(module, classes)
    wanted = len(blocks) if count == "auto" else int(count)
    if wanted > len(blocks):
        raise ConfigError(
            f"blocks_to_swap {wanted}: the {type(module).__name__} has {len(blocks)} blocks; take at most those."
        )
    names = list(blocks)
    chosen = [names[(2 * number + 1) * len(names) // (2 * wanted)] for number in range(wanted)]
    return {name: blocks[name] for name in chosen}


def waiting_prefixes(module: torch.nn.Module, classes: Collection[str], count: int | str) -> tuple[str, ...]:
    """What the names of the weights and buffers of the blocks that wait begin with."""
    return tuple(f"{name}." for name in waiting_blocks(module, classes, count))


@dataclass(frozen=True)
class _Saved:
    """What autograd keeps of a tensor that is a waiting block's: where to find it again."""

    block: int
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: int | torch.SymInt


@dataclass
class _Arriving:
    """A block's tensors on the device, side by side.

    Attributes:
        buffer: bytes.
        copied: event after the copy; None where it is done.
    """

    buffer: torch.Tensor
    copied: Any = None

    def wait(self) -> None:
        """Let what is queued on the device from now on come after the copy."""
        if self.copied is not None:
            torch.cuda.current_stream(self.buffer.device).wait_event(self.copied)
            self.copied = None


class _Block:
    """One block's frozen tensors, with their place in host memory, side by side."""

    def __init__(self, module: torch.nn.Module) -> None:
        frozen = {id(p): p for p in module.parameters() if not p.requires_grad}
        self.tensors: list[torch.Tensor] = list((frozen | {id(b): b for b in module.buffers()}).values())
        self._places: list[tuple[int, int, tuple[int, ...]]] = []  # offset, bytes, stride
        size = 0
        for tensor in self.tensors:
            stride = torch.empty_like(tensor, device="meta").stride()  # dense, in the same order of dimensions
            self._places.append((size, tensor.numel() * tensor.element_size(), stride))
            size += -(-self._places[-1][1] // ALIGNMENT) * ALIGNMENT
        self.host = torch.empty(size, dtype=torch.uint8)
        self._waiting = self.views(self.host)
        with torch.no_grad():
            for waiting, tensor in zip(self._waiting, self.tensors, strict=True):
                waiting.copy_(tensor.data)
        self.leave()

    def views(self, buffer: torch.Tensor) -> list[torch.Tensor]:
        """The block's tensors in a buffer like `host`."""
        return [
            buffer[offset : offset + num_bytes].view(tensor.dtype).as_strided(tensor.size(), stride)
            for tensor, (offset, num_bytes, stride) in zip(self.tensors, self._places, strict=True)
        ]

    def use(self, buffer: torch.Tensor) -> None:
        """Let the block's tensors be those of a buffer."""
        self._put(self.views(buffer))

    def leave(self) -> None:
        """Let them be those in host memory."""
        self._put(self._waiting)

    def _put(self, values: Sequence[torch.Tensor]) -> None:
        for tensor, value in zip(self.tensors, values, strict=True):
            tensor.data = value


class BlockSwap:
    """Brings a denoiser's waiting blocks to the device and lets them go again.

    What is trained, and every block that does not wait, stays on the device. Weights that are frozen must not change
    meanwhile: a change is lost when the block leaves.

    Args:
        denoiser: its waiting blocks may be on the device or in host memory, before.
        blocks: from `waiting_blocks`.
        device: where it works.

    Attributes:
        num_blocks: that wait.
        copied_bytes: that came to the device so far.
        watch: called with each buffer that is made on the device.
    """

    def __init__(
        self, denoiser: torch.nn.Module, blocks: Sequence[torch.nn.Module], device: torch.device | str
    ) -> None:
        self.device = torch.device(device)
        self.num_blocks = len(blocks)
        self.copied_bytes = 0
        self.watch: Callable[[torch.Tensor], None] = lambda buffer: None
        self._blocks = [_Block(module) for module in blocks]
        self._arrived: dict[int, _Arriving] = {}
        self._owners: dict[int, int] = {}  # a buffer's storage -> the number of its block
        self._next: dict[int, int] = {}  # in a forward pass
        self._previous: dict[int, int] = {}
        self._last: int | None = None
        self._current: tuple[int, bool] | None = None  # and whether it is there for the backward pass
        self._stream: Any = None
        if self.device.type == "cuda":  # on a CPU there is neither pinned memory nor a queue
            self._stream = torch.cuda.Stream(self.device)
            _pin([block.host for block in self._blocks], self)
        waiting = {id(tensor) for block in self._blocks for tensor in block.tensors}
        for tensor in (*denoiser.parameters(), *denoiser.buffers()):
            if id(tensor) not in waiting and tensor.device != self.device:
                tensor.data = tensor.data.to(self.device)
        denoiser.register_forward_pre_hook(lambda module, inputs: self._begin())
        for number, module in enumerate(blocks):
            module.register_forward_pre_hook(lambda module, inputs, number=number: self._enter(number))

    @property
    def host_buffers(self) -> list[torch.Tensor]:
        """What the blocks take of host memory."""
        return [block.host for block in self._blocks]

    @contextmanager
    def saving_places(self) -> Iterator[None]:
        """While inside, autograd saves the places of waiting weights in place of the weights."""
        with torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack):
            yield

    def _begin(self) -> None:
        """A forward pass begins; what came before its first block says nothing of the order."""
        self._last = None

    def _enter(self, number: int) -> None:
        """A block is about to compute, in a forward pass or where it is computed again."""
        if not _is_backward():
            if self._last is not None:
                self._next[self._last], self._previous[number] = number, self._last
            self._last = number
        self._bring(number)

    def _bring(self, number: int) -> torch.Tensor:
        """Let a block be on the device, the one after it be on its way, and the others leave."""
        here = (number, _is_backward())
        if here == self._current:
            return self._arrived[number].buffer
        following = (self._previous if here[1] else self._next).get(number)
        for other in [other for other in self._arrived if other not in (number, following)]:
            self._leave(other)
        if number not in self._arrived:
            self._fetch(number)
        arriving = self._arrived[number]
        arriving.wait()
        self._blocks[number].use(arriving.buffer)
        self._current = here
        if following is not None and following not in self._arrived:
            self._fetch(following)
        return arriving.buffer

    def _fetch(self, number: int) -> None:
        host = self._blocks[number].host
        buffer = torch.empty_like(host, device=self.device)  # free again once the stream that computes is past its use
        arriving = _Arriving(buffer)
        if self._stream is None:  # a CPU
            buffer.copy_(host)
        else:
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self._stream):
                buffer.copy_(host, non_blocking=True)
                arriving.copied = self._stream.record_event()
        self.copied_bytes += host.numel()
        self.watch(buffer)
        self._arrived[number] = arriving
        self._owners[buffer.untyped_storage()._cdata] = number

    def _leave(self, number: int) -> None:
        arriving = self._arrived.pop(number)
        arriving.wait()  # it may never have been used, and its memory is free for others now
        del self._owners[arriving.buffer.untyped_storage()._cdata]
        self._blocks[number].leave()

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor | _Saved:
        number = self._owners.get(tensor.untyped_storage()._cdata)
        if number is None:
            return tensor.detach()  # the tensor itself would hold the graph that holds it
        return _Saved(number, tensor.dtype, tensor.size(), tensor.stride(), tensor.storage_offset())

    def _unpack(self, saved: torch.Tensor | _Saved) -> torch.Tensor:
        if isinstance(saved, torch.Tensor):
            return saved
        buffer = self._bring(saved.block)
        return buffer.view(saved.dtype).as_strided(saved.size, saved.stride, saved.offset)


def _is_backward() -> bool:
    """Whether autograd's engine calls; it works through a node then."""
    return torch._C._current_autograd_node() is not None


def _pin(buffers: Sequence[torch.Tensor], owner: object) -> None:
    """Let a GPU read host memory by itself; until the owner is gone.

    Not `pin_memory`: torch's own pinned memory rounds each size up to a power of two, a third more for a typical block.

    Raises:
        MemoryLimitError: the driver refuses.
    """
    cuda: Any = torch.cuda.cudart()
    for buffer in buffers:
        status = int(cuda.cudaHostRegister(buffer.data_ptr(), buffer.numel(), 0))
        if status:
            raise MemoryLimitError(
                f"blocks_to_swap: {buffer.numel() / 2**20:.0f} MiB of host memory cannot be pinned (CUDA error {status}). Lower "
                "blocks_to_swap, or free host memory."
            )
    weakref.finalize(owner, _unpin, cuda, list(buffers)).atexit = False


def _unpin(cuda: Any, buffers: Sequence[torch.Tensor]) -> None:
    for buffer in buffers:
        cuda.cudaHostUnregister(buffer.data_ptr())
