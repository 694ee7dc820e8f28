"""Summing gradients over processes: what is sent, in which order. Two real processes train in test_ranks of integration."""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from everydream_kit.training.ranks import Ranks

FORMATS = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture
def sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[torch.dtype]]:
    """The formats of what goes through a real group of one process, in order."""
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1, timeout=datetime.timedelta(seconds=30))
    formats: list[torch.dtype] = []
    send = dist.all_reduce

    def note(tensor: torch.Tensor, *arguments: object) -> object:
        formats.append(tensor.dtype)
        return send(tensor, *arguments)

    monkeypatch.setattr(dist, "all_reduce", note)
    try:
        yield formats
    finally:
        dist.destroy_process_group()


def parameters(formats: list[torch.dtype]) -> list[torch.nn.Parameter]:
    made = [torch.nn.Parameter(torch.ones(3, dtype=dtype)) for dtype in formats]
    for number, parameter in enumerate(made):
        parameter.grad = torch.full_like(parameter, number + 1.0)
    return made


@pytest.mark.parametrize("formats", [FORMATS, FORMATS[::-1], FORMATS[1:] + FORMATS[:1]])
def test_gradients_of_several_formats_are_sent_in_the_order_of_the_parameters(
    sent: list[torch.dtype], formats: list[torch.dtype]
) -> None:
    mixed = parameters(formats * 2)
    Ranks(0, 2, torch.device("cpu")).sum_gradients(mixed)
    assert [dtype for dtype in sent if dtype.is_floating_point] == formats
    assert [parameter.grad[0].item() for parameter in mixed] == [1, 2, 3, 4, 5, 6]


def test_a_parameter_without_a_gradient_anywhere_keeps_none_and_is_not_decayed(sent: list[torch.dtype]) -> None:
    used, unused = parameters([torch.float32] * 2)
    unused.grad = None
    optimizer = torch.optim.AdamW([used, unused], lr=0.1, weight_decay=0.5)
    Ranks(0, 2, torch.device("cpu")).sum_gradients([used, unused])
    optimizer.step()
    assert unused.grad is None
    assert unused.tolist() == [1.0, 1.0, 1.0]
    assert used[0].item() < 1
