"""Samples whose predictions are captured and replayed at every denoising step are eager ones, bit for bit."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rehearsals import square_images
from replayed_passes import Replayed, record
from tiny_models import tiny_folder

from everydream_kit.config import TrainConfig
from everydream_kit.models.captures import CAPTURES
from everydream_kit.models.loading import load_model
from everydream_kit.models.sampling import SamplePrompt, sample_images
from everydream_kit.sessions import train

PROMPTS = [
    SamplePrompt("a cat", "blurred", seed=1, width=64, height=64, cfgs=(1.0, 7.0)),
    SamplePrompt("a dog on a hill", "", seed=2, width=64, height=64, cfgs=(4.0,)),
]


class Counted:
    """The stand-in for a GPU's captures, which counts."""

    def __init__(self) -> None:
        self.num_captures = self.num_replays = 0

    def __call__(self, call: Callable[[], torch.Tensor]) -> Any:
        captured, counted = record(call), self
        self.num_captures += 1

        class Noted(Replayed):
            def __init__(self) -> None:
                self.operators, self.result = captured.operators, captured.result

            def replay(self) -> None:
                counted.num_replays += 1
                super().replay()

        return Noted()


def images_of(model: Any, capture: Any = None) -> list[np.ndarray]:
    images = sample_images(model, PROMPTS, num_inference_steps=5, batch_size=2, capture=capture)
    return [np.asarray(image) for image in images]


@pytest.mark.parametrize("family", ["sd1", "sdxl", "z_image", "flux1"])
def test_replayed_samples_are_eager_ones(family: str, caplog: pytest.LogCaptureFixture) -> None:
    model, capture = load_model(str(tiny_folder(family))), Counted()
    eager = images_of(model)
    replayed = images_of(model, capture)
    assert all(np.array_equal(one, other) for one, other in zip(eager, replayed, strict=True))
    assert (capture.num_captures, capture.num_replays) == (2, 6)  # batches of two and of one; all but two steps of five
    assert "without CUDA graphs" not in caplog.text


class Stale:
    """A graph that always gives what it gave when it was captured."""

    def __init__(self, call: Callable[[], torch.Tensor]) -> None:
        self.result = call()

    def replay(self) -> None:
        pass


def out_of_memory(call: Callable[[], torch.Tensor]) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize(
    ("capture", "problem"),
    [(Stale, "predictions differ from eager ones by "), (out_of_memory, "predictions cannot be captured (CUDA out")],
)
def test_what_cannot_be_replayed_stays_eager_with_a_warning(
    capture: Any, problem: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = load_model(str(tiny_folder("sd1")))
    eager = images_of(model)
    with caplog.at_level(logging.WARNING):
        found = images_of(model, capture)
    assert all(np.array_equal(one, other) for one, other in zip(eager, found, strict=True))
    assert caplog.text.count("Samples are made without CUDA graphs: ") == 1 and problem in caplog.text


def test_a_run_with_graphs_replays_its_samples(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\n", "utf-8")
    settings = {
        "resume_ckpt": str(tiny_folder("sd1")),
        "data_root": str(square_images(tmp_path / "images", 1)),
        "resolution": 64,
        "batch_size": 1,
        "max_epochs": 1,
        "sample_steps": 1,
        "sample_prompts": str(prompts),
        "sample_cfgs": [7.0],
        "sample_num_inference_steps": 4,
        "training_kind": "lora",
        "seed": 7,
        "num_workers": 0,
        "no_save_ckpt": True,
    }
    capture = Counted()
    eager = train(TrainConfig(**settings, logdir=str(tmp_path / "eager")))
    monkeypatch.setitem(CAPTURES, "cpu", lambda: capture)
    replayed = train(TrainConfig(**settings, logdir=str(tmp_path / "replayed"), cuda_graphs="on"))
    (one,), (other,) = (sorted(run.samples_folder.glob("*.jpg")) for run in (eager, replayed))
    assert one.read_bytes() == other.read_bytes()
    assert (capture.num_captures, capture.num_replays) == (1, 2)
