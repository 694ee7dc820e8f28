"""Large images go through the VAE a few at a time, and come out as they would all together."""

import pytest
import torch

from everydream_kit.config.precision_settings import PrecisionGroup
from everydream_kit.models import latent_spaces
from everydream_kit.models.encoding import decode_latents, encode_moments
from everydream_kit.models.random_models import build_tiny_model
from everydream_kit.training.base_model import tile_large_images
from everydream_kit.training.caching import weights_identity
from everydream_kit.training.precision import Precision, choose_precision


@pytest.fixture(scope="module")
def model():
    return build_tiny_model("sd1", seed=0)


@pytest.fixture
def seen(model):
    """How many images the VAE was given, each time."""
    counts = []
    hooks = [
        module.register_forward_pre_hook(lambda module, args: counts.append(len(args[0])))
        for module in (model.vae.encoder, model.vae.decoder)
    ]
    yield counts
    for hook in hooks:
        hook.remove()


def test_images_go_through_the_vae_a_few_at_a_time(model, seen, monkeypatch):
    pixels = torch.randint(0, 256, (5, 3, 64, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    moments = encode_moments(model, pixels)
    images = decode_latents(model, moments[:, :4])
    assert seen == [5, 5]

    monkeypatch.setattr(latent_spaces, "PIXELS_TOGETHER", 2 * 64 * 96)
    moments_in_pieces = encode_moments(model, pixels)
    images_in_pieces = decode_latents(model, moments[:, :4])
    assert seen[2:] == [2, 2, 1, 2, 2, 1]
    torch.testing.assert_close(moments_in_pieces, moments, rtol=0, atol=1e-4)
    assert (images_in_pieces.int() - images.int()).abs().max() <= 1


def test_an_image_larger_than_that_goes_alone(model, seen, monkeypatch):
    monkeypatch.setattr(latent_spaces, "PIXELS_TOGETHER", 100)
    encode_moments(model, torch.zeros(2, 3, 64, 64, dtype=torch.uint8))
    assert seen == [1, 1]


def test_a_large_image_goes_through_in_tiles_where_a_gpu_computes_in_float16():
    model = build_tiny_model("sd1", seed=0)
    sides = []
    for module in (model.vae.encoder, model.vae.decoder):
        module.register_forward_pre_hook(lambda module, args: sides.append(tuple(args[0].shape[2:])))
    small, large = (torch.zeros(1, 3, 512, width, dtype=torch.uint8) for width in (512, 640))
    whole = weights_identity(model.vae)

    tile_large_images(model, choose_precision("cuda", PrecisionGroup(amp_dtype="bf16")))
    encode_moments(model, large)
    tile_large_images(model, Precision("cpu", torch.float16, torch.float32))
    assert not model.vae.use_tiling
    assert sides == [(512, 640)]

    tile_large_images(model, Precision("cuda", torch.float16, torch.float32))
    moments = encode_moments(model, large)
    images = decode_latents(model, moments[:, :4])
    assert (moments.shape, images.shape) == ((1, 8, 64, 80), (1, 3, 512, 640))
    assert sides[1:] == [(512, 512), (512, 256), (128, 512), (128, 256), (64, 64), (64, 32), (16, 64), (16, 32)]
    encode_moments(model, small)
    assert sides[9:] == [(512, 512)]
    assert weights_identity(model.vae) != whole
