"""Before a run: whether flat weights do on this device what separate ones do."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rehearsals import plain_settings, prepared

from everydream_kit.config import TrainConfig
from everydream_kit.training import flat_weights_check
from everydream_kit.training.flat_weights import FlatOptimizer
from everydream_kit.training.flat_weights_check import find_disagreement
from everydream_kit.training.optimizers import OPTIMIZERS
from everydream_kit.training.parts import UNET, part_settings

CPU = torch.device("cpu")


def settings_of(name: str):
    return part_settings(TrainConfig(resume_ckpt="none", optimizer=name), UNET, "adamw")


@pytest.mark.parametrize("name", [name for name, kind in OPTIMIZERS.items() if kind.elementwise])
def test_every_optimizer_that_may_be_flat_agrees_with_separate_tensors(name: str) -> None:
    assert find_disagreement([settings_of(name)], CPU) is None


def mistake_adafactor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its update depends on rows and columns, which flat weights have not."""
    monkeypatch.setitem(OPTIMIZERS, "adafactor", replace(OPTIMIZERS["adafactor"], elementwise=True))


def test_an_optimizer_that_needs_shapes_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    mistake_adafactor(monkeypatch)
    assert find_disagreement([settings_of("adamw"), settings_of("adafactor")], CPU) == "adafactor"


@pytest.mark.parametrize("index", range(len(flat_weights_check.SHAPES)))
def test_one_wrong_number_in_any_tensor_is_found(monkeypatch: pytest.MonkeyPatch, index: int) -> None:
    def off_by_little(optimizer: FlatOptimizer) -> None:
        step(optimizer)
        with torch.no_grad():
            optimizer.param_groups[0]["params"][index][..., -1].mul_(1.001)

    step = FlatOptimizer.step
    monkeypatch.setattr(FlatOptimizer, "step", off_by_little)
    assert find_disagreement([settings_of("adamw")], CPU) == "adamw"


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_a_run_on_such_a_device_keeps_its_weights_separate_and_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_model_folder: Path, image_folder: Path, optimizer: str
) -> None:
    mistake_adafactor(monkeypatch)
    settings = plain_settings(tmp_path, tiny_model_folder, image_folder)
    with prepared(**{**settings, "flat_weights": "on", "optimizer": optimizer}) as rehearsal:
        is_flat = isinstance(rehearsal.run.learner.optimizer, FlatOptimizer)
    assert is_flat == (optimizer == "adamw")
    assert ("flat_weights: with adafactor, this device" in rehearsal.warnings) == (not is_flat)
