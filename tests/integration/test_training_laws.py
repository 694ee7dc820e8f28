"""Laws of training, on a tiny real model: accumulation, exact resume, frozen parts, learning, workers, caches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from everydream_kit.config import TrainConfig
from everydream_kit.runs import RunFolder
from everydream_kit.sessions import resume, train
from everydream_kit.training.reports import Listener, StepReport
from everydream_kit.training.run import Run

Weights = dict[str, torch.Tensor]


@pytest.fixture
def settings(tmp_path: Path, family_folder: Path, image_folder: Path) -> dict[str, Any]:
    return {
        "resume_ckpt": str(family_folder),
        "data_root": str(image_folder),
        "resolution": 64,
        "batch_size": 4,
        "max_epochs": 2,
        "lr": 1e-4,
        "logdir": str(tmp_path / "logs"),
        "no_save_ckpt": True,
        "sample_steps": None,
        "log_step": 1,
        "seed": 7,
        "num_workers": 0,
        "cache_variants": 1,
        "cond_dropout": 0.2,
        "flip_p": 0.5,
        "shuffle_tags": True,
    }


def weights_of(run: RunFolder) -> Weights:
    folder = run.last_checkpoint
    files = [path for path in sorted(folder.glob("*/*.safetensors")) if path.parent.name != "resume"]
    return {f"{path.parent.name}/{name}": value for path in files for name, value in load_file(path).items()}


def losses_of(run: RunFolder) -> list[float]:
    return [event["loss"] for event in run.events("loss")]


def largest_difference(first: Weights, second: Weights) -> float:
    assert first.keys() == second.keys()
    return max((first[name] - second[name]).abs().max().item() for name in first)


class StopAfter(Listener):
    """Asks the run to stop after some step, as the Stop button does."""

    def __init__(self, step: int) -> None:
        self.step = step

    def __call__(self, run: Run, report: StepReport) -> None:
        if report.step == self.step:
            run.folder.request("stop")


ACCUMULATED = {
    "grad_accum": 2,
    "clip_grad_norm": 0.5,
    "ema_decay_rate": 0.9,
    "ema_update_interval": 1,
    "cache_latents": "off",
}
FUSED = {"fused_backward": True, "gradient_checkpointing": True, "timestep_sampling": "stratified"}
EARLY = {"shuffle_tags": False}
"""Captions that do not vary: a language model encodes them before the first step."""
RESUMED: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("sd1", {}),
    "accumulated with EMA": ("sd1", ACCUMULATED),
    "8 bit": ("sd1", {"optimizer": "adamw8bit", "lr_scheduler": "cosine"}),
    "flat": ("sd1", {"optimizer": "adamw8bit", "flat_weights": "on", "clip_grad_norm": 0.5}),
    "bfloat16": ("sd1", {"weight_dtype": "bfloat16", "disable_textenc_training": True}),
    "fused": ("sd1", FUSED),
    "Z-Image, accumulated with EMA": ("z_image", {**ACCUMULATED, **EARLY}),
    "Z-Image, bfloat16, 8 bit": ("z_image", {"weight_dtype": "bfloat16", "optimizer": "adamw8bit", **EARLY}),
    "Z-Image, fused": ("z_image", {**FUSED, **EARLY}),
}


@pytest.mark.parametrize(("family", "extra"), RESUMED.values(), ids=RESUMED.keys(), indirect=["family"])
def test_stopping_and_resuming_equals_never_having_stopped_to_the_bit(
    settings: dict[str, Any], tmp_path: Path, extra: dict[str, Any]
) -> None:
    config = TrainConfig(**{**settings, "max_steps": 4, **extra})
    whole = train(config)
    parted = train(config.replace(logdir=str(tmp_path / "parted")), listeners=[StopAfter(1)])  # taken in the second
    assert parted.status()["state"] == "stopped"
    resume(parted.folder)
    assert parted.status()["state"] == "finished"
    assert largest_difference(weights_of(whole), weights_of(parted)) == 0.0
    by_step = {event["step"]: event["loss"] for event in parted.events("loss")}
    assert list(by_step.values()) == losses_of(whole)


def test_one_image_accumulated_four_times_equals_four_images(settings: dict[str, Any], tmp_path: Path) -> None:
    # Plain gradient descent: Adam would divide by the rounding errors of weights whose gradient is almost zero.
    common = {**settings, "data_root": square_folder(tmp_path), "optimizer": "sgd", "lr": 1e-2}
    four = train(TrainConfig(**{**common, "batch_size": 4, "grad_accum": 1}))
    accumulated = train(TrainConfig(**{**common, "batch_size": 1, "grad_accum": 4, "project_name": "accumulated"}))
    assert len(losses_of(four)) == len(losses_of(accumulated)) == 6
    assert losses_of(accumulated) == pytest.approx(losses_of(four), abs=1e-5)
    assert largest_difference(weights_of(four), weights_of(accumulated)) < 1e-6


def test_an_image_alone_in_its_step_moves_the_weights_as_far_as_one_among_many(
    settings: dict[str, Any], tmp_path: Path, tiny_model_folder: Path
) -> None:
    """Twelve squares fill a window, an upright image has one of its own; in a window of 16 all thirteen are together.

    Plain gradient descent at a small rate adds gradients up, so both epochs move alike, but for what they divide by.
    """
    folder = Path(square_folder(tmp_path))
    Image.fromarray(np.full((144, 80, 3), 90, np.uint8)).save(folder / "upright_.png")
    descent = {"base": {"optimizer": "sgd", "weight_decay": 0, "momentum": 0}}
    common = {**settings, "data_root": str(folder), "optimizer_config": descent, "lr": 1e-3, "max_epochs": 1}
    apart = train(TrainConfig(**{**common, "grad_accum": 3}))
    together = train(TrainConfig(**{**common, "grad_accum": 4, "project_name": "together"}))
    assert [len(losses_of(run)) for run in (apart, together)] == [2, 1]
    before = load_file(tiny_model_folder / "unet" / "diffusion_pytorch_model.safetensors")
    moved, expected = (
        torch.cat([(weights_of(run)[f"unet/{name}"].double() - old.double()).flatten() for name, old in before.items()])
        * num_images
        for run, num_images in ((apart, 12), (together, 13))
    )
    assert float((moved - expected).norm() / expected.norm()) < 0.05


def test_epochs_without_an_image_are_passed_over(settings: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "one"
    folder.mkdir()
    Image.fromarray(np.full((80, 80, 3), 90, np.uint8)).save(folder / "grey_.png")
    (folder / "multiply.txt").write_text("0.25", encoding="utf-8")
    config = {**settings, "data_root": str(folder), "max_epochs": 7, "save_every_n_epochs": 4, "write_schedule": True}
    run = train(TrainConfig(**config))
    assert [(event["step"], event["epoch"]) for event in run.events("loss")] == [(1, 0), (2, 4)]
    assert (run.status()["state"], run.status()["step"], run.status()["num_steps"]) == ("finished", 2, 2)
    assert [checkpoint.folder.name.partition("-")[0] for checkpoint in run.checkpoints()][-1] == "last"
    assert [checkpoint.step for checkpoint in run.checkpoints()] == [1, 2]  # the fourth epoch ended without an image
    assert "Epochs 2 to 4 have no image" in run.log_path.read_text("utf-8")
    assert sorted(path.name for path in run.folder.glob("*_schedule.txt")) == [
        "ep0_batch_schedule.txt",
        "ep4_batch_schedule.txt",
    ]


def square_folder(tmp_path: Path) -> str:
    """Twelve square images: one bucket."""
    folder = tmp_path / "squares"
    if not folder.is_dir():
        folder.mkdir()
        for number in range(12):
            pixels = np.random.default_rng(number).integers(0, 255, (80, 80, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"square {number}_.png")
    return str(folder)


@pytest.mark.parametrize(
    ("switch", "frozen"),
    [("disable_textenc_training", "text_encoder/model"), ("disable_unet_training", "unet/diffusion_pytorch_model")],
)
def test_frozen_parts_keep_their_bytes(
    settings: dict[str, Any], tiny_model_folder: Path, switch: str, frozen: str
) -> None:
    run = train(TrainConfig(**{**settings, "max_epochs": 1, switch: True}))
    before = load_file(tiny_model_folder / f"{frozen}.safetensors")
    after = load_file(run.last_checkpoint / f"{frozen}.safetensors")
    assert largest_difference(before, after) == 0.0
    other = {"text_encoder/model": "unet/diffusion_pytorch_model"}.get(frozen, "text_encoder/model")
    moved = load_file(run.last_checkpoint / f"{other}.safetensors")
    assert largest_difference(load_file(tiny_model_folder / f"{other}.safetensors"), moved) > 0.0


def test_the_number_of_loader_processes_changes_nothing(settings: dict[str, Any]) -> None:
    common = {**settings, "max_epochs": 1, "cache_latents": "off"}
    alone = train(TrainConfig(**common))
    helped = train(TrainConfig(**{**common, "num_workers": 2, "project_name": "helped"}))
    assert losses_of(alone) == losses_of(helped)


def test_cached_latents_give_the_losses_of_encoding_each_time(settings: dict[str, Any]) -> None:
    common = {**settings, "max_epochs": 1, "crop_jitter": 0.0}
    encoded = train(TrainConfig(**{**common, "cache_latents": "off"}))
    for mode in ("memory", "disk"):
        cached = train(TrainConfig(**{**common, "cache_latents": mode, "project_name": mode}))
        assert losses_of(cached) == pytest.approx(losses_of(encoded), rel=2e-3)  # moments are kept in float16


def test_training_lowers_the_loss_on_fixed_noise_and_timesteps(settings: dict[str, Any], image_folder: Path) -> None:
    validation = {"val_split_mode": "manual", "manual_data_root": str(image_folder), "every_n_epochs": 12}
    run = train(TrainConfig(**{**settings, "max_epochs": 12, "lr": 1e-3, "validation_config": validation}))
    first, last = (event["loss"] for event in run.events("validation"))
    assert last < 0.97 * first
    assert (run.checkpoint("best").folder / "model_index.json").is_file()


def test_a_loss_that_is_no_number_stops_the_run_before_the_update(settings: dict[str, Any]) -> None:
    from everydream_kit.errors import NonFiniteLossError

    class Poison(Listener):
        def __call__(self, run: Run, report: StepReport) -> None:
            if report.step == 2:
                next(iter(run.learner.model.unet.parameters())).data.fill_(float("nan"))

    with pytest.raises(NonFiniteLossError, match=r"step 2.*\.(jpg|png)"):
        train(TrainConfig(**{**settings, "save_every_n_steps": 1}), listeners=[Poison()])
