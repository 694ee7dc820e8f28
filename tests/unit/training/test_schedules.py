"""The course of the learning rate."""

import pytest

from everydream_kit.errors import ConfigError
from everydream_kit.training.schedules import (
    KINDS,
    default_decay_steps,
    default_warmup_steps,
    learning_rate,
    scaled_lr,
)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [  # at 0, 1/4, 1/2, 3/4 and 1 of the way down
        ("constant", [1, 1, 1, 1, 1]),
        ("linear", [1, 3 / 4, 1 / 2, 1 / 4, 0]),
        ("cosine", [1, 0.8535534, 1 / 2, 0.1464466, 0]),  # (1 + cos(π/4)) / 2
        ("polynomial", [1, 9 / 16, 1 / 4, 1 / 16, 0]),
    ],
)
def test_the_shapes_of_the_decay(kind, expected):
    rates = [learning_rate(step, peak=1.0, kind=kind, decay_steps=100) for step in (0, 25, 50, 75, 100)]
    assert rates == pytest.approx(expected)


@pytest.mark.parametrize("kind", KINDS)
def test_warm_up_rises_to_the_peak_in_its_last_step(kind):
    rates = [learning_rate(step, peak=8.0, kind=kind, warmup_steps=4, decay_steps=100) for step in range(5)]
    assert rates == pytest.approx([2, 4, 6, 8, 8])


@pytest.mark.parametrize("kind", ["linear", "cosine", "polynomial"])
def test_after_the_decay_the_rate_stays_at_zero(kind):
    assert [learning_rate(step, peak=1.0, kind=kind, decay_steps=10) for step in (10, 15, 1000)] == [0, 0, 0]


@pytest.mark.parametrize(("kind", "expected"), [("constant", 1.0), ("linear", 0.3408), ("cosine", 0.2602)])
def test_with_the_defaults_a_run_ends_well_above_zero(kind, expected):
    decay_steps = default_decay_steps(1000)
    warmup_steps = default_warmup_steps(decay_steps, kind)
    last = learning_rate(999, peak=1.0, kind=kind, warmup_steps=warmup_steps, decay_steps=decay_steps)
    assert last == pytest.approx(expected, abs=1e-4)


def test_without_warm_up_cosine_ends_at_a_quarter():
    last = learning_rate(999, peak=1.0, kind="cosine", decay_steps=default_decay_steps(1000))
    assert last == pytest.approx(0.25, abs=0.001)


def test_default_lengths():
    assert default_decay_steps(1000) == 1500
    assert default_decay_steps(1) == 1
    assert default_warmup_steps(1500, "cosine") == 30
    assert default_warmup_steps(1500, "constant") == 0


def test_scaled_lr_is_the_documented_example():
    assert scaled_lr(2e-6, 8, 2) == pytest.approx(9.19e-6, abs=5e-9)
    assert scaled_lr(2e-6, 1, 1) == 2e-6


def test_an_unknown_schedule_is_refused():
    with pytest.raises(ConfigError, match=r"lr_scheduler: must be one of constant, linear.*'cosine_with_restarts'"):
        learning_rate(0, peak=1.0, kind="cosine_with_restarts")


def test_a_decay_that_ends_within_the_warm_up_is_refused():
    with pytest.raises(ConfigError, match=r"lr_decay_steps, lr_warmup_steps.*got 5 and 5"):
        learning_rate(5, peak=1.0, kind="linear", warmup_steps=5, decay_steps=5)


def test_a_peak_of_zero_stays_zero():
    assert learning_rate(3, peak=0.0, kind="cosine", warmup_steps=2, decay_steps=10) == 0.0
