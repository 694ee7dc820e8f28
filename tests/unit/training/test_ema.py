"""Averages of the weights."""

import pytest
import torch

from everydream_kit.training import ema as ema_module
from everydream_kit.training.ema import Ema, decay_from_strength_target


def parameters(*values, dtype=torch.float32):
    return [torch.nn.Parameter(torch.tensor([float(value)], dtype=dtype)) for value in values]


@torch.no_grad()
def set_all(parameters, value):
    for parameter in parameters:
        parameter.fill_(value)


def test_an_update_moves_the_average_by_one_minus_decay():
    weights = parameters(0, 10)
    ema = Ema(weights, 0.75)
    set_all(weights, 8)
    ema.update()
    assert [average.item() for average in ema.averages] == [2.0, 9.5]  # 0.75·0 + 0.25·8, 0.75·10 + 0.25·8
    ema.update()
    assert ema.averages[0].item() == 3.5  # 0.75·2 + 0.25·8
    assert ema.num_updates == 2


def test_the_average_is_a_copy_from_the_start():
    weights = parameters(1)
    ema = Ema(weights, 0.5)
    set_all(weights, 5)
    assert ema.averages[0].item() == 1.0


@pytest.mark.parametrize("decay", [0.9, 0.99, 0.9999])
def test_the_decay_is_what_stays_at_each_update_from_the_first_on(decay):
    weights = parameters(1)
    ema = Ema(weights, decay)
    set_all(weights, 0)
    for _ in range(20):
        ema.update()
    assert ema.averages[0].item() == pytest.approx(decay**20, rel=1e-5)  # 0.1216, 0.8179, 0.9980


def test_the_strength_target_is_what_is_left_of_the_start():
    decay = decay_from_strength_target(0.1, num_steps=20_000, interval=500)
    assert decay == pytest.approx(0.944, abs=5e-4)  # EveryDream 2's example
    weights = parameters(1)
    ema = Ema(weights, decay)
    set_all(weights, 0)
    for _ in range(40):
        ema.update()
    assert ema.averages[0].item() == pytest.approx(0.1, rel=1e-4)


def test_an_interval_longer_than_the_run_is_one_update():
    assert decay_from_strength_target(0.3, num_steps=10, interval=500) == 0.3


def test_slices_change_nothing(monkeypatch):
    def run():
        weights = parameters(1, 2, 3, 4, 5)
        ema = Ema(weights, 0.5)
        set_all(weights, 7)
        ema.update()
        return [average.item() for average in ema.averages]

    whole = run()
    monkeypatch.setattr(ema_module, "SLICE_NUMBERS", 2)
    assert run() == whole == [4.0, 4.5, 5.0, 5.5, 6.0]


def test_bfloat16_weights_are_averaged_in_float32():
    weights = parameters(1, dtype=torch.bfloat16)
    ema = Ema(weights, 0.999)
    set_all(weights, 2)
    ema.update()
    assert ema.averages[0].dtype == torch.float32
    assert ema.averages[0].item() == pytest.approx(1.001)


def test_swapped_weights_come_back_to_the_bit():
    weights = [torch.nn.Parameter(torch.randn(50).to(dtype)) for dtype in (torch.float32, torch.bfloat16)]
    ema = Ema(weights, 0.5)
    with torch.no_grad():
        for weight in weights:
            weight.add_(0.1)
    before = [weight.detach().clone() for weight in weights]
    with ema.swapped():
        assert torch.equal(weights[0], ema.averages[0])
        assert torch.equal(weights[1], ema.averages[1].bfloat16())
    assert all(torch.equal(weight, old) for weight, old in zip(weights, before, strict=True))


def test_swapped_weights_come_back_after_an_error():
    weights = parameters(1)
    ema = Ema(weights, 0.5)
    set_all(weights, 3)
    with pytest.raises(RuntimeError, match="drawing failed"), ema.swapped():
        raise RuntimeError("drawing failed")
    assert weights[0].item() == 3.0


def test_a_restored_average_goes_on_as_if_never_interrupted():
    weights = [torch.nn.Parameter(torch.randn(20))]
    ema = Ema(weights, 0.9)
    other_weights = [torch.nn.Parameter(weights[0].detach().clone())]
    for _ in range(3):
        set_all(weights, torch.rand(()).item())
        ema.update()
    other = Ema(other_weights, 0.9)
    other.load_state_dict({"num_updates": ema.num_updates, "averages": [a.clone() for a in ema.averages]})
    set_all(weights, 0.3)
    set_all(other_weights, 0.3)
    ema.update()
    other.update()
    assert torch.equal(ema.averages[0], other.averages[0])


def test_averages_of_other_parameters_are_refused():
    ema = Ema(parameters(1, 2), 0.5)
    with pytest.raises(ValueError, match="1 averages do not fit the 2 trained parameters"):
        ema.load_averages([torch.zeros(1)])
    with pytest.raises(ValueError, match="do not fit"):
        ema.load_averages([torch.zeros(1), torch.zeros(2)])
