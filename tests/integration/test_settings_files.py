"""What each key of the optimizer, validation, prompt and live settings files does, seen from outside."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rehearsals import Rehearsal, plain_settings, prepared, square_images

from everydream_kit.config import TrainConfig
from everydream_kit.config.sample_settings import ValidationGroup
from everydream_kit.data.scanning import scan_dataset
from everydream_kit.everydream2.validation_file import import_validation_file
from everydream_kit.sessions import train
from everydream_kit.settings import with_side_files
from everydream_kit.training.base_model import select_trained
from everydream_kit.training.control import StopSignal
from everydream_kit.training.held_out_images import split_dataset
from everydream_kit.training.listeners import build_sampler
from everydream_kit.training.optimizers import build_optimizer_for_parts, unwrap_optimizers
from everydream_kit.training.parameters import TrainedPart
from everydream_kit.training.part_schedules import make_schedule, resolve_part
from everydream_kit.training.reports import Listener, StepReport
from everydream_kit.training.run import Run
from everydream_kit.training.validation_listener import measure_loss

FAST = {"cfgs": [1.0], "num_inference_steps": 1}


@pytest.fixture
def settings(tmp_path: Path, tiny_model_folder: Path) -> dict[str, Any]:
    """One step an epoch."""
    return plain_settings(tmp_path, tiny_model_folder, square_images(tmp_path / "pictures"))


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path) -> Iterator[Rehearsal]:
    """A run at its beginning, which the tests of this module only look at and sample with."""
    folder = tmp_path_factory.mktemp("rehearsal")
    plain = plain_settings(folder, tiny_model_folder, square_images(folder / "pictures"))
    with prepared(**{**plain, "sample_prompts": str(folder / "p.json")}) as rehearsal:
        yield rehearsal


# optimizer.json -------------------------------------------------------------------------------------------------------


def resolved(file: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """For each part: its optimizer, the settings of its group, and its rate in the steps of a run of ten."""
    config, _ = with_side_files(TrainConfig(resume_ckpt="m", data_root="d", optimizer_config=file))
    parts = [TrainedPart(name, [("w", torch.nn.Parameter(torch.zeros(2)))]) for name in ("unet", "text encoder")]
    hows = [resolve_part(part.name, config, "cpu") for part in parts]
    optimizer = build_optimizer_for_parts(parts, hows)
    seen = {}
    for how in hows:
        [(kind, group)] = [
            (type(one).__name__, group)
            for one in unwrap_optimizers(optimizer)
            for group in one.param_groups
            if group["name"] == how.part
        ]
        rate = make_schedule(how, config, 10, 1)
        seen[how.part] = {**group, "params": None, "kind": kind, "rates": [rate(step) for step in range(10)]}
    return seen


@pytest.mark.parametrize(
    ("section", "parts"),
    [("base", ["unet", "text encoder"]), ("unet_overrides", ["unet"]), ("text_encoder_overrides", ["text encoder"])],
)
@pytest.mark.parametrize(
    ("base", "values", "name", "expected"),
    [
        ({}, {"optimizer": "lion"}, "kind", "Lion"),
        ({}, {"lr": 2e-3}, "rates", [2e-3] * 10),
        ({"lr": 1.5}, {"lr_scheduler": "linear"}, "rates", [1.5 - step / 10 for step in range(10)]),
        ({"lr": 4.0}, {"lr_warmup_steps": 4}, "rates", [1, 2, 3, *[4] * 7]),
        ({"lr": 1.0, "lr_scheduler": "linear"}, {"lr_decay_steps": 2}, "rates", [1, 0.5, *[0] * 8]),
        ({}, {"betas": [0.5, 0.6]}, "betas", (0.5, 0.6)),
        ({}, {"epsilon": 1e-3}, "eps", 1e-3),
        ({}, {"weight_decay": 0.25}, "weight_decay", 0.25),
        ({"optimizer": "prodigy", "lr": 1.0}, {"d0": 1e-3}, "d0", 1e-3),
        ({"optimizer": "prodigy", "lr": 1.0}, {"decouple": False}, "weight_decouple", False),
        ({"optimizer": "sgd"}, {"momentum": 0.5}, "momentum", 0.5),
        ({}, {"kwargs": {"amsgrad": True}}, "amsgrad", True),
    ],
    ids=lambda value: next(iter(value), "adamw") if isinstance(value, dict) else "",
)
def test_every_setting_of_a_section_reaches_its_parts_and_no_other(
    section: str, parts: list[str], base: dict[str, Any], values: dict[str, Any], name: str, expected: Any
) -> None:
    before = resolved({"base": base})
    after = resolved({"base": {**base, **values}} if section == "base" else {"base": base, section: values})
    for part in ("unet", "text encoder"):
        assert before[part][name] != expected
        assert after[part][name] == (pytest.approx(expected) if part in parts else before[part][name])


@pytest.mark.parametrize(
    ("section", "values", "trained", "frozen"),
    [
        ("text_encoder_freezing", {"freeze_embeddings": True}, "layers.0.", "token_embedding"),
        ("text_encoder_freezing", {"unfreeze_last_n_layers": 1}, "layers.2.", "layers.1."),
        ("text_encoder_freezing", {"unfreeze_final_n_layers": 2}, "layers.1.", "layers.0."),
        ("text_encoder_freezing", {"freeze_front_n_layers": 1}, "layers.1.", "layers.0."),
        ("text_encoder_freezing", {"freeze_final_layer_norm": True}, "layers.2.", "final_layer_norm"),
        ("unet_freezing", {"train": ["attn2"]}, "attn2", "conv_in"),
        ("unet_freezing", {"freeze": ["attn2"]}, "conv_in", "attn2"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_every_setting_of_what_is_frozen_changes_what_is_trained(
    rehearsal: Rehearsal, section: str, values: dict[str, Any], trained: str, frozen: str
) -> None:
    def names(file: dict[str, Any]) -> list[str]:
        config, _ = with_side_files(rehearsal.run.config.replace(optimizer_config=file))
        parts = select_trained(rehearsal.run.learner.model, config, 7)
        return [name for part in parts for name, _ in part.parameters]

    before, after = names({}), names({section: values})
    assert any(frozen in name for name in before)
    assert not any(frozen in name for name in after)
    assert any(trained in name for name in after)


def test_keys_without_an_effect_are_warned_about_in_the_run(settings: dict[str, Any]) -> None:
    files = {
        "optimizer_config": {"log_grad_norm": False},
        "validation_config": {"use_relative_loss": True},
    }
    with prepared(**{**settings, **files}) as rehearsal:
        for key in ("log_grad_norm", "use_relative_loss"):
            assert f"{key}: has no effect" in rehearsal.warnings


@pytest.mark.parametrize(("overrides", "rate"), [({}, 5e-4), ({"lr": 3e-4}, 3e-4)])
def test_the_scale_of_an_optimizer_file_is_of_the_text_encoders_rate(overrides: dict[str, Any], rate: float) -> None:
    seen = resolved({"base": {"lr": 1e-3}, "text_encoder_lr_scale": 0.5, "text_encoder_overrides": overrides})
    assert (seen["unet"]["rates"][0], seen["text encoder"]["rates"][0]) == (1e-3, rate)


# validation.json ------------------------------------------------------------------------------------------------------


def validation(file: dict[str, Any]) -> ValidationGroup:
    """The settings that a validation config means."""
    return ValidationGroup(**import_validation_file(file)[0])


@pytest.fixture(scope="module")
def twelve(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve images, and three others in a folder next to them."""
    root = tmp_path_factory.mktemp("validation")
    folder = square_images(root / "pictures", 12)
    (root / "others").mkdir()
    for number in range(9, 12):
        for path in folder.glob(f"{number}.*"):
            shutil.move(path, root / "others" / path.name)
    return root


@pytest.mark.parametrize(
    ("file", "sizes"),
    [
        ({}, {"training": 7, "loss/val": 2}),
        ({"validate_training": False}, {"training": 9}),
        ({"val_split_mode": "none"}, {"training": 9}),
        ({"auto_split_proportion": 0.5}, {"training": 4, "loss/val": 5}),
        ({"val_split_proportion": 0.5}, {"training": 4, "loss/val": 5}),
        ({"val_split_mode": "manual", "manual_data_root": "others"}, {"training": 9, "loss/val": 3}),
        ({"val_split_mode": "manual", "val_data_root": "others"}, {"training": 9, "loss/val": 3}),
        ({"extra_manual_datasets": {"more": "others"}}, {"training": 7, "loss/val": 2, "loss/more": 3}),
        ({"stabilize_training_loss": True}, {"training": 7, "loss/val": 2, "loss/train-stabilized": 2}),
        (
            {"stabilize_training_loss": True, "stabilize_split_proportion": 0.5},
            {"training": 7, "loss/val": 2, "loss/train-stabilized": 4},
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_the_validation_config_decides_what_is_trained_and_what_is_measured(
    twelve: Path, file: dict[str, Any], sizes: dict[str, int]
) -> None:
    dataset = scan_dataset(twelve / "pictures")
    training, sets = split_dataset(dataset, validation(file), lambda folder: scan_dataset(twelve / folder))
    assert {"training": len(training), **{entry.tag: len(entry.dataset) for entry in sets}} == sizes


def test_the_seed_and_the_batch_size_of_the_validation_config_are_those_of_the_measurement(
    rehearsal: Rehearsal, twelve: Path
) -> None:
    run, together = rehearsal.run, []
    dataset = scan_dataset(twelve / "others")
    handle = run.learner.model.unet.register_forward_pre_hook(
        lambda module, arguments: together.append(len(arguments[0]))
    )

    def measured(**file: Any) -> tuple[float, int]:
        together.clear()
        return measure_loss(run, dataset, validation(file)), max(together)

    with handle:
        (loss, whole), (same, single), (other, _) = measured(), measured(batch_size=1), measured(seed=8)
    assert (whole, single) == (3, 1)
    assert same == pytest.approx(loss, rel=1e-5)
    assert abs(other - loss) > 1e-3 * loss
    files = scan_dataset(twelve / "pictures")

    def held_out(seed: int) -> frozenset[str]:
        training, (measured,) = split_dataset(files, validation({"seed": seed}), scan_dataset)
        names = [frozenset(map(side.path, range(len(side)))) for side in (training, measured.dataset)]
        assert len(names[0]) + len(names[1]) == len(names[0] | names[1]) == len(files) == 9
        return names[1]

    assert len({held_out(seed) for seed in range(6)}) >= 4  # two of nine are held out: 36 splits
    assert held_out(3) == held_out(3)


def test_every_n_epochs_is_how_often_a_run_measures(settings: dict[str, Any]) -> None:
    changes = {"validation_config": {"every_n_epochs": 2}, "max_steps": 4, "disable_textenc_training": True}
    run = train({**settings, **changes})
    assert [event["step"] for event in run.events("validation")] == [0, 2, 4]


# The prompt file ------------------------------------------------------------------------------------------------------


def sampled(rehearsal: Rehearsal, file: dict[str, Any]) -> dict[str, Any]:
    """What one sampling with a prompt file makes: its events, the UNet's calls, and the pixels of its grids."""
    run = rehearsal.run
    Path(run.config.sample_prompts).write_text(json.dumps(file), "utf-8")
    before = len(list(rehearsal.folder.events("sample")))
    calls: list[tuple[int, ...]] = []
    hook = run.learner.model.unet.register_forward_pre_hook(
        lambda module, arguments: calls.append(tuple(arguments[0].shape))
    )
    with hook:
        build_sampler(run, StopSignal()).draw(run)
    events = list(rehearsal.folder.events("sample"))[before:]
    grids = [np.asarray(Image.open(event["path"])) for event in events]
    return {
        "prompts": [event["prompt"] for event in events],
        "seeds": [event["seed"] for event in events],
        "calls": [(batch, height, width) for batch, _, height, width in calls],
        "columns": [round(grid.shape[1] / 64) for grid in grids],
        "grids": grids,
    }


@pytest.mark.parametrize(
    ("file", "name", "expected"),
    [
        ({"samples": [{"prompt": "a"}, {"prompt": "b"}]}, "prompts", ["a", "b"]),
        ({"samples": [{"prompt": "b"}]}, "prompts", ["b"]),
        ({"seed": 9}, "seeds", [9]),
        ({"samples": [{"prompt": "a", "seed": 9}]}, "seeds", [9]),
        ({"num_inference_steps": 3}, "calls", [(1, 8, 8)] * 3),
        ({"resolution": 128}, "calls", [(1, 16, 16)]),
        ({"samples": [{"prompt": "a", "size": [64, 72]}]}, "calls", [(1, 9, 8)]),
        ({"samples": [{"prompt": "a"}, {"prompt": "b"}]}, "calls", [(2, 8, 8)]),
        ({"batch_size": 1, "samples": [{"prompt": "a"}, {"prompt": "b"}]}, "calls", [(1, 8, 8)] * 2),
        ({"cfgs": [1, 1, 1]}, "columns", [3]),
        ({"samples": [{"prompt": "a", "cfgs": [1, 1, 1]}]}, "columns", [3]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_the_prompt_file_decides_what_is_sampled(
    rehearsal: Rehearsal, file: dict[str, Any], name: str, expected: Any
) -> None:
    plain = {**FAST, "samples": [{"prompt": "a"}]}
    assert sampled(rehearsal, plain)[name] != expected
    assert sampled(rehearsal, {**plain, **file})[name] == expected


@pytest.mark.parametrize("file", [{"scheduler": "euler_a"}, {"samples": [{"prompt": "a", "negative_prompt": "b"}]}])
def test_scheduler_and_negative_prompt_change_the_pixels(rehearsal: Rehearsal, file: dict[str, Any]) -> None:
    plain = {"cfgs": [5.0], "num_inference_steps": 2, "samples": [{"prompt": "a"}]}
    before, again, after = (sampled(rehearsal, one)["grids"][0] for one in (plain, plain, {**plain, **file}))
    assert np.array_equal(before, again)
    assert not np.array_equal(before, after)


def test_aspect_ratio_is_of_the_sample_and_random_caption_of_the_dataset(rehearsal: Rehearsal) -> None:
    [(_, height, width)] = sampled(rehearsal, {**FAST, "samples": [{"prompt": "a", "aspect_ratio": 2.0}]})["calls"]
    assert width > 1.5 * height
    [prompt] = sampled(rehearsal, {**FAST, "samples": [{"prompt": "a", "random_caption": True}]})["prompts"]
    assert prompt.startswith("picture ")


def test_the_prompt_file_says_when_to_sample(settings: dict[str, Any], tmp_path: Path) -> None:
    when = {"generate_samples_every_n_steps": 2, "generate_pretrain_samples": True}
    (tmp_path / "p.json").write_text(json.dumps({**FAST, **when, "samples": ["a"]}), "utf-8")
    changes = {"sample_steps": 100, "sample_prompts": str(tmp_path / "p.json"), "max_steps": 3}
    run = train({**settings, **changes, "disable_textenc_training": True})
    assert [event["step"] for event in run.events("sample")] == [0, 2, 3]


# live.json ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "sampled_at", "saved_at"),
    [
        (["sample_steps", "sample_prompts"], [2, 3, 4], [4]),
        (["ckpt_every_n_minutes"], [], [2, 3, 4]),
        (["save_every_n_epochs"], [], [2, 4]),
    ],
)
def test_live_settings_change_when_a_run_samples_and_saves(
    settings: dict[str, Any], tmp_path: Path, keys: list[str], sampled_at: list[int], saved_at: list[int]
) -> None:
    (tmp_path / "live prompts.json").write_text(json.dumps({**FAST, "samples": ["a live prompt"]}), "utf-8")
    values = {
        "sample_steps": 1,
        "sample_prompts": str(tmp_path / "live prompts.json"),
        "ckpt_every_n_minutes": 1e-6,
        "save_every_n_epochs": 2,
    }

    class Steering(Listener):
        """Writes the file after the first step, so that it is read at the end of the second."""

        def __call__(self, run: Run, report: StepReport) -> None:
            text = json.dumps({key: values[key] for key in keys})
            (run.folder.folder / "live.json").write_text(text, "utf-8")

    live = {"load_settings_every_epoch": True, "max_steps": 4, "disable_textenc_training": True}
    run = train({**settings, **live}, listeners=[Steering()])
    samples = list(run.events("sample"))
    assert [event["step"] for event in samples] == sampled_at
    assert {event["prompt"] for event in samples} <= {"a live prompt"}
    assert [checkpoint.step for checkpoint in run.checkpoints()] == saved_at
