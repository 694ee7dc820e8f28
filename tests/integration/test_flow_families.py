"""Families of flow transformers: what the kit makes of them against diffusers' own pipelines."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from flow_cases import CASES, FLOW, fed_to_the_decoder, ours, pipeline_of, theirs
from tiny_models import tiny_folder

from everydream_kit.config.objective_settings import ObjectiveGroup
from everydream_kit.errors import ConfigError
from everydream_kit.models import sampling
from everydream_kit.models.encoding import (
    Sizes,
    decode_latents,
    encode_captions,
    encode_moments,
    latents_from_moments,
)
from everydream_kit.models.families import FAMILIES
from everydream_kit.models.loading import load_model
from everydream_kit.models.model_saving import save_model
from everydream_kit.models.number_formats import Formats
from everydream_kit.models.random_models import build_tiny_model, write_model
from everydream_kit.models.sampling import SamplePrompt, sample_images
from everydream_kit.training.objectives import build_flow_objective, denoising_losses

FRAMES = ("anima", "krea2", "qwen_image")
"""Families whose VAE knows an image as the frame of a video."""
LATENTS_APART = 2e-5
"""Of their spread: rounding makes 2e-6, and the least that was ever wrong, one token of a template, 3e-4."""
LONG = "ugly, blurred, and much longer than the other prompt"


SHORT_TEXTS = {
    **{"qwen_text.MAX_TOKENS": 48, "families.flux1.MAX_TOKENS": 48},
    **{"families.krea2.INSTRUCTION": "", "families.krea2.NUM_INSTRUCTION": 0},
    **{"families.qwen_image.TEMPLATE": "{}", "families.qwen_image.DROPPED": 0},
}
"""Less padding and less template to attend to, where only the objective matters."""


@pytest.fixture(params=FLOW)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_a_sample_is_the_image_of_diffusers_pipeline(family: str) -> None:
    """Template, layers, padding, packing, positions, sign, shift, scales and guidance together.

    Some of them change an image of so small a model by less than one of 256 levels, so its latents are compared as well.
    """
    model, pipeline = load_model(tiny_folder(family)), pipeline_of(tiny_folder(family))
    for asked in ({}, {"negative": LONG}, {"cfg": 1.0}):
        with fed_to_the_decoder(model.vae) as own, fed_to_the_decoder(pipeline.vae) as others:
            image = ours(model, **asked)
            assert image.std() > 20
            assert np.abs(image - theirs(family, pipeline, **asked)).max() <= 1
        torch.testing.assert_close(own[0], others[0], rtol=0, atol=LATENTS_APART * float(others[0].std()))


def test_latents_that_are_trained_on_are_those_that_are_decoded(family: str) -> None:
    """Of an image that the VAE itself encodes: with their mean, and with noise of the posterior where the family draws."""
    model = load_model(tiny_folder(family))
    pixels = torch.randint(0, 256, (1, 3, 64, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    shape = model.family.latent_space.shape(model, 96, 64)
    moments, vae = encode_moments(model, pixels), model.vae
    own = (pixels / 127.5 - 1).unsqueeze(2) if family in FRAMES else pixels / 127.5 - 1
    with torch.no_grad():
        posterior = vae.encode(own).latent_dist  # type: ignore[operator]
    for scale in (0.0, 1.0):
        noise = scale * torch.randn(1, *shape, generator=torch.Generator().manual_seed(1))
        drawn = posterior.mean
        if family != "flux2_klein":  # which takes the mean alone
            drawn = drawn + posterior.std * noise.view(drawn.shape)
        with torch.no_grad():
            expected = vae.decode(drawn).sample.reshape(1, 3, 64, 96)  # type: ignore[operator]
        found = decode_latents(model, latents_from_moments(model, moments, noise))
        assert (found.int() - ((expected / 2 + 0.5).clamp(0, 1) * 255).round().int()).abs().max() <= 1


def test_the_distilled_krea_2_is_sampled_with_its_own_shift_and_stays_what_it_is(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_folder("krea2"), tmp_path / "distilled"))
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    (folder / "model_index.json").write_text(json.dumps({**index, "is_distilled": True}), encoding="utf-8")
    model = load_model(folder)
    image = ours(model, cfg=1.0)
    assert np.abs(image - ours(load_model(tiny_folder("krea2")), cfg=1.0)).max() > 1
    assert np.abs(image - theirs("krea2", pipeline_of(folder), cfg=1.0)).max() <= 1
    save_model(model, tmp_path / "again")
    assert json.loads((tmp_path / "again" / "model_index.json").read_text(encoding="utf-8"))["is_distilled"] is True
    assert np.abs(image - ours(load_model(tmp_path / "again"), cfg=1.0)).max() <= 1


def test_a_text_next_to_a_longer_one_is_what_it_is_alone(family: str) -> None:
    """To 1e-5, where an image of 255 levels hides a token that should be masked."""
    model = load_model(tiny_folder(family))
    noisy = torch.randn(1, *model.family.latent_space.shape(model, 64, 64), generator=torch.Generator().manual_seed(0))

    def predicted(prompts: list[str]) -> torch.Tensor:
        texts, sizes = encode_captions(model, prompts), Sizes.uncropped(64, 64, len(prompts))
        count = len(prompts)
        return model.family.predict(model, noisy.expand(count, -1, -1, -1), torch.full((count,), 500.0), texts, sizes)

    with torch.no_grad():
        torch.testing.assert_close(predicted(["a cat", LONG])[:1], predicted(["a cat"]), rtol=1e-4, atol=1e-5)


def test_krea_2_sees_of_each_token_what_diffusers_pipeline_gives_it() -> None:
    theirs, mask = pipeline_of(tiny_folder("krea2")).encode_prompt("a cat", device=torch.device("cpu"))
    with torch.no_grad():
        own = encode_captions(load_model(tiny_folder("krea2")), ["a cat"]).encoder_hidden_states
    torch.testing.assert_close(own[0], theirs.detach()[mask].flatten(1), rtol=1e-4, atol=1e-5)


def test_an_overfitted_model_samples_the_image_it_has_seen(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong sign or scale of the target cannot pass."""
    for name, value in SHORT_TEXTS.items():
        monkeypatch.setattr(f"everydream_kit.models.{name}", value)
    model = build_tiny_model(family, denoiser=CASES[family].wide)
    generator = torch.Generator().manual_seed(1)
    shape = model.family.latent_space.shape(model, 32, 32)
    latents = torch.randn(1, shape[0], 1, 1, generator=generator).expand(8, *shape)  # one color
    with torch.no_grad():
        conditioning = encode_captions(model, ["a cat"]).rows([0] * 8)
    objective = build_flow_objective(model.noise_scheduler, model.prediction_type, ObjectiveGroup())
    optimizer = torch.optim.Adam(model.denoiser.parameters(), lr=5e-3, betas=(0.9, 0.99))
    sizes = Sizes.uncropped(32, 32, 8)
    for step in range(220):
        optimizer.param_groups[0]["lr"] = 5e-3 * (1 - step / 220)
        noise = torch.randn(8, *shape, generator=generator)
        fractions = (torch.arange(8) + torch.rand(8, generator=generator)) / 8
        timesteps = objective.timesteps(fractions, 0, 1000, 1.0)

        def predict(noisy: torch.Tensor, at: torch.Tensor = timesteps) -> torch.Tensor:
            return model.family.predict(model, noisy, at, conditioning, sizes)

        optimizer.zero_grad()
        denoising_losses(objective, predict, latents, noise, timesteps).mean().backward()
        optimizer.step()
    sampled: list[torch.Tensor] = []
    decode = sampling.decode_latents
    monkeypatch.setattr(sampling, "decode_latents", lambda model, drawn: sampled.append(drawn) or decode(model, drawn))
    for num_steps in (8, 1):  # one step goes the whole way at once: many would come to the image at any scale
        sample_images(
            model, [SamplePrompt("a cat", seed=3, width=32, height=32, cfgs=(1.0,))], num_inference_steps=num_steps
        )
    errors = [(one - latents[:1]).square().mean() / latents.square().mean() for one in sampled]
    assert max(errors) < 0.15, errors


def test_flux1_is_given_a_guidance_of_1_in_training_and_schnell_none(tmp_path: Path) -> None:
    model = load_model(tiny_folder("flux1"))
    with torch.no_grad():
        conditioning = encode_captions(model, ["a cat"])
        noisy, times, sizes = torch.randn(1, 16, 4, 4), torch.tensor([300.0]), Sizes.uncropped(32, 32, 1)
        predicted = [model.family.predict(model, noisy, times, conditioning, sizes)]
        for scale in (1.0, 3.5):
            guided = replace(conditioning, guidance=torch.tensor([scale]))
            predicted.append(model.family.predict(model, noisy, times, guided, sizes))
    assert torch.equal(predicted[0], predicted[1])
    assert not torch.allclose(predicted[1], predicted[2], atol=1e-3)
    schnell = write_model(build_tiny_model("flux1", denoiser={"guidance_embeds": False}), tmp_path / "renamed")
    path = schnell / "scheduler" / "scheduler_config.json"
    path.write_text('{"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 1.0}', encoding="utf-8")
    assert "distilled to few steps" in (FAMILIES["flux1"].distilled(str(schnell)) or "")
    assert FAMILIES["flux1"].distilled(str(tiny_folder("flux1"))) is None
    assert np.abs(ours(load_model(schnell)) - theirs("flux1", pipeline_of(schnell))).max() <= 1


def test_a_scheduler_of_diffusion_is_refused(family: str) -> None:
    with pytest.raises(ConfigError, match="a flow model is sampled with euler"):
        sample_images(load_model(tiny_folder(family)), [SamplePrompt("x", width=64, height=64)], scheduler="dpm++_2m")


def test_klein_of_each_size_names_its_own_base() -> None:
    distilled = FAMILIES["flux2_klein"].distilled
    assert "klein-base-9B" in (distilled("black-forest-labs/FLUX.2-klein-9B") or "")
    assert "klein-base-4B" in (distilled("black-forest-labs/FLUX.2-klein-4B") or "")
    assert distilled("black-forest-labs/FLUX.2-klein-base-9B") is None


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # torch's norms are slower then
def test_a_base_in_half_precision_predicts_what_it_does_in_float32(family: str) -> None:
    """Under autocast, norms and embeddings are float32, and matrices are not."""
    found = []
    for formats in (Formats(), Formats(frozen=torch.bfloat16)):
        model = load_model(tiny_folder(family), dtype=formats)
        shape = model.family.latent_space.shape(model, 64, 64)
        noisy = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=formats.frozen is not None):
            texts = encode_captions(model, ["a cat", ""])
            timesteps, sizes = torch.tensor([300.0, 700.0]), Sizes.uncropped(64, 64, 2)
            found.append(model.family.predict(model, noisy, timesteps, texts, sizes))
    assert (found[0] - found[1]).abs().mean() < 0.05 * found[0].abs().mean()
