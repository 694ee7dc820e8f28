"""Drawing timesteps."""

import pytest
import torch

from everydream_kit.errors import ConfigError
from everydream_kit.training.timesteps import draw_timesteps


@pytest.mark.parametrize("how", ["uniform", "logit_normal"])
def test_an_images_timestep_does_not_depend_on_the_batch_around_it(how):
    together = draw_timesteps([1, 2, 3], 0, 1000, how)
    assert together.dtype == torch.int64
    assert together.tolist() == [draw_timesteps([seed], 0, 1000, how).item() for seed in (1, 2, 3)]


@pytest.mark.parametrize("how", ["uniform", "logit_normal", "stratified"])
def test_timesteps_keep_to_the_bounds_and_reach_both(how):
    drawn = draw_timesteps(list(range(400)), 10, 14, how, positions=list(range(400)), num_images=400, step_generator=0)
    assert set(drawn.tolist()) == {10, 11, 12, 13}  # the end is exclusive


def test_one_timestep_can_be_asked_for():
    assert draw_timesteps([1, 2], 999, 1000).tolist() == [999, 999]


def test_uniform_timesteps_are_uniform():
    drawn = draw_timesteps(list(range(4000)), 0, 1000)
    counts = torch.bincount(drawn // 250, minlength=4)
    assert (counts - 1000).abs().max() < 110  # 4 standard deviations of binomial(4000, 1/4)


def test_logit_normal_timesteps_favor_the_middle():
    drawn = draw_timesteps(list(range(4000)), 0, 1000, "logit_normal")
    middle = ((drawn >= 250) & (drawn < 750)).float().mean().item()
    assert middle == pytest.approx(0.728, abs=0.03)  # P(|z| < ln 3) for a standard normal z


@pytest.mark.parametrize("step", range(5))
def test_a_stratified_step_has_one_image_in_each_part_of_the_range(step):
    drawn = draw_timesteps(range(8), 0, 1000, "stratified", positions=range(8), num_images=8, step_generator=step)
    assert sorted((drawn // 125).tolist()) == [0, 1, 2, 3, 4, 5, 6, 7]


def test_a_stratified_step_is_the_same_in_one_batch_in_two_and_on_two_ranks():
    def draw(positions):
        sources = [100 + position for position in positions]
        options = {"positions": positions, "num_images": 4, "step_generator": 7}
        return draw_timesteps(sources, 0, 1000, "stratified", **options).tolist()

    assert draw([0, 1, 2, 3]) == draw([0, 1]) + draw([2, 3])
    assert draw([0, 1, 2, 3]) == [draw([position])[0] for position in range(4)]


def test_positions_do_not_tie_images_to_a_noise_level():
    def first(step):
        return draw_timesteps([0], 0, 1000, "stratified", positions=[0], num_images=4, step_generator=step).item()

    drawn = torch.tensor([first(step) for step in range(2000)])
    counts = torch.bincount(drawn // 250, minlength=4)
    assert (counts - 500).abs().max() < 80  # 4 standard deviations


def test_a_filler_past_the_last_image_gets_some_timestep():
    drawn = draw_timesteps([0], 0, 1000, "stratified", positions=[5], num_images=3, step_generator=1)
    assert 0 <= drawn.item() < 1000


@pytest.mark.parametrize(("start", "end"), [(5, 5), (6, 5)])
def test_a_start_that_is_not_below_the_end_is_refused(start, end):
    with pytest.raises(ConfigError, match=f"start must be below the end.*{start} and {end}"):
        draw_timesteps([1], start, end)


def test_an_unknown_way_of_drawing_is_refused():
    with pytest.raises(ConfigError, match=r"timestep_sampling: must be uniform.*'normal'"):
        draw_timesteps([1], 0, 1000, "normal")


def test_stratified_without_positions_is_a_programming_error():
    with pytest.raises(ValueError, match="need positions"):
        draw_timesteps([1], 0, 1000, "stratified")
