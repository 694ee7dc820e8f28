"""Summing gradients over processes: what is sent, in which order. Two real processes train in test_ranks of integration."""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from everydream_kit.training import gradient_sums
from everydream_kit.training.gradient_sums import GradientSums
from everydream_kit.training.ranks import Ranks

HOST_NUMBERS = torch.float64
FORMATS = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture
def sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[torch.dtype]]:
    """The formats of what goes through a real group of one process, in order."""
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1, timeout=datetime.timedelta(seconds=30))
    formats: list[torch.dtype] = []
    send = dist.all_reduce

    def note(tensor: torch.Tensor, *arguments: object, **options: object) -> object:
        formats.append(tensor.dtype)
        return send(tensor, *arguments, **options)

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


def gradients_in(sent: list[torch.dtype]) -> list[torch.dtype]:
    return [dtype for dtype in sent if dtype != HOST_NUMBERS]


@pytest.mark.parametrize("formats", [FORMATS, FORMATS[::-1], FORMATS[1:] + FORMATS[:1]])
def test_gradients_of_several_formats_are_sent_in_the_order_of_the_parameters(
    sent: list[torch.dtype], formats: list[torch.dtype]
) -> None:
    mixed = parameters(formats * 2)
    GradientSums(mixed, Ranks(0, 2, torch.device("cpu"))).finish()
    assert gradients_in(sent) == formats
    assert [parameter.grad[0].item() for parameter in mixed] == [1, 2, 3, 4, 5, 6]


def test_a_parameter_without_a_gradient_anywhere_keeps_none_and_is_not_decayed(sent: list[torch.dtype]) -> None:
    used, unused = parameters([torch.float32] * 2)
    unused.grad = None
    optimizer = torch.optim.AdamW([used, unused], lr=0.1, weight_decay=0.5)
    GradientSums([used, unused], Ranks(0, 2, torch.device("cpu"))).finish()
    optimizer.step()
    assert unused.grad is None
    assert unused.tolist() == [1.0, 1.0, 1.0]
    assert used[0].item() < 1


def test_pieces_are_sent_while_the_last_backward_pass_goes_on(
    sent: list[torch.dtype], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gradient_sums, "PIECE_BYTES", 1)
    layers = torch.nn.Sequential(*(torch.nn.Linear(4, 4, bias=False) for _ in range(3)))
    sums = GradientSums(list(layers.parameters()), Ranks(0, 2, torch.device("cpu")))
    sent_before_first_layer = []
    layers[0].weight.register_hook(lambda gradient: sent_before_first_layer.append(len(gradients_in(sent))))
    gradients = []
    for _ in range(2):
        for is_last in (False, True):  # of two micro-batches
            if is_last:
                sums.watch()
            layers(torch.ones(2, 4)).sum().backward()
        sums.finish()
        gradients.append([parameter.grad.clone() for parameter in layers.parameters()])
        layers.zero_grad()
        sent.clear()
    # step 1: the order is not known yet; step 2: nothing of the first micro-batch, two of three pieces in the second
    assert sent_before_first_layer == [0, 0, 0, 2]
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)


def test_a_gradient_keeps_its_memory_layout_and_frees_its_own_memory(sent: list[torch.dtype]) -> None:
    convolution = torch.nn.Conv2d(8, 8, 3, bias=False).to(memory_format=torch.channels_last)
    convolution(torch.ones(1, 8, 5, 5)).sum().backward()
    expected, place = convolution.weight.grad.clone(), convolution.weight.grad.data_ptr()
    GradientSums([convolution.weight], Ranks(0, 2, torch.device("cpu"))).finish()
    assert convolution.weight.grad.stride() == convolution.weight.stride()
    assert torch.equal(convolution.weight.grad, expected)
    assert convolution.weight.grad.data_ptr() != place
