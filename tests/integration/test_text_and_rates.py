"""Whole words, no text at all, and rates that are checked and logged before and while a run trains."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rehearsals import plain_settings, prepared, square_images
from tiny_models import tiny_folder

from everydream_kit.errors import ConfigError
from everydream_kit.models.clip_text import tokenize
from everydream_kit.models.encoding import encode_captions
from everydream_kit.models.loading import load_model
from everydream_kit.models.sampling import SamplePrompt, sample_images
from everydream_kit.models.sampling_schedulers import build_scheduler
from everydream_kit.models.tokens import add_tokens, expand_tokens
from everydream_kit.sessions import train


@pytest.fixture
def settings(tmp_path: Path, tiny_model_folder: Path) -> dict[str, Any]:
    return {**plain_settings(tmp_path, tiny_model_folder, square_images(tmp_path / "pictures")), "max_steps": 1}


# New tokens -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def with_tokens() -> Any:
    """Tokens that begin alike: of several vectors, of one, and in brackets."""
    model = load_model(tiny_folder("sd1"))
    add_tokens(model, {"zkx": "red square", "zkx2": "blue round thing", "<zk>": "cat dog", "qwv": "cat", "qwv2": "dog"})
    return model


@pytest.mark.parametrize(
    ("caption", "expanded"),
    [
        ("a zkx", "a zkx zkx_1"),
        ("a zkx2", "a zkx2 zkx2_1 zkx2_2"),
        ("zkx2, zkx and ZKX2", "zkx2 zkx2_1 zkx2_2, zkx zkx_1 and zkx2 zkx2_1 zkx2_2"),
        ("zkxs and azkx stay", "zkxs and azkx stay"),
        ("of<zk>s", "of<zk> <zk>_1s"),
        ("qwv2 qwv", "qwv2 qwv"),
    ],
)
def test_the_longest_token_is_found_as_a_whole_word(with_tokens: Any, caption: str, expanded: str) -> None:
    assert expand_tokens(with_tokens, caption) == expanded


def test_the_tokenizer_finds_whole_words_too(with_tokens: Any) -> None:
    tokenizer = with_tokens.tokenizers[0]
    one, two, first = tokenizer.convert_tokens_to_ids(["qwv", "qwv2", "zkx"])

    def ids(text: str) -> list[int]:
        return tokenize(tokenizer, [text])[0, 0, 1:].tolist()

    assert ids("qwv2")[0] == two and ids("qwv, red")[0] == one
    assert not {one, two, first} & {*ids("qwvs"), *ids("zkxa"), *ids("aqwv")}


# No text --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_sdxl_without_a_negative_prompt_samples_what_diffusers_does(prediction_type: str) -> None:
    from diffusers import StableDiffusionXLPipeline

    model = load_model(tiny_folder("sdxl"), prediction_type=prediction_type)
    pipe = StableDiffusionXLPipeline.from_pretrained(tiny_folder("sdxl"), add_watermarker=False)
    pipe.scheduler = build_scheduler(model, "ddim")
    pipe.set_progress_bar_config(disable=True)
    for negative in (None, "blue"):
        prompt = SamplePrompt("a red square", negative or "", 4, 64, 64, (5.0,))
        [ours] = sample_images(model, [prompt], num_inference_steps=3)
        generator = torch.Generator("cpu").manual_seed(4)
        size = {"width": 64, "height": 64, "num_inference_steps": 3, "guidance_scale": 5.0, "generator": generator}
        theirs = pipe("a red square", negative_prompt=negative, **size).images[0]
        assert np.abs(np.asarray(ours).astype(int) - np.asarray(theirs)).max() <= 1


@pytest.mark.parametrize(("family", "zeros"), [("sd1", False), ("sd2", False), ("sdxl", True)])
def test_a_dropped_caption_is_what_the_family_was_trained_with(family: str, zeros: bool) -> None:
    model = load_model(tiny_folder(family))
    model.text_encoders[0].requires_grad_(True)
    encoded = encode_captions(model, ["", "red", " "])
    rows = encoded.encoder_hidden_states.abs().amax(dim=(1, 2)).tolist()
    assert (rows[0] == 0) is zeros and rows[1] > 0 and rows[2] > 0
    assert encoded.encoder_hidden_states.requires_grad
    if encoded.pooled is not None:
        assert encoded.pooled[0].abs().max() == 0 and encoded.pooled[1].abs().max() > 0


# Rates ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"lr_scheduler": "cosine", "lr_warmup_steps": 9, "lr_decay_steps": 9},
        {"optimizer_config": {"base": {"lr_scheduler": "linear", "lr_warmup_steps": 5, "lr_decay_steps": 2}}},
        {"lr_scheduler": "polynomial", "lr_warmup_steps": 50},
    ],
)
def test_a_decay_that_ends_before_the_warm_up_is_refused_before_the_first_step(
    settings: dict[str, Any], changes: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError, match="lr_decay_steps, lr_warmup_steps: the decay must end after"):
        prepared(**{**settings, "max_steps": 3, **changes}).__enter__()


def test_a_warm_up_longer_than_the_run_is_a_warning(settings: dict[str, Any]) -> None:
    with prepared(**{**settings, "lr_warmup_steps": 50, "disable_textenc_training": True}) as rehearsal:
        assert (
            "the warm-up of the unet takes 50 steps and the run 1, so its rate never reaches lr" in rehearsal.warnings
        )


def test_the_log_has_the_rates_that_are_used(settings: dict[str, Any]) -> None:
    text = {"text_encoder_overrides": {"lr": 5e-5, "lr_scheduler": "cosine"}}
    run = train(
        {**settings, "scale_lr": True, "batch_size": 2, "max_steps": 2, "log_step": 2, "optimizer_config": text}
    )
    log = run.log_path.read_text("utf-8")
    # 2 images a step: 1e-4 and 5e-5 times 2^0.55 = 1.464; the cosine over 3 steps stands at 3/4 in the second one
    assert "Learning rate of the unet: 0.000146409 (scale_lr: 0.0001 times 1.464), constant, warm-up 0 steps." in log
    assert "Learning rate of the text encoder: 7.32043e-05 (scale_lr: 5e-05 times 1.464), cosine, warm-up 0" in log
    assert re.search(r"INFO step 2, epoch 1: loss \d\.\d{4}, lr unet 0\.0001464, lr text encoder 5\.49e-05, \d", log)


@pytest.mark.parametrize(("tweaks", "interval"), [(None, 2000), (True, 2000), (False, 25)])
def test_the_grad_scalers_step_tweaks_can_be_switched_off(settings: dict[str, Any], tweaks: Any, interval: int) -> None:
    changes = {"amp_dtype": "fp16", "optimizer_config": {"apply_grad_scaler_step_tweaks": tweaks}}
    with prepared(**{**settings, **changes}) as rehearsal:
        run = rehearsal.run
        run.learner.precision.num_steps = 5000
        loss = sum(parameter.square().sum() for parameter in run.learner.parameters())
        run.learner.precision.scale(loss).backward()
        run.learner.update_weights(5000)
        assert run.learner.precision.scaler.get_growth_interval() == interval
