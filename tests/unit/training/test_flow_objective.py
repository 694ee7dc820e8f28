"""Flow matching by hand values: path, velocity, weights, and the shift of noise levels."""

import json
import math

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_loss_weighting_for_sd3

from everydream_kit.config.objective_settings import ObjectiveGroup
from everydream_kit.errors import ConfigError
from everydream_kit.models.families import family_by_name
from everydream_kit.models.families.flux2_klein import sampling_mu
from everydream_kit.models.family import configs_folder
from everydream_kit.models.flow import mu_of, shift_of
from everydream_kit.training.objectives import build_flow_objective, build_objective
from everydream_kit.training.timesteps import draw_timesteps

TIMES = torch.tensor([250.0, 1000.0])
DYNAMIC = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}


def objective(**settings):
    return build_flow_objective(FlowMatchEulerDiscreteScheduler(), "flow_prediction", ObjectiveGroup(**settings))


def constant(value):
    return torch.full((2, 4, 3, 2), float(value))


def test_noise_is_mixed_in_along_a_straight_path():
    noisy = objective().add_noise(constant(1), constant(3), TIMES)
    assert noisy[:, 0, 0, 0].tolist() == [1.5, 3.0]  # 0.75·1 + 0.25·3; nothing but noise


def test_the_target_is_the_velocity_from_image_to_noise():
    target = objective().target(constant(1), constant(3), TIMES)
    assert target[:, 0, 0, 0].tolist() == [2.0, 2.0]  # noise - image, whatever the level


def test_the_loss_is_the_mean_square_at_every_level_unless_weighed():
    assert objective().loss(constant(0), constant(2), TIMES).tolist() == [4.0, 4.0]
    mixed = objective(loss_type="mse_huber").loss(constant(0), constant(2), TIMES)
    assert mixed.tolist() == [0.25 * 4 + 0.75 * 1.5, 4.0]  # MSE at the noise, Huber (2 - 1/2) at the image


@pytest.mark.parametrize("scheme", ["sigma_sqrt", "cosmap", "none"])
def test_weights_are_those_of_diffusers(scheme):
    sigmas = torch.tensor([0.1, 0.5, 0.9])
    ours = objective(weighting_scheme=scheme).weight(1000 * sigmas)
    assert torch.allclose(ours, compute_loss_weighting_for_sd3(scheme, sigmas))
    assert objective(weighting_scheme="cosmap").weight(TIMES)[1] == pytest.approx(2 / math.pi)


def test_a_mask_of_finer_cells_than_the_latents_is_averaged():
    error = torch.tensor([[[[2.0, 0.0]]]])  # one image, two cells of 16 pixels
    mask = torch.tensor([[[[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]]])
    assert objective().loss(error, torch.zeros_like(error), TIMES[:1], mask).tolist() == [4.0]


def test_a_shift_moves_levels_toward_the_noise_and_keeps_their_order_and_bounds():
    fractions = torch.tensor([0.0, 0.25, 0.5, 1.0], dtype=torch.float64)
    assert objective().timesteps(fractions, 0, 1000, 1.0).tolist() == [0, 250, 500, 1000]
    assert objective().timesteps(fractions, 0, 1000, 3.0).tolist() == [0, 500, 750, 1000]  # 3u / (1 + 2u)
    assert objective().timesteps(fractions, 200, 600, 3.0).tolist() == [200, 400, 500, 600]


@pytest.mark.parametrize(("width", "height", "mu"), [(256, 256, 0.5), (1024, 1024, 1.15), (512, 768, 0.71666667)])
def test_a_dynamic_shift_follows_each_buckets_own_tokens(width, height, mu):
    assert mu_of(DYNAMIC, width, height) == pytest.approx(mu)  # 256, 4096 and 1536 tokens of 16 pixels
    assert shift_of(DYNAMIC, width, height) == pytest.approx(math.exp(mu))
    assert shift_of({"shift": 3.0}, width, height) == 3.0


LIKE_FLUX = [(256, 1.648721), (512, 1.877611), (1024, 3.158193)]
SLOWER = [(256, 1.648721), (512, 1.713794), (1024, 2.000803)]  # 0.5 + 0.4 · (tokens - 256) / 7936


@pytest.mark.parametrize(
    ("family", "side", "shift"),
    [
        *((family, *one) for family in ("z_image", "flux2_klein", "flux1") for one in LIKE_FLUX),
        *(("qwen_image", *one) for one in SLOWER),
    ],
)
def test_flow_families_are_trained_with_the_shift_of_their_buckets_tokens(family, side, shift):
    table = family_by_name(family)
    config = json.loads((configs_folder(table) / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
    assert table.shift(config, side, side) == pytest.approx(shift)  # exp(0.5), exp(0.63), exp(1.15)


def test_anima_is_trained_and_sampled_with_one_shift_for_all_sizes():
    table = family_by_name("anima")
    config = json.loads((configs_folder(table) / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
    assert [table.shift(config, side, side) for side in (512, 1024)] == [3.0, 3.0]


@pytest.mark.parametrize(("side", "mu"), [(256, 0.5), (1024, 0.90625), (1280, 1.15)])
def test_krea_2_is_trained_and_sampled_with_the_shift_of_its_tokens(side, mu):
    table = family_by_name("krea2")
    config = json.loads((configs_folder(table) / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
    assert table.sampler.mu(config, side, side, 28) == pytest.approx(mu)  # 256, 4096 and 6400 tokens
    assert table.shift(config, side, side) == pytest.approx(math.exp(mu))


@pytest.mark.parametrize(
    ("side", "num_steps", "mu"),
    [(1024, 10, 2.2562455), (1024, 200, 1.1499966), (512, 50, 1.7019562), (2048, 50, 3.2299862)],
)
def test_klein_samples_with_the_shift_of_its_tokens_and_steps(side, num_steps, mu):
    assert sampling_mu({}, side, side, num_steps) == pytest.approx(mu)


def test_mode_sampling_keeps_to_the_range_and_thins_the_middle_less_than_the_ends():
    drawn = draw_timesteps(range(2000), 0, 1000, "mode", to_timesteps=objective().timesteps)
    assert drawn.min() >= 0
    assert drawn.max() <= 1000
    middle = ((drawn >= 250) & (drawn < 750)).float().mean().item()
    assert 0.55 < middle < 0.75  # uniform has a half


def test_weights_of_flow_matching_are_refused_for_diffusion():
    with pytest.raises(ConfigError, match="weighting_scheme: is for flow matching"):
        build_objective(DDPMScheduler(), "epsilon", ObjectiveGroup(weighting_scheme="cosmap"))
