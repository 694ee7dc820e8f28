"""No mistake in the prompt file and no failure while sampling ends a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rehearsals import plain_settings, prepared, square_images
from tiny_models import draw, tiny_folder

from everydream_kit.models.loading import load_model
from everydream_kit.models.model_saving import save_model
from everydream_kit.runs import RunFolder
from everydream_kit.sessions import train
from everydream_kit.training.control import StopSignal
from everydream_kit.training.listeners import build_sampler
from everydream_kit.training.reports import Listener, StepReport
from everydream_kit.training.run import Run


def settings(folder: Path, model: Path) -> dict[str, Any]:
    plain = plain_settings(folder, model, square_images(folder / "pictures"))
    return {**plain, "disable_unet_training": True, "sample_steps": 1, "sample_prompts": str(folder / "p.json")}


class SmallDevice(Listener):
    """Memory runs out, as on a small GPU, where more than one image goes through the UNet with guidance, or a wide one."""

    def on_start(self, run: Run) -> None:
        self.hook = run.learner.model.unet.register_forward_pre_hook(self.allocate)

    def allocate(self, module: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        if not torch.is_grad_enabled() and (len(arguments[0]) > 2 or arguments[0].shape[3] > 8):
            raise torch.OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 20.00 GiB.\nGPU 0 has a total capacity of"
            )


class Editing(Listener):
    """Breaks the prompt file after the first step, and brings another after the second."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __call__(self, run: Run, report: StepReport) -> None:
        if report.step == 1:
            self.path.write_text('{"samples": [{"prompt": "half', "utf-8")
        if report.step == 2:
            self.path.write_text('{"num_inference_steps": 1, "cfgs": [1], "samples": ["blue"]}', "utf-8")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path) -> RunFolder:
    folder = tmp_path_factory.mktemp("samples")
    samples = [
        {"prompt": "龍" * 100},
        {"prompt": "crooked", "size": [100, 100]},
        {"prompt": "red", "seed": 2**64 - 1, "cfgs": [2, 3, 4]},
        {"prompt": "wide", "size": [128, 64]},
        {"prompt": "far", "seed": 2**64},
    ]
    wrong = {"scheduler": "dimm", "resolution": 100, "num_inference_steps": 2, "cfgs": [2, 3], "samples": samples}
    (folder / "p.json").write_text(json.dumps(wrong), "utf-8")
    changes = {"max_steps": 3, "validation_config": None}
    return train(
        {**settings(folder, tiny_model_folder), **changes}, listeners=[SmallDevice(), Editing(folder / "p.json")]
    )


def warnings_of(run: RunFolder) -> list[str]:
    return [event["message"] for event in run.events("warning")]


def test_the_run_ends_well_with_every_grid_that_can_be_made(run: RunFolder) -> None:
    assert run.status()["state"] == "finished"
    assert [(event["step"], event["prompt"]) for event in run.events("sample")] == [
        (1, "龍" * 100),
        (1, "red"),
        (3, "blue"),
    ]
    names = [path.name for path in run.samples()]
    assert names == [f"gs00001-000-{'龍' * 40}.jpg", "gs00001-001-red.jpg", "gs00003-000-blue.jpg"]
    widths = []
    for path in run.samples():
        with Image.open(path) as grid:
            widths.append(grid.width)
    assert widths[0] < widths[1] - 60  # two guidance scales, and three


def test_mistakes_are_named_before_the_first_step(run: RunFolder) -> None:
    kinds = [(event["kind"], event.get("message", "")) for event in run.events()]
    first_loss = next(index for index, (kind, _) in enumerate(kinds) if kind == "loss")
    early = [message for kind, message in kinds[:first_loss] if kind == "warning"]
    for words in (
        "scheduler: 'dimm' is unknown; did you mean ddim?",
        "resolution: must be a multiple of 8 (got 100); the run's own value is used instead",
        "samples.1.size: must be a multiple of 8 (got 100); this sample is skipped",
        "samples.4.seed: ",
    ):
        assert sum(words in message for message in early) == 1, words


def test_a_grid_that_fails_is_a_warning_about_that_grid(run: RunFolder) -> None:
    failed = [message for message in warnings_of(run) if "failed" in message]
    assert failed == [
        "Sample 2 ('wide', 128 x 64) of step 1 failed: out of memory (OutOfMemoryError: CUDA out of memory. Tried to "
        "allocate 20.00 GiB); make it smaller. Training continues."
    ]


def test_a_file_that_is_broken_for_a_while_is_named_once_and_read_again(run: RunFolder) -> None:
    broken = [message for message in warnings_of(run) if "not valid JSON" in message]
    assert len(broken) == 1 and "p.json, line 1, column 25" in broken[0]
    assert sum("No samples were generated" in message for message in warnings_of(run)) == 1


def test_a_sampler_that_cannot_start_from_pure_noise_is_replaced(tmp_path: Path) -> None:
    sampled = {"scheduler": "pndm", "num_inference_steps": 1, "cfgs": [1], "samples": ["red"]}
    (tmp_path / "p.json").write_text(json.dumps(sampled), "utf-8")
    changes = {"enable_zero_terminal_snr": True, "max_steps": 1}
    run = train({**settings(tmp_path, tiny_folder("sd2")), **changes})
    assert (run.status()["state"], len(run.samples())) == ("finished", 1)
    [warning] = warnings_of(run)
    assert "'pndm' does not work with a zero-terminal-SNR model; take one of ddim" in warning
    assert warning.endswith("ddim is used instead.")


def test_a_file_that_was_named_and_is_not_there_is_a_warning(tmp_path: Path, tiny_model_folder: Path) -> None:
    with prepared(**settings(tmp_path, tiny_model_folder)) as rehearsal:
        build_sampler(rehearsal.run, StopSignal()).on_start(rehearsal.run)
    assert "p.json is not there; captions of the dataset are sampled instead" in rehearsal.warnings


@pytest.mark.parametrize("name", ["euler", "dpm++_2m_karras", "unipc"])
def test_a_list_of_rescaled_betas_samples_like_the_option(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """EveryDream 2 saves zero terminal SNR as a list of betas: most samplers gave black images from it."""
    model = load_model(tiny_folder("sd2"))
    model.zero_terminal_snr = True
    folder = tmp_path_factory.mktemp("betas")
    save_model(model, folder)
    by_option, by_list = load_model(folder), load_model(folder)
    by_list.scheduler_config = {**by_list.scheduler_config, "trained_betas": by_list.noise_scheduler.betas.tolist()}
    del by_list.scheduler_config["rescale_betas_zero_snr"]
    expected = draw(by_option, scheduler=name)
    assert expected.std() > 1
    assert np.abs(draw(by_list, scheduler=name) - expected).max() <= 1
