"""Calls that a device captures once and repeats without the host; and what a call reads, as tensors that stay in their place.

On NVIDIA GPUs a capture is a CUDA graph. Training replays passes (`training.cuda_graphs`), sampling its predictions (`sampling`).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Protocol

import torch

Capture = Callable[[Callable[[], torch.Tensor]], "Captured"]


class Captured(Protocol):
    """A call that can be repeated on the device.

    Attributes:
        result: what the call returned; every replay writes it again.
    """

    result: torch.Tensor

    def replay(self) -> None: ...


class CudaCapture:
    """Captures calls into CUDA graphs that share one memory pool; they are never replayed at the same time.

    A capture computes nothing. Errors are those of this thread alone: others may load images meanwhile. Where one fails, its
    first error is raised, and stream and allocator are as they were.
    """

    def __init__(self) -> None:
        self._graphs: weakref.WeakSet[Any] = weakref.WeakSet()

    def __call__(self, call: Callable[[], torch.Tensor]) -> Captured:
        graph, pool = torch.cuda.CUDAGraph(), self._pool()
        cause: BaseException | None = None
        try:
            # torch's own context does not leave its stream where a capture fails
            with (
                torch.cuda.stream(torch.cuda.current_stream()),
                torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"),
            ):
                try:
                    result = call()
                except BaseException as error:
                    cause = error
                    raise
        except RuntimeError as error:
            _end_failed_capture(pool)
            raise cause or error from None  # when it ends such a capture, torch only says that there was an error
        finally:
            cause = None  # a frame that its own error leads to would keep the capture's memory
        self._graphs.add(graph)
        return _CudaGraph(graph, result)

    def _pool(self) -> Any:
        """That of the graphs which live; torch refuses one whose graphs are all gone, where cuBLAS still has memory of it."""
        living = next(iter(self._graphs), None)
        return torch.cuda.graph_pool_handle() if living is None else living.pool()


def _end_failed_capture(pool: Any) -> None:
    """Let the allocator know that a capture is over: torch before 2.12 forgets that, and then frees no memory any more."""
    names = ("_cuda_endAllocateToPool", "_cuda_endAllocateCurrentStreamToPool")  # the second until torch 2.7
    end = next(getattr(torch._C, name) for name in names if hasattr(torch._C, name))
    device = torch.cuda.current_device()
    try:
        end(device, pool)
    except RuntimeError:  # torch has done it
        return
    torch._C._cuda_releasePool(device, pool)


@dataclass
class _CudaGraph:
    graph: Any
    result: torch.Tensor

    def replay(self) -> None:
        self.graph.replay()


CAPTURES: dict[str, Callable[[], Capture]] = {"cuda": CudaCapture}
"""By the type of the device. Others have none."""


def tensors_in(value: Any) -> list[torch.Tensor]:
    """All tensors, however deep they lie in records and tuples, in one order."""
    found: list[torch.Tensor] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        found.append(tensor)
        return tensor

    changed(value, note)
    return found


def changed(value: Any, change: Callable[[torch.Tensor], Any]) -> Any:
    """The same with each tensor changed, however deep it lies in records and tuples."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{one.name: changed(getattr(value, one.name), change) for one in fields(value)})
    return tuple(changed(one, change) for one in value) if isinstance(value, tuple) else value


def described(value: Any) -> Hashable:
    """What two values have in common where the same kernels can read both: shapes, formats, and all that is no tensor."""
    if isinstance(value, torch.Tensor):
        return tuple(value.shape), value.dtype
    if is_dataclass(value):
        return tuple(described(getattr(value, one.name)) for one in fields(value))
    return tuple(map(described, value)) if isinstance(value, tuple) else value
