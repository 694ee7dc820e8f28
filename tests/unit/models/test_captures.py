"""Captures into CUDA graphs, on a stand-in of torch's: what its context does where one fails, and which pools it takes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import pytest
import torch

from everydream_kit.models.captures import CudaCapture


class Driver:
    """A GPU's streams and pools, as far as `torch.cuda.graph` has to do with them (torch 2.11)."""

    def __init__(self) -> None:
        self.stream = "default"
        self.captures_underway: list[int] = []
        self.num_graphs: dict[int, int] = {}  # of each pool

    def new_pool(self) -> int:
        return 100 + len(self.num_graphs)

    @contextmanager
    def on_stream(self, stream: str) -> Iterator[None]:
        before, self.stream = self.stream, stream
        try:
            yield
        finally:
            self.stream = before

    def end(self, device: int, pool: int) -> None:
        if pool not in self.captures_underway:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.captures_underway.remove(pool)

    def release(self, device: int, pool: int) -> None:
        self.num_graphs[pool] -= 1


class Graph:
    def __init__(self, driver: Driver) -> None:
        self.driver, self.own_pool = driver, 0

    def pool(self) -> int:
        return self.own_pool

    def replay(self) -> None:
        pass

    def __del__(self) -> None:
        if self.own_pool:
            self.driver.release(0, self.own_pool)


class Context:
    """`torch.cuda.graph`."""

    def __init__(self, driver: Driver, graph: Graph, pool: int) -> None:
        self.driver, self.graph, self.pool = driver, graph, pool

    def __enter__(self) -> None:
        assert self.driver.num_graphs.get(self.pool, 1) > 0, "use_count > 0 INTERNAL ASSERT FAILED"
        self.driver.num_graphs[self.pool] = self.driver.num_graphs.get(self.pool, 0) + 1
        self.driver.captures_underway.append(self.pool)
        self.driver.stream = "capture"

    def __exit__(self, kind: Any, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is not None:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
        self.driver.end(0, self.pool)
        self.graph.own_pool = self.pool
        self.driver.stream = "default"


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    driver = Driver()
    replaced = {
        "CUDAGraph": lambda: Graph(driver),
        "graph": lambda graph, pool, capture_error_mode: Context(driver, graph, pool),
        "graph_pool_handle": driver.new_pool,
        "current_stream": lambda: driver.stream,
        "stream": driver.on_stream,
        "current_device": lambda: 0,
    }
    for name, value in replaced.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", driver.end, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_releasePool", driver.release, raising=False)
    return driver


def asks_for_a_value() -> torch.Tensor:
    raise RuntimeError("operation not permitted when stream is capturing")


def test_a_failed_capture_names_the_call_and_leaves_stream_and_allocator_as_they_were(driver: Driver) -> None:
    capture = CudaCapture()
    kept = capture(lambda: torch.ones(1))
    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
        capture(asks_for_a_value)
    assert (driver.stream, driver.captures_underway) == ("default", [])
    assert driver.num_graphs == {100: 1}
    assert capture(lambda: torch.ones(2)).result.tolist() == [1.0, 1.0]
    del kept


def test_graphs_share_a_pool_and_one_whose_graphs_are_gone_is_not_taken_again(driver: Driver) -> None:
    capture = CudaCapture()
    first, second = capture(lambda: torch.ones(1)), capture(lambda: torch.ones(1))
    assert driver.num_graphs == {100: 2}
    del first, second
    third = capture(lambda: torch.ones(1))
    assert driver.num_graphs == {100: 0, 101: 1}
    del third
