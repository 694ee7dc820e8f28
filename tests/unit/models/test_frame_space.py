"""The latents of Qwen-Image's VAE, which Anima, Krea 2 and Qwen-Image share: an image is one frame of a video."""

import dataclasses

import pytest
import torch

from everydream_kit.models.components import build_component
from everydream_kit.models.latent_spaces import QWEN_IMAGE_VAE, frame_space
from everydream_kit.models.random_models import build_tiny_model

MEAN, SPREAD = [0.5, -1.0], [2.0, 4.0]
TINY = {"base_dim": 8, "z_dim": 2, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}


@pytest.fixture(scope="module")
def model():
    vae = build_component(QWEN_IMAGE_VAE, {**TINY, "latents_mean": MEAN, "latents_std": SPREAD}, "cpu").eval()
    return dataclasses.replace(build_tiny_model("sd1"), vae=vae.requires_grad_(False))


def test_latents_are_a_draw_of_the_posterior_with_each_channel_standardized(model):
    moments = torch.tensor([2.5, 3.0, 0.0, 1.3862944]).view(1, 4, 1, 1)  # means, then ln 1 and ln 4
    noise = torch.tensor([-1.0, 1.0]).view(1, 2, 1, 1)
    latents = frame_space(2).latents(model, moments, noise)
    # (2.5 - 1 - 0.5) / 2 and (3 + 2 + 1) / 4
    torch.testing.assert_close(latents.flatten(), torch.tensor([0.5, 1.5]))


def test_an_image_is_encoded_and_decoded_as_one_frame(model):
    space = frame_space(2)
    assert space.shape(model, 32, 16) == (2, 2, 4)
    pixels = torch.randint(0, 256, (2, 3, 16, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    moments = space.encode(model, pixels)
    assert moments.shape == (2, 2 * 2, 2, 4)
    theirs = model.vae.encode((pixels / 127.5 - 1).unsqueeze(2)).latent_dist
    torch.testing.assert_close(moments, theirs.parameters[:, :, 0])
    latents = space.latents(model, moments, torch.zeros(2, 2, 2, 4))
    expected = ((model.vae.decode(theirs.mean).sample[:, :, 0] / 2 + 0.5) * 255).round().to(torch.uint8)
    assert (space.decode(model, latents).int() - expected.int()).abs().max() <= 1
