"""Targets, losses and weightings, with values computed by hand and by diffusers.

The schedule of most tests has two timesteps with alphas_cumprod 0.64 and 0.36: signal rates 0.8 and 0.6, SNR 16/9 and
9/16.
"""

from typing import get_args

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, PNDMScheduler
from diffusers.training_utils import compute_snr

from everydream_kit.config.objective_settings import ObjectiveGroup
from everydream_kit.errors import ConfigError
from everydream_kit.training.objectives import _COSTS, build_objective, rescale_zero_terminal_snr

BOTH = torch.tensor([0, 1])


def two_step_scheduler():
    return DDPMScheduler(num_train_timesteps=2, trained_betas=[0.36, 0.4375])  # 1 - 0.36/0.64


def stable_diffusion_scheduler(**options):
    return DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", **options)


def objective(prediction_type="epsilon", **options):
    return build_objective(two_step_scheduler(), prediction_type, ObjectiveGroup(**options))


def constant(value):
    return torch.full((2, 4, 3, 2), float(value))


def test_noise_is_mixed_in_with_the_rates_of_the_timestep():
    noisy = objective().add_noise(constant(1), constant(2), BOTH)
    assert noisy[:, 0, 0, 0].tolist() == pytest.approx([2.0, 2.2])  # 0.8 + 0.6·2, 0.6 + 0.8·2


def test_targets_of_the_three_prediction_types():
    x, n = constant(1), constant(2)
    assert torch.equal(objective("epsilon").target(x, n, BOTH), n)
    assert torch.equal(objective("sample").target(x, n, BOTH), x)
    v = objective("v_prediction").target(x, n, BOTH)
    assert v[:, 0, 0, 0].tolist() == pytest.approx([1.0, 0.4])  # 0.8·2 - 0.6, 0.6·2 - 0.8


def test_mixing_and_v_agree_with_diffusers():
    scheduler = stable_diffusion_scheduler()
    ours = build_objective(scheduler, "v_prediction", ObjectiveGroup())
    x, n = torch.randn(5, 4, 8, 8), torch.randn(5, 4, 8, 8)
    timesteps = torch.tensor([0, 1, 500, 998, 999])
    assert torch.allclose(ours.add_noise(x, n, timesteps), scheduler.add_noise(x, n, timesteps), atol=1e-6)
    assert torch.allclose(ours.target(x, n, timesteps), scheduler.get_velocity(x, n, timesteps), atol=1e-6)
    assert torch.allclose(ours.snr(timesteps), compute_snr(scheduler, timesteps), rtol=1e-4)


@pytest.mark.parametrize("kind", [DDIMScheduler, PNDMScheduler])
def test_any_scheduler_with_a_noise_schedule_will_do(kind):
    scheduler = kind(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    assert build_objective(scheduler, "v_prediction", ObjectiveGroup()).num_timesteps == 1000


@pytest.mark.parametrize(
    ("loss_type", "expected"),
    [  # error 3 at both timesteps of T = 2: MSE 9, Huber 2.5; t/T is 0 and 1/2
        ("mse", [9.0, 9.0]),
        ("huber", [2.5, 2.5]),
        ("mse_huber", [2.5, 5.75]),
        ("huber_mse", [9.0, 5.75]),
    ],
)
def test_loss_types(loss_type, expected):
    losses = objective(loss_type=loss_type).loss(constant(4), constant(1), BOTH)
    assert losses.dtype == torch.float32
    assert losses.tolist() == pytest.approx(expected)


def test_huber_is_half_the_square_of_small_errors():
    assert objective(loss_type="huber").loss(constant(0.5), constant(0), BOTH).tolist() == [0.125, 0.125]


def test_losses_are_computed_in_float32_whatever_the_model_runs_in():
    prediction = torch.full((1, 4, 2, 2), 300.0, dtype=torch.float16)  # its square is beyond float16
    losses = objective().loss(prediction, torch.zeros_like(prediction), torch.tensor([0]))
    assert losses.tolist() == [90000.0]


@pytest.mark.parametrize(
    ("prediction_type", "expected"),
    [
        ("epsilon", [9 / 16, 1]),  # min(SNR, 1) / SNR
        ("v_prediction", [9 / 25, 9 / 25]),  # 1 / (16/9 + 1), (9/16) / (9/16 + 1)
        ("sample", [1, 9 / 16]),  # min(SNR, 1)
    ],
)
def test_min_snr_weights(prediction_type, expected):
    one = objective(prediction_type, min_snr_gamma=1.0)
    assert one.weight(BOTH).tolist() == pytest.approx(expected)
    assert one.loss(constant(1), constant(0), BOTH).tolist() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("prediction_type", "expected"),
    [("epsilon", [3 / 4, 4 / 3]), ("v_prediction", [12 / 25, 12 / 25]), ("sample", [4 / 3, 3 / 4])],
)
def test_debiased_estimation_weights(prediction_type, expected):
    assert objective(prediction_type, debiased_estimation=True).weight(BOTH).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("options", [{"min_snr_gamma": 5.0}, {"debiased_estimation": True}])
def test_a_weighting_means_the_same_for_epsilon_and_v(options):
    """The same prediction, said as epsilon or as v, costs the same: errors of x, epsilon and v are proportional."""
    scheduler = stable_diffusion_scheduler()
    timesteps = torch.tensor([10, 300, 700, 990])
    x, n, wrong_x = torch.randn(4, 4, 8, 8), torch.randn(4, 4, 8, 8), torch.randn(4, 4, 8, 8)
    epsilon, v = (build_objective(scheduler, kind, ObjectiveGroup(**options)) for kind in ("epsilon", "v_prediction"))
    noisy = epsilon.add_noise(x, n, timesteps)
    a = scheduler.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    wrong_n = (noisy - a.sqrt() * wrong_x) / (1 - a).sqrt()
    cost_epsilon = epsilon.loss(wrong_n, epsilon.target(x, n, timesteps), timesteps)
    cost_v = v.loss(v.target(wrong_x, wrong_n, timesteps), v.target(x, n, timesteps), timesteps)
    assert torch.allclose(cost_epsilon, cost_v, rtol=1e-3)


def test_without_weighting_every_timestep_weighs_one():
    assert objective().weight(BOTH).tolist() == [1.0, 1.0]


def test_debiased_estimation_is_bounded():
    weights = build_objective(stable_diffusion_scheduler(), "epsilon", ObjectiveGroup(debiased_estimation=True)).weight(
        torch.arange(1000)
    )
    assert weights.min().item() == pytest.approx(1000**-0.5)  # SNR 1175 at the first timestep
    assert weights.max().item() == pytest.approx(14.6, abs=0.1)  # 1 / sqrt(0.00468)


def test_a_mask_weighs_the_cells_and_keeps_the_images_weight():
    prediction = torch.zeros(2, 4, 2, 2)
    prediction[:, :, 0, 0] = 2.0  # squared error 4 in one cell of four
    mask = torch.zeros(2, 1, 2, 2)
    mask[0, :, 0, :] = 1.0  # the upper row of the first image: (4 + 0) / 2
    mask[1, :, 0, 0] = 0.25  # a quarter of the one cell: still a mean, 4
    losses = objective().loss(prediction, torch.zeros_like(prediction), BOTH, mask)
    assert losses.tolist() == pytest.approx([2.0, 4.0])


def test_a_full_mask_is_no_mask_and_an_empty_one_costs_nothing():
    prediction, target = torch.randn(2, 4, 3, 2), torch.randn(2, 4, 3, 2)
    plain = objective().loss(prediction, target, BOTH)
    assert torch.allclose(objective().loss(prediction, target, BOTH, torch.ones(2, 1, 3, 2)), plain)
    assert objective().loss(prediction, target, BOTH, torch.zeros(2, 1, 3, 2)).tolist() == [0.0, 0.0]


def test_four_images_at_once_give_the_gradients_of_two_and_two():
    one = build_objective(stable_diffusion_scheduler(), "epsilon", ObjectiveGroup(min_snr_gamma=5.0))
    x, n, timesteps = torch.randn(4, 4, 8, 8), torch.randn(4, 4, 8, 8), torch.tensor([3, 200, 700, 999])

    def gradient(parts):
        torch.manual_seed(0)
        model = torch.nn.Conv2d(4, 4, 3, padding=1)
        for part in parts:
            noisy = one.add_noise(x[part], n[part], timesteps[part])
            losses = one.loss(model(noisy), one.target(x[part], n[part], timesteps[part]), timesteps[part])
            (losses.sum() / 4).backward()
        return model.weight.grad

    whole = gradient([slice(0, 4)])
    assert torch.allclose(whole, gradient([slice(0, 2), slice(2, 4)]), atol=1e-6)
    assert torch.allclose(whole, gradient([slice(0, 3), slice(3, 4)]), atol=1e-6)  # a short last batch


def test_zero_terminal_snr_ends_without_signal_and_keeps_the_first_timestep():
    scheduler = stable_diffusion_scheduler(prediction_type="v_prediction")
    rescaled = rescale_zero_terminal_snr(scheduler, "v_prediction")
    assert rescaled.alphas_cumprod[-1].item() == pytest.approx(0.0, abs=1e-9)
    assert rescaled.alphas_cumprod[0].item() == pytest.approx(scheduler.alphas_cumprod[0].item(), abs=1e-6)
    assert rescaled.config.rescale_betas_zero_snr is True
    ours = build_objective(rescaled, "v_prediction", ObjectiveGroup(min_snr_gamma=5.0))
    last = torch.tensor([999])
    x, n = torch.ones(1, 4, 2, 2), torch.full((1, 4, 2, 2), 2.0)
    assert torch.allclose(ours.add_noise(x, n, last), n)
    assert torch.allclose(ours.target(x, n, last), -x)
    assert ours.weight(last).isfinite().all()


def test_zero_terminal_snr_is_refused_for_epsilon():
    with pytest.raises(ConfigError, match=r"enable_zero_terminal_snr.*v-prediction"):
        rescale_zero_terminal_snr(stable_diffusion_scheduler(), "epsilon")
    rescaled = stable_diffusion_scheduler(rescale_betas_zero_snr=True)
    with pytest.raises(ConfigError, match="enable_zero_terminal_snr"):
        build_objective(rescaled, "epsilon", ObjectiveGroup())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prediction_type": "noise"}, "prediction_type: must be one of epsilon, v_prediction, sample .*'noise'"),
        ({"min_snr_gamma": 5.0, "debiased_estimation": True}, "min_snr_gamma, debiased_estimation"),
    ],
)
def test_what_makes_no_sense_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        objective(**options)


def test_the_setting_offers_every_loss():
    assert get_args(ObjectiveGroup.model_fields["loss_type"].annotation) == tuple(_COSTS)
