"""Flat weights: the same numbers as without buffers, in far fewer calls, and checkpoints of either kind continue as the other."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch
from optimizers_by_name import build_optimizer
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from everydream_kit.training.flat_weights import FlatOptimizer
from everydream_kit.training.optimizers import OPTIMIZERS

ELEMENTWISE = [name for name, kind in OPTIMIZERS.items() if kind.elementwise]
TORCH_FUSED = {"adamw", "adam", "sgd", "pagedadamw"}
"""Their CPU kernels compute the last few numbers of a tensor one by one, which rounds otherwise than eight at a time."""
SHAPES = [(70, 60), (5,), (300,), (4096,), (3, 4, 5), (1,), (64, 65)]


def make_parameters(seed: int = 0) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def make_groups(parameters: list[torch.nn.Parameter]) -> list[dict[str, Any]]:
    return [
        {"params": parameters[:4], "name": "unet", "weight_decay": 0.1},
        {"params": parameters[4:], "name": "text encoder", "lr": 3e-3},
    ]


def make_optimizer(name: str, parameters: list[torch.nn.Parameter], *, flat: bool) -> Any:
    def build(groups: list[dict[str, Any]]) -> Any:
        return build_optimizer(name, groups, lr=1e-2)

    groups = make_groups(parameters)
    return FlatOptimizer(build, groups, buffer_numbers=6000) if flat else build(groups)


def train(optimizer: Any, parameters: list[torch.nn.Parameter], steps: range, *, without: int | None = None) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(1000 + step)
        for index, parameter in enumerate(parameters):
            gradient = torch.randn(parameter.shape, generator=generator)
            if index == without:
                continue
            if parameter.grad is None:
                parameter.grad = gradient
            else:  # as autograd does
                parameter.grad += gradient
        optimizer.step()
        optimizer.zero_grad()


def assert_equal(one: Any, other: Any, **tolerance: float) -> None:
    if isinstance(one, torch.Tensor):
        torch.testing.assert_close(one, other, **(tolerance or {"rtol": 0.0, "atol": 0.0}))
    elif isinstance(one, dict):
        assert list(one) == list(other)
        for key in one:
            assert_equal(one[key], other[key], **tolerance)
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for pair in zip(one, other, strict=True):
            assert_equal(*pair, **tolerance)
    else:
        assert one == other


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_flat_weights_and_states_are_equal_to_separate_ones(name: str) -> None:
    tolerance = {"rtol": 1e-6, "atol": 1e-8} if name in TORCH_FUSED else {}  # others: bit for bit
    plain, flat = make_parameters(), make_parameters()
    plain_optimizer, flat_optimizer = make_optimizer(name, plain, flat=False), make_optimizer(name, flat, flat=True)
    train(plain_optimizer, plain, range(4))
    train(flat_optimizer, flat, range(4))
    assert_equal([p.detach() for p in flat], [p.detach() for p in plain], **tolerance)
    assert_equal(flat_optimizer.state_dict(), plain_optimizer.state_dict(), **tolerance)


@pytest.mark.parametrize("name", ["radam", "adamw8bit", "lion8bit"])
@pytest.mark.parametrize(("before", "after"), [(True, False), (False, True), (True, True)])
def test_a_checkpoint_of_either_kind_continues_as_the_other(name: str, before: bool, after: bool) -> None:
    expected = make_parameters()
    train(make_optimizer(name, expected, flat=False), expected, range(6))

    first = make_parameters()
    optimizer = make_optimizer(name, first, flat=before)
    train(optimizer, first, range(3))
    saved = copy.deepcopy(optimizer.state_dict())
    second = [torch.nn.Parameter(p.detach().clone()) for p in first]
    optimizer = make_optimizer(name, second, flat=after)
    optimizer.load_state_dict(saved)
    train(optimizer, second, range(3, 6))
    assert_equal([p.detach() for p in second], [p.detach() for p in expected])


def test_an_update_is_a_few_operations() -> None:
    parameters = [torch.nn.Parameter(torch.randn(100)) for _ in range(200)]
    optimizer = FlatOptimizer(
        lambda groups: build_optimizer("adamw", groups, lr=1e-2), [{"params": parameters, "name": "unet"}]
    )
    train(optimizer, parameters, range(1))
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    with CountOperations() as counted:
        optimizer.step()
    assert counted.number <= 8
    assert len({p.untyped_storage().data_ptr() for p in parameters}) == 1


class CountOperations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += 1
        return func(*args, **(kwargs or {}))


def test_what_never_has_a_gradient_is_not_decayed() -> None:
    parameters = make_parameters()
    before = parameters[1].detach().clone()
    train(make_optimizer("adamw", parameters, flat=True), parameters, range(3), without=1)
    assert torch.equal(parameters[1], before)


def test_a_gradient_that_comes_late_is_stepped() -> None:
    plain, flat = make_parameters(), make_parameters()
    for parameters, is_flat in ((plain, False), (flat, True)):
        optimizer = make_optimizer("radam", parameters, flat=is_flat)
        train(optimizer, parameters, range(2), without=1)
        train(optimizer, parameters, range(2, 4))
    assert_equal([p.detach() for p in flat], [p.detach() for p in plain])


def test_the_learning_rate_of_a_group_reaches_its_buffers_and_the_checkpoint() -> None:
    plain, flat = make_parameters(), make_parameters()
    saved = []
    for parameters, is_flat in ((plain, False), (flat, True)):
        optimizer = make_optimizer("adamw8bit", parameters, flat=is_flat)
        train(optimizer, parameters, range(1))
        for group in optimizer.param_groups:
            group["lr"] = {"unet": 1e-3, "text encoder": 2e-3}[group["name"]]
        train(optimizer, parameters, range(1, 3))
        saved.append(optimizer.state_dict())
    assert_equal([p.detach() for p in flat], [p.detach() for p in plain])
    assert_equal(saved[1], saved[0])


def test_channels_last_weights_keep_their_layout() -> None:
    plain, flat = (
        [torch.nn.Parameter(torch.randn(8, 6, 3, 3, generator=torch.Generator().manual_seed(0)))] for _ in "ab"
    )
    for (parameter,), is_flat in ((plain, False), (flat, True)):
        parameter.data = parameter.data.to(memory_format=torch.channels_last)

        def build(groups: list[dict[str, Any]]) -> Any:
            return build_optimizer("radam", groups, lr=1e-2)

        groups = [{"params": [parameter], "name": "unet"}]
        train(FlatOptimizer(build, groups) if is_flat else build(groups), [parameter], range(3))
        assert parameter.is_contiguous(memory_format=torch.channels_last)
    assert_equal(flat[0].detach(), plain[0].detach())


@pytest.mark.parametrize("name", ["adamw", "adamw8bit"])
def test_the_old_buffers_are_freed_one_by_one_where_one_parameter_is_taken_out(name: str) -> None:
    """SDXL's first text encoder has a layer without gradients: the first step must not hold all weights twice.

    Inner optimizers may be in reference cycles, as the estimate's are, and cycles are collected at some later time.
    """
    parameters = make_parameters()
    optimizer = make_optimizer(name, parameters, flat=True)
    for inner in optimizer.optimizers:
        inner.itself = inner
    old = [StorageWeakRef(whole.untyped_storage()) for whole in optimizer.weights]
    assert len(old) >= 3
    gc.disable()
    try:
        train(optimizer, parameters, range(1), without=1)
    finally:
        gc.enable()
    assert all(one.expired() for one in old)
