"""Noise: plain, offset, pyramid, and perturbations."""

import pytest
import torch
import torch.nn.functional as F

from everydream_kit.draws import torch_generator
from everydream_kit.training.noise import make_noise, perturb_embeddings, perturb_input, standard_normal

SHAPE = (4, 24, 16)
OPTIONS = [{}, {"offset": 0.1}, {"pyramid_discount": 0.5}, {"offset": 0.1, "pyramid_discount": 0.5}]


@pytest.mark.parametrize("options", OPTIONS)
def test_an_images_noise_does_not_depend_on_the_batch_around_it(options):
    together = make_noise(SHAPE, [11, 22, 33], **options)
    assert together.shape == (3, *SHAPE)
    for row, seed in enumerate([11, 22, 33]):
        assert torch.equal(together[row], make_noise(SHAPE, [seed], **options)[0])


def test_seeds_and_generators_mean_the_same():
    generator = torch_generator(555, "noise", 0, "a.jpg", 0)
    same = torch_generator(555, "noise", 0, "a.jpg", 0)
    assert torch.equal(make_noise(SHAPE, [generator]), make_noise(SHAPE, [same]))
    assert not torch.equal(make_noise(SHAPE, [1]), make_noise(SHAPE, [2]))


def test_plain_noise_is_standard_normal():
    noise = make_noise((4, 64, 64), list(range(32)))  # 524 288 numbers: standard error of the mean 0.0014
    assert noise.mean().abs() < 0.007
    assert (noise.std() - 1).abs() < 0.005


def test_offset_noise_adds_one_constant_to_each_channel():
    sources = list(range(500))
    added = make_noise(SHAPE, sources, offset=0.25) - make_noise(SHAPE, sources)
    assert added.std(dim=(2, 3)).max() < 1e-6  # constant over a channel
    constants = added[:, :, 0, 0]  # (500, 4), N(0, 0.25²)
    assert (constants.std() - 0.25).abs() < 0.02
    assert constants.mean().abs() < 0.03


def test_offset_and_pyramid_leave_each_others_numbers_alone():
    both = make_noise(SHAPE, [5], offset=0.25, pyramid_discount=0.5)
    added_to_pyramid = both - make_noise(SHAPE, [5], pyramid_discount=0.5)
    added_to_plain = make_noise(SHAPE, [5], offset=0.25) - make_noise(SHAPE, [5])
    assert torch.allclose(added_to_pyramid, added_to_plain, atol=1e-6)


def test_pyramid_noise_keeps_the_spread_of_each_image_and_has_more_coarse_structure():
    sources = list(range(200))
    plain, pyramid = make_noise((4, 32, 32), sources), make_noise((4, 32, 32), sources, pyramid_discount=0.7)
    assert torch.allclose(pyramid.std(dim=(1, 2, 3)), torch.ones(200), atol=1e-5)
    coarse_plain, coarse = F.avg_pool2d(plain, 8).var(), F.avg_pool2d(pyramid, 8).var()
    assert (coarse_plain - 1 / 64).abs() < 0.002  # the mean of 64 independent numbers
    assert coarse > 5 * coarse_plain


def test_each_coarser_level_weighs_a_further_factor_of_the_discount():
    """The mean of an image comes from the coarsest levels. With weights d, d², d³ ... its variance is about 0.001 for
    d = 0.3, a quarter of it from the base noise (1/4096); if every level weighed d it would be above 0.1.
    """
    images = make_noise((4, 64, 64), list(range(200)), pyramid_discount=0.3)
    assert 0.0003 < images.mean(dim=(2, 3)).var() < 0.003


def test_a_small_pyramid_discount_changes_little():
    plain, pyramid = make_noise(SHAPE, [3]), make_noise(SHAPE, [3], pyramid_discount=0.03)
    correlation = torch.corrcoef(torch.stack([plain.flatten(), pyramid.flatten()]))[0, 1]
    assert correlation > 0.99


@pytest.mark.parametrize("shape", [(4, 1, 1), (4, 2, 2), (4, 8, 1), (16, 3, 5)])
def test_pyramid_noise_works_on_tiny_latents(shape):
    assert make_noise(shape, [1], pyramid_discount=0.5).isfinite().all()


def test_input_perturbation_adds_gamma_times_fresh_noise():
    noise = make_noise((4, 64, 64), list(range(8)))
    perturbed = perturb_input(noise, 0.1, list(range(100, 108)))
    added = perturbed - noise
    assert (added.std() - 0.1).abs() < 0.001
    assert torch.corrcoef(torch.stack([added.flatten(), noise.flatten()]))[0, 1].abs() < 0.02
    assert torch.equal(perturbed[3], perturb_input(noise[3:4], 0.1, [103])[0])


def test_embedding_perturbation_has_the_spread_gamma_over_root_dim_and_lets_gradients_through():
    embeddings = torch.zeros(8, 77, 64, requires_grad=True)
    perturbed = perturb_embeddings(embeddings, 2.0, standard_normal(tuple(embeddings.shape[1:]), list(range(8))))
    assert (perturbed.std() - 0.25).abs() < 0.005  # 2 / sqrt(64)
    perturbed.sum().backward()
    assert torch.equal(embeddings.grad, torch.ones_like(embeddings))


def test_perturbations_keep_the_type():
    embeddings = torch.zeros(1, 77, 64, dtype=torch.bfloat16)
    assert perturb_embeddings(embeddings, 1.0, torch.zeros(1, 77, 64)).dtype == torch.bfloat16
