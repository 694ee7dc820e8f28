"""What decides over `speed: auto` on a GPU: every candidate gives plain numbers, and replayed samples are eager ones."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
from rehearsals import plain_settings, square_images
from tiny_models import tiny_folder

from everydream_kit.config import TrainConfig
from everydream_kit.models.captures import CAPTURES
from everydream_kit.models.loading import load_model
from everydream_kit.models.sampling import SamplePrompt, sample_images
from everydream_kit.runs import RunFolder
from everydream_kit.training.journal import Journal
from everydream_kit.training.ranks import Ranks
from everydream_kit.training.run_builder import build_run
from everydream_kit.training.speed_choice import CANDIDATES, SpeedTrial

pytestmark = pytest.mark.needs_cuda


@pytest.mark.parametrize("amp_dtype", ["bf16", "fp16"])
def test_graphs_and_channels_last_give_the_numbers_of_plain_passes(tmp_path: Path, amp_dtype: str) -> None:
    settings = plain_settings(tmp_path, tiny_folder("sd1"), square_images(tmp_path / "images"))
    config = TrainConfig(**settings, speed="auto", amp_dtype=amp_dtype)
    folder = RunFolder.create(config.logdir, config.project_name)
    journal = Journal(folder)
    try:
        build_run(
            config, folder, journal, Ranks.find(), speed_trial=SpeedTrial(candidates=CANDIDATES[:2], min_passes=1)
        )
    finally:
        journal.close()
    (event,) = folder.events("speed")
    print(event["seconds"])
    assert {"plain", "channels_last", "cuda_graphs"} <= event["seconds"].keys(), event["not_used"]


@pytest.mark.parametrize("family", ["sd1", "sdxl", "z_image", "flux1", "flux2_klein"])
def test_replayed_samples_are_eager_ones(family: str, caplog: pytest.LogCaptureFixture) -> None:
    model = load_model(str(tiny_folder(family)), device="cuda")
    prompts = [SamplePrompt("a cat", width=64, height=64, cfgs=(1.0, 7.0)), SamplePrompt("a dog", width=64, height=64)]
    with caplog.at_level(logging.WARNING):
        eager, replayed = (
            [
                np.asarray(one, dtype=int)
                for one in sample_images(model, prompts, num_inference_steps=8, capture=capture)
            ]
            for capture in (None, CAPTURES["cuda"]())
        )
    assert "without CUDA graphs" not in caplog.text
    assert max(np.abs(one - other).max() for one, other in zip(eager, replayed, strict=True)) <= 1
