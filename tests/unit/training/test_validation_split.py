"""The split by content, the grid of timesteps, and what follows from a curve."""

import json
from collections import Counter

import pytest

from everydream_kit.errors import ConfigError
from everydream_kit.training.validation import LossCurve, split_indices, timestep_grid


def test_the_two_sides_are_everything_and_share_nothing():
    stays, taken = split_indices([str(n) for n in range(100)], 0.15, seed=555)
    assert sorted(stays + taken) == list(range(100))
    assert len(taken) == 15


@pytest.mark.parametrize(("num_images", "expected"), [(2, 1), (7, 2), (10, 2), (20, 3), (100, 15)])
def test_the_share_is_rounded_up_and_at_least_one(num_images, expected):
    assert len(split_indices([str(n) for n in range(num_images)], 0.15, seed=1)[1]) == expected


@pytest.mark.parametrize("seed", range(10))
def test_copies_of_an_image_stay_together(seed):
    groups = [str(n // 4) for n in range(40)]  # ten images, four copies of each
    stays, taken = split_indices(groups, 0.15, seed)
    assert len(taken) == 8  # six are wanted, groups are complete
    assert not {groups[index] for index in stays} & {groups[index] for index in taken}


def test_the_seed_decides_and_the_order_of_the_files_does_not():
    groups = [str(n) for n in range(50)]
    taken = {groups[index] for index in split_indices(groups, 0.2, 1)[1]}
    backwards = groups[::-1]
    assert taken == {backwards[index] for index in split_indices(backwards, 0.2, 1)[1]}
    assert taken != {groups[index] for index in split_indices(groups, 0.2, 2)[1]}


def test_over_many_seeds_each_image_is_held_out_as_often_as_any_other():
    groups = [str(n) for n in range(20)]
    counts = Counter(index for seed in range(400) for index in split_indices(groups, 0.2, seed)[1])
    assert sum(counts.values()) == 1600
    # 400 draws at 0.2: mean 80, deviation 8
    assert all(48 <= counts[index] <= 112 for index in range(20))


def test_a_new_image_moves_one_other_at_most():
    groups = [str(n) for n in range(100)]
    before = {groups[index] for index in split_indices(groups, 0.2, 1)[1]}
    more = [*groups, "new"]
    after = {more[index] for index in split_indices(more, 0.2, 1)[1]}
    assert len(before - after) <= 1


def test_two_purposes_draw_different_splits():
    groups = [str(n) for n in range(60)]
    assert split_indices(groups, 0.3, 1) != split_indices(groups, 0.3, 1, purpose="stabilized")


@pytest.mark.parametrize("groups", [["a"], ["a", "a", "a"]])
def test_a_split_that_leaves_nothing_to_train_on_is_refused(groups):
    with pytest.raises(
        ConfigError, match=r"validation_split_proportion: of \d images \(1 different ones\).*leaves none"
    ):
        split_indices(groups, 0.15, 1)


def test_the_grid_is_the_middles_of_equal_parts():
    assert timestep_grid(0, 1000) == [125, 375, 625, 875]
    assert timestep_grid(500, 1000, 2) == [625, 875]
    assert timestep_grid(7, 8) == [7, 7, 7, 7]


def curve_of(*losses):
    curve = LossCurve()
    flags = [curve.add(step, loss) for step, loss in enumerate(losses)]
    return curve, flags


def test_the_best_is_the_lowest_so_far():
    curve, flags = curve_of(3, 2, 2, 2.5, 1)
    assert flags == [True, True, False, False, True]  # an equal value is no better
    assert (curve.best_loss, curve.best_step, curve.num_since_best) == (1, 4, 0)


def test_a_value_that_is_not_a_number_is_never_the_best():
    curve, flags = curve_of(float("nan"), 2, float("nan"))
    assert flags == [False, True, False]
    assert curve.best_loss == 2


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ([5, 4, 3, 2, 1], False),
        ([1, 2, 3, 4], False),  # fewer than five
        ([1, 2, 3, 4, 5], False),  # the best is among the last five
        ([1, 2, 3, 4, 5, 6], True),
        ([1, 5, 4, 3, 2, 1.5], False),  # worse than the best, and falling
        ([1, 2, 2, 2, 2, 2], False),  # flat
        ([1, 2, 3, 2, 3, 2.9], True),  # up and down, and up on the whole
    ],
)
def test_a_rising_trend_needs_five_values_none_of_them_the_best(losses, expected):
    assert curve_of(*losses)[0].is_rising() is expected


def test_early_stopping_counts_measurements_since_the_best():
    curve, _ = curve_of(1, 2, 3)
    assert not curve.should_stop(3)
    assert curve.should_stop(2)
    assert not curve.should_stop(None)


def test_a_curve_survives_the_checkpoint():
    curve, _ = curve_of(3, 1, 2)
    restored = LossCurve.restore(json.loads(json.dumps(curve.state())))
    assert restored == curve
