"""Calls that a device captures once and repeats without the host; and what a call reads, as tensors that stay in their place.

On NVIDIA GPUs a capture is a CUDA graph. Training replays passes (`training.graphs`), sampling its predictions (`sampling`).
"""

from __future__ import annotations

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

    A capture computes nothing. Errors are those of this thread alone: others may load images meanwhile.
    """

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, call: Callable[[], torch.Tensor]) -> Captured:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            result = call()
        return _CudaGraph(graph, result)


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
