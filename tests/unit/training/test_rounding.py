"""bfloat16 weights: stochastic rounding is unbiased, and small updates are not lost."""

import pytest
import torch
from optimizers_by_name import build_optimizer

from everydream_kit.draws import torch_generator
from everydream_kit.training import rounding
from everydream_kit.training.rounding import RoundedOptimizer, stochastic_round


@pytest.mark.parametrize("value", [1.001, -1.001, 0.3, 1e-20, 123456.0, -3.14159e-5])
def test_the_mean_of_many_roundings_is_the_value(value):
    values = torch.full((200_000,), value)
    rounded = stochastic_round(values, torch_generator(0, "test")).double()
    neighbors = rounded.unique()
    assert len(neighbors) == 2
    assert neighbors[0] < torch.tensor(value).double() < neighbors[1]
    gap = (neighbors[1] - neighbors[0]).item()
    # The standard error of the mean is at most gap / 2 / sqrt(200 000) = gap / 894.
    assert rounded.mean().item() == pytest.approx(torch.tensor(value).item(), abs=gap / 200)


def test_numbers_that_bfloat16_has_stay_what_they_are():
    values = torch.tensor([0.0, -0.0, 1.0, -2.5, 2.0**-130, float("inf"), float("-inf")])
    rounded = stochastic_round(values, torch_generator(0, "test"))
    assert torch.equal(rounded.float(), values)
    assert torch.signbit(rounded).tolist() == torch.signbit(values).tolist()


def test_nan_stays_nan_whatever_its_bits():
    bits = torch.tensor([0x7FFFFFFF, 0x7FC00000, -1], dtype=torch.int32)  # a GPU's NaN, a CPU's, a negative one
    assert stochastic_round(bits.view(torch.float32), torch_generator(0, "test")).isnan().all()


def test_the_same_address_rounds_alike():
    values = torch.randn(1000)
    first, again, other = (stochastic_round(values, torch_generator(seed, "rounding", 3)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def build(groups):
    return build_optimizer("sgd", groups, lr=1.0, weight_decay=0.0, momentum=0.0)


def constant_gradient_steps(optimizer, parameter, num_steps, gradient):
    for _ in range(num_steps):
        parameter.grad = torch.full_like(parameter, gradient)
        optimizer.step()
        optimizer.zero_grad()


def test_updates_below_the_resolution_of_bfloat16_arrive_on_average():
    plain = torch.nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))
    constant_gradient_steps(torch.optim.SGD([plain], lr=1.0), plain, 100, -0.001)
    assert plain.float().mean().item() == 1.0  # rounded to the nearest, nothing ever happens
    weights = torch.nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))
    optimizer = RoundedOptimizer(build, [{"params": [weights], "lr": 1.0}], seed=0)
    constant_gradient_steps(optimizer, weights, 100, -0.001)
    assert weights.dtype == torch.bfloat16
    # The gradient itself is rounded to bfloat16: 0.00099945.
    assert weights.float().mean().item() == pytest.approx(1.1, abs=0.002)


def test_the_learning_rate_of_the_outer_group_counts():
    weights = torch.nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))
    optimizer = RoundedOptimizer(build, [{"params": [weights], "lr": 1.0}], seed=0)
    optimizer.param_groups[0]["lr"] = 0.5
    constant_gradient_steps(optimizer, weights, 1, -1.0)
    assert weights.tolist() == [0.5, 0.5]


def test_chunks_hold_every_parameter_once_and_change_only_the_rounding(monkeypatch):
    monkeypatch.setattr(rounding, "CHUNK_NUMBERS", 5)
    weights = [torch.nn.Parameter(torch.zeros(size, dtype=torch.bfloat16)) for size in (3, 3, 9, 1, 2)]
    groups = [{"params": weights[:3], "lr": 1.0}, {"params": weights[3:], "lr": 2.0}]
    optimizer = RoundedOptimizer(build, groups, seed=0)
    for weight in weights:
        weight.grad = torch.full_like(weight, -1.0)
    optimizer.step()
    assert [weight.unique().tolist() for weight in weights] == [[1.0], [1.0], [1.0], [2.0], [2.0]]


def test_float32_parameters_among_them_are_not_rounded():
    weights = torch.nn.Parameter(torch.ones(1))
    optimizer = RoundedOptimizer(build, [{"params": [weights], "lr": 1.0}], seed=0)
    constant_gradient_steps(optimizer, weights, 1, -0.001)
    assert weights.item() == pytest.approx(1.001, abs=1e-7)


def test_a_parameter_without_gradient_stays():
    weights = [torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16)) for _ in range(2)]
    optimizer = RoundedOptimizer(build, [{"params": weights, "lr": 1.0}], seed=0)
    weights[0].grad = torch.ones_like(weights[0])
    optimizer.step()
    assert [weight.tolist() for weight in weights] == [[0.0, 0.0], [1.0, 1.0]]
    optimizer.zero_grad(set_to_none=False)
    assert weights[0].grad.tolist() == [0.0, 0.0]
