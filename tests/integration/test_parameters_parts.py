"""What the settings of optimizers, of single parts and of validation do, seen in the run that is built from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rehearsals import plain_settings, prepared, square_images

from everydream_kit.config import TrainConfig
from everydream_kit.sessions import resume, train
from everydream_kit.training.control import StopSignal
from everydream_kit.training.listeners import build_sampler
from everydream_kit.training.optimizers import build_optimizer_for_parts, unwrap_optimizers
from everydream_kit.training.parameters import TrainedPart
from everydream_kit.training.part_schedules import make_schedule, resolve_part

PARTS = ("unet", "text encoder")
OPTIMIZER_SETTINGS: list[tuple[dict[str, Any], str, Any, str, Any]] = [
    # settings before, the setting, its value, what shows it, and what it shows
    ({}, "optimizer", "lion", "kind", "Lion"),
    ({}, "lr", 2e-3, "rates", [2e-3] * 10),
    ({"lr": 1.5}, "lr_scheduler", "linear", "rates", [1.5 - step / 10 for step in range(10)]),
    ({"lr": 4.0}, "lr_warmup_steps", 4, "rates", [1, 2, 3, *[4] * 7]),
    ({"lr": 1.0, "lr_scheduler": "linear"}, "lr_decay_steps", 2, "rates", [1, 0.5, *[0] * 8]),
    ({}, "betas", [0.5, 0.6], "betas", (0.5, 0.6)),
    ({}, "eps", 1e-3, "eps", 1e-3),
    ({}, "weight_decay", 0.25, "weight_decay", 0.25),
    ({"optimizer": "prodigy", "lr": 1.0}, "d0", 1e-3, "d0", 1e-3),
    ({"optimizer": "prodigy", "lr": 1.0}, "decouple", False, "weight_decouple", False),
    ({"optimizer": "sgd"}, "momentum", 0.5, "momentum", 0.5),
    ({}, "optimizer_args", {"amsgrad": True}, "amsgrad", True),
]


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("parts")
    return plain_settings(folder, tiny_model_folder, square_images(folder / "pictures", 9))


def built(**values: Any) -> dict[str, dict[str, Any]]:
    """For each part: its optimizer, the settings of its group, and its rate in the steps of a run of ten."""
    config = TrainConfig(resume_ckpt="m", **{"optimizer": "adamw", **values})
    parts = [TrainedPart(name, [], [("w", torch.nn.Parameter(torch.zeros(2)))]) for name in PARTS]
    hows = [resolve_part(part.name, config, "cpu") for part in parts]
    optimizer = build_optimizer_for_parts(parts, hows)
    groups = {
        group["name"]: {**group, "kind": type(one).__name__}
        for one in unwrap_optimizers(optimizer)
        for group in one.param_groups
    }
    schedules = {how.part: make_schedule(how, config, 10, 1) for how in hows}
    return {name: {**groups[name], "rates": [schedules[name](step) for step in range(10)]} for name in PARTS}


@pytest.mark.parametrize(("prefix", "parts"), [("", PARTS), ("unet_", PARTS[:1]), ("text_encoder_", PARTS[1:])])
@pytest.mark.parametrize(
    ("before", "name", "value", "shown", "expected"), OPTIMIZER_SETTINGS, ids=lambda value: str(value)[:16]
)
def test_each_setting_of_an_optimizer_reaches_both_parts_or_its_own(
    prefix: str, parts: tuple[str, ...], before: dict[str, Any], name: str, value: Any, shown: str, expected: Any
) -> None:
    without, given = built(**before), built(**{**before, prefix + name: value})
    for part in PARTS:
        assert without[part][shown] != expected
        assert given[part][shown] == (pytest.approx(expected) if part in parts else without[part][shown])


@pytest.mark.parametrize(("own", "rate"), [({}, 5e-4), ({"text_encoder_lr": 3e-4}, 3e-4)])
def test_text_encoder_lr_scale_is_a_factor_on_lr_unless_a_rate_is_given(own: dict[str, float], rate: float) -> None:
    seen = built(lr=1e-3, text_encoder_lr_scale=0.5, **own)
    assert (seen["unet"]["rates"][0], seen["text encoder"]["rates"][0]) == (1e-3, rate)


@pytest.mark.parametrize(
    ("name", "value", "trained", "frozen"),
    [
        ("text_encoder_freeze_embeddings", True, "layers.0.", "token_embedding"),
        ("text_encoder_unfreeze_last_n_layers", 1, "layers.2.", "layers.1."),
        ("text_encoder_freeze_front_n_layers", 1, "layers.1.", "layers.0."),
        ("text_encoder_freeze_final_layer_norm", True, "layers.2.", "final_layer_norm"),
        ("unet_train_layers", ["attn2"], "attn2", "conv_in"),
        ("unet_freeze_layers", ["attn2"], "conv_in", "attn2"),
    ],
)
def test_each_setting_of_what_is_frozen_changes_what_is_trained(
    settings: dict[str, Any], name: str, value: Any, trained: str, frozen: str
) -> None:
    with prepared(**{**settings, name: value}) as rehearsal:
        model = rehearsal.run.learner.model
        module = model.denoiser if name.startswith("unet") else model.text_encoders[0]
        asked = [key for key, parameter in module.named_parameters() if parameter.requires_grad]
        listed = [key for part in rehearsal.run.learner.parts for key, _ in part.parameters]
    assert any(trained in key for key in asked)
    assert not any(frozen in key for key in asked)
    assert set(asked) <= set(listed)


def test_a_setting_that_goes_to_one_part_only_is_said_in_the_run(settings: dict[str, Any]) -> None:
    changes = {"optimizer": "sgd", "momentum": 0.5, "text_encoder_optimizer": "adamw", "max_steps": 1}
    with prepared(**{**settings, **changes}) as rehearsal:
        assert "momentum: the text encoder does not have it, since its optimizer is adamw" in rehearsal.warnings


# Validation -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "sizes"),
    [
        ({}, {"training": 9}),
        ({"validation_split_mode": "automatic"}, {"training": 7, "loss/val": 2}),
        (
            {"validation_split_mode": "automatic", "validation_split_proportion": 0.5},
            {"training": 4, "loss/val": 5},
        ),
        ({"validation_split_mode": "manual", "validation_data_root": "others"}, {"training": 9, "loss/val": 3}),
        ({"validation_extra_data_roots": {"more": "others"}}, {"training": 9, "loss/more": 3}),
        ({"stabilize_training_loss": True}, {"training": 9, "loss/train-stabilized": 2}),
        (
            {"stabilize_training_loss": True, "stabilize_split_proportion": 0.5},
            {"training": 9, "loss/train-stabilized": 5},
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_each_setting_of_a_split_decides_what_is_trained_and_measured(
    settings: dict[str, Any], tmp_path: Path, values: dict[str, Any], sizes: dict[str, int]
) -> None:
    others = str(square_images(tmp_path / "others", 3))
    here = {
        name: others if value == "others" else {"more": others} if isinstance(value, dict) else value
        for name, value in values.items()
    }
    with prepared(**{**settings, **here}) as rehearsal:
        run = rehearsal.run
        sets = {entry.tag: len(entry.dataset) for entry in run.validation_sets}
        assert {"training": len(run.dataset), **sets} == sizes


def test_validation_seed_batch_size_and_interval_are_those_of_the_measurements(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from everydream_kit.training import listeners

    together: list[int] = []
    noted = listeners.measure_loss

    def measure(run: Any, dataset: Any, settings: Any, *, averaged: bool) -> float:
        hook = run.learner.model.denoiser.register_forward_pre_hook(
            lambda module, arguments: together.append(len(arguments[0]))
        )
        with hook:
            return noted(run, dataset, settings, averaged=averaged)

    monkeypatch.setattr(listeners, "measure_loss", measure)
    short = {**settings, "max_epochs": 2, "max_steps": None, "batch_size": 4, "disable_textenc_training": True}
    whole = {**short, "validation_split_mode": "automatic", "validation_split_proportion": 0.4}
    seen = {}
    for name, value in (("plain", None), ("validation_seed", 8), ("validation_batch_size", 1)):
        together.clear()
        run = train({**whole, **({} if value is None else {name: value})})
        events = list(run.events("validation"))
        seen[name] = (events[0]["loss"], max(together), [event["step"] for event in events])
    loss, most, steps = seen["plain"]
    assert (most, len(steps)) == (4, 3)  # before the first step, and after each epoch
    assert seen["validation_batch_size"][:2] == (pytest.approx(loss, rel=1e-5), 1)
    assert abs(seen["validation_seed"][0] - loss) > 1e-3 * loss
    rare = train({**whole, "validation_every_n_epochs": 2.0})
    assert [event["step"] for event in rare.events("validation")] == [0, steps[-1]]


# Samples --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "shown", "expected"),
    [
        ({"sample_cfgs": [1.0, 1.0]}, "columns", [2]),
        ({"sample_num_inference_steps": 3}, "calls", [(1, 8)] * 3),
        ({"sample_seed": 9}, "seeds", [9]),
        ({"sample_resolution": 128}, "calls", [(1, 16)]),
        ({"sample_batch_size": 1, "sample_cfgs": [1.0, 1.0]}, "calls", [(1, 8)] * 2),
        (
            {"sample_scheduler": "euler_a", "sample_cfgs": [5.0], "sample_num_inference_steps": 2},
            "changes pixels",
            True,
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_each_sampling_setting_holds_where_the_prompt_file_says_nothing(
    settings: dict[str, Any], tmp_path: Path, values: dict[str, Any], shown: str, expected: Any
) -> None:
    (tmp_path / "p.txt").write_text("a", "utf-8")
    plain = {"sample_cfgs": [1.0], "sample_num_inference_steps": 1, "sample_batch_size": 4}

    def sampled(**given: Any) -> dict[str, Any]:
        with prepared(**{**settings, "sample_prompts": str(tmp_path / "p.txt"), **plain, **given}) as rehearsal:
            run, calls = rehearsal.run, []
            hook = run.learner.model.denoiser.register_forward_pre_hook(
                lambda _, arguments: calls.append(tuple(arguments[0].shape))
            )
            with hook:
                build_sampler(run, StopSignal()).draw(run)
            events = list(rehearsal.folder.events("sample"))
            grids = [np.asarray(Image.open(event["path"])) for event in events]
        return {
            "seeds": [event["seed"] for event in events],
            "calls": [(batch, side) for batch, _, side, _ in calls],
            "columns": [round(grid.shape[1] / 64) for grid in grids],
            "grids": grids,
        }

    if shown == "changes pixels":
        same = {name: value for name, value in values.items() if name != "sample_scheduler"}
        before, after = sampled(**same)["grids"][0], sampled(**values)["grids"][0]
        assert (not np.array_equal(before, after)) is expected
        return
    assert sampled()[shown] != expected
    assert sampled(**values)[shown] == expected


@pytest.mark.parametrize(("batch_size", "calls"), [(1, [1, 1, 1]), (2, [2, 1])])
def test_auto_samples_no_more_together_than_a_training_batch_has_where_that_keeps_a_gpu_busy(
    settings: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    batch_size: int,
    calls: list[int],
) -> None:
    """At 64 px, with the pixels of one image for those that keep a GPU busy. The images are those of four together."""
    (tmp_path / "p.txt").write_text("a", "utf-8")
    plain = {**settings, "sample_prompts": str(tmp_path / "p.txt"), "batch_size": batch_size}
    plain |= {"sample_cfgs": [1.0, 1.0, 1.0], "sample_num_inference_steps": 1}
    found, grids = [], []
    monkeypatch.setattr("everydream_kit.training.prompt_file.PIXELS_TOGETHER", 64 * 64)
    for given in ({}, {"sample_batch_size": 4}):
        with prepared(**plain, **given) as rehearsal, caplog.at_level("INFO", "everydream_kit"):
            hook = rehearsal.run.learner.model.denoiser.register_forward_pre_hook(
                lambda _, arguments: found.append(len(arguments[0]))
            )
            with hook:
                build_sampler(rehearsal.run, StopSignal()).draw(rehearsal.run)
            [event] = rehearsal.folder.events("sample")
            grids.append((event["images_together"], np.asarray(Image.open(event["path"])).astype(int)))
    assert found == [*calls, 3]
    assert [number for number, _ in grids] == [batch_size, 4]
    assert np.abs(grids[0][1] - grids[1][1]).max() <= 1
    assert caplog.text.count(f"sample_batch_size auto: {batch_size} of 64 x 64 px at a time") == 1


# Changed on resume ----------------------------------------------------------------------------------------------------


def test_retired_names_and_side_files_are_answered_on_resume(settings: dict[str, Any]) -> None:
    run = train({**settings, "max_epochs": 1, "max_steps": None, "disable_textenc_training": True})
    changes = {"lowvram": True, "max_epochs": 2, "optimizer_config": {"base": {"weight_decay": 0.5}}}
    resume(run.folder, changes=changes)
    said = "\n".join(event["message"] for event in run.events("warning"))
    assert "lowvram: no longer used; replaced by gradient_checkpointing and offload_idle_models." in said
    assert json.loads(run.config_path.read_text("utf-8"))["weight_decay"] == 0.5
