"""Every run file that EveryDream 2 and damian0815's fork ship or document, key by key: what becomes of it here.

The files below have their keys and values, written by hand.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from optimizers_by_name import build_optimizer

from everydream_kit.cli import main
from everydream_kit.config import RETIRED, TrainConfig
from everydream_kit.errors import ConfigError
from everydream_kit.everydream2.optimizer_file import import_optimizer_file
from everydream_kit.everydream2.run_file import FORK, FORK_WITHOUT_EFFECT, OFF_AT_ZERO
from everydream_kit.everydream2.validation_file import import_validation_file
from everydream_kit.settings import load_config

COMMON = {
    "batch_size": 8,
    "ckpt_every_n_minutes": None,
    "clip_grad_norm": None,
    "clip_skip": 0,
    "cond_dropout": 0.04,
    "data_root": "X:\\data",
    "disable_textenc_training": False,
    "flip_p": 0.0,
    "gpuid": 0,
    "gradient_checkpointing": True,
    "grad_accum": 1,
    "logdir": "logs",
    "log_step": 25,
    "max_epochs": 40,
    "project_name": "abc",
    "resolution": 512,
    "resume_ckpt": "base",
    "sample_prompts": "sample_prompts.txt",
    "sample_steps": 300,
    "save_ckpt_dir": None,
    "save_every_n_epochs": 20,
    "save_optimizer": False,
    "seed": -1,
    "shuffle_tags": False,
    "wandb": False,
    "write_schedule": False,
}
LATER = {
    "notebook": False,
    "optimizer_config": "optimizer.json",
    "run_name": None,
    "save_ckpts_from_n_epochs": 0,
    "validation_config": "validation_default.json",
}
OLD = {"lowvram": False, "lr": 2e-6, "lr_decay_steps": 0, "lr_scheduler": "constant", "lr_warmup_steps": None}
EMA = dict.fromkeys(["ema_decay_rate", "ema_strength_target", "ema_update_interval", "ema_device", "ema_resume_model"])
EMA |= {"ema_sample_nonema_model": False, "ema_sample_ema_model": False}
RATED = {"rated_dataset": False, "rated_dataset_target_dropout_percent": 50, "zero_frequency_noise_ratio": 0.02}
NEWER = {"enable_zero_terminal_snr": False, "load_settings_every_epoch": False, "min_snr_gamma": None}
CHAIN = {
    **COMMON,
    **OLD,
    "amp": False,
    "disable_xformers": True,
    "ed1_mode": True,
    "scale_lr": False,
    "useadam8bit": True,
}
SD21 = {**COMMON, **LATER, **OLD, **RATED, **NEWER, **EMA, "amp": True, "disable_xformers": False, "scale_lr": False}
TRAIN = {
    **COMMON,
    **LATER,
    **NEWER,
    **EMA,
    "attn_type": "sdp",
    "disable_amp": False,
    "embedding_perturbation": 0.0,
    "loss_type": "mse",
    "timestep_start": 0,
    "timestep_end": 1000,
    "zero_frequency_noise_ratio": 0.02,
    "pyramid_noise_discount": 0.03,
    "min_snr_gamma": 5.0,
}
COCO = {
    **COMMON,
    **LATER,
    **OLD,
    **RATED,
    "amp": True,
    "cond_dropout": 1.0,
    "disable_xformers": False,
    "scale_lr": False,
}
SDXL = {
    **TRAIN,
    **RATED,
    "rotation_degrees": 0,
    "scale_lr": False,
    "pyramid_noise_discount": None,
    "min_snr_gamma": None,
}
CAT_TOY = {**CHAIN, "save_every_n_epochs": 1e6, "notebook": False, "sample_steps": None}
LORA = {
    "lora": True,
    "lora_rank": 16,
    "lora_alpha": 16,
    "lora_save_every_n_epochs": 10,
    "patience": 5,
    "_resume_ckpt": "other",
    "_resume_ckpt_variant": "fp16",
    "_validation_config": "v.json",
}
FILES = {
    "train": (TRAIN, {"notebook"}),
    "trainSD21": (SD21, {"disable_xformers", "lowvram", "notebook"}),
    "chain0": (CHAIN, {"disable_xformers", "ed1_mode", "lowvram", "useadam8bit", "amp false"}),
    "chain1": (
        {**CHAIN, "resume_ckpt": "findlast"},
        {"disable_xformers", "ed1_mode", "lowvram", "useadam8bit", "amp false"},
    ),
    "chain2": (
        {**CHAIN, "disable_textenc_training": True, "grad_accum": 5},
        {"disable_xformers", "ed1_mode", "lowvram", "useadam8bit", "amp false"},
    ),
    "train_coco": (COCO, {"disable_xformers", "lowvram", "notebook"}),
    "fork train": ({**SDXL, "resolution": [1024]}, {"notebook", "rotation_degrees"}),
    "fork cat-toy2": (CAT_TOY, {"disable_xformers", "ed1_mode", "lowvram", "notebook", "useadam8bit", "amp false"}),
    "fork cat-toy2-lora": (
        {**CAT_TOY, **LORA},
        {"disable_xformers", "ed1_mode", "lowvram", "notebook", "useadam8bit", "amp false", "lora", "patience"}
        | {"lora_save_every_n_epochs"},
    ),
}


def load(tmp_path: Path, values: dict, **flags: object) -> tuple[TrainConfig, list[str]]:
    path = tmp_path / "train.json"
    path.write_text(json.dumps(values), "utf-8")
    return load_config(path, flags)


@pytest.mark.parametrize("name", FILES)
def test_every_shipped_run_file_loads_with_a_warning_for_each_retired_name(tmp_path, name):
    values, expected = FILES[name]
    config, warnings = load(tmp_path, values)
    missing = {"optimizer_config"} if "optimizer_config" in values else set()  # optimizer.json is not next to it here
    assert {warning.split(":")[0] for warning in warnings} == expected | missing
    assert (config.amp, config.lr_decay_steps, config.max_epochs) == (True, None, 40)
    assert config.save_every_n_epochs == int(values["save_every_n_epochs"])
    assert config.training_kind == ("lora" if "lora" in values else "full")
    assert config.sample_steps == (values["sample_steps"] or TrainConfig(resume_ckpt="x").sample_steps)
    assert load(tmp_path, json.loads(config.to_json()))[0] == config


@pytest.mark.parametrize("value", [0, 0.0, -1, None])
@pytest.mark.parametrize("name", OFF_AT_ZERO)
def test_zero_and_null_mean_off_or_by_default(tmp_path, name, value):
    config, warnings = load(tmp_path, {"resume_ckpt": "x", name: value})
    assert (getattr(config, name), warnings) == (None, [])
    if value is not None:
        assert getattr(load(tmp_path, {"resume_ckpt": "x"}, **{name: value})[0], name) is None


@pytest.mark.parametrize(
    ("values", "name", "expected"),
    [
        ({"clip_skip": 5}, "clip_skip", 4),
        ({"clip_skip": -1}, "clip_skip", 0),
        ({"rated_dataset_target_dropout_percent": 120}, "rated_dataset_target_dropout_percent", 100),
        ({"ema_decay_rate": 0.99, "ema_strength_target": 0.1}, "ema_decay_rate", None),
        ({"ema_decay_rate": 0.99, "ema_strength_target": 0.1}, "ema_strength_target", 0.1),
    ],
)
def test_values_that_are_clamped_or_overruled_there_are_so_here_with_a_warning(tmp_path, values, name, expected):
    config, warnings = load(tmp_path, {"resume_ckpt": "x", **values})
    assert getattr(config, name) == expected
    assert len(warnings) == 1
    assert warnings[0].startswith(next(iter(values)))


def test_numbers_and_words_of_a_file_are_read_as_meant_and_comments_passed_over(tmp_path):
    given = {
        "resume_ckpt": "x",
        "max_epochs": 1e2,
        "amp": "false",
        "comment": "c",
        "_lr": 3,
        "documentation": {"lr": ""},
    }
    config, warnings = load(tmp_path, given)
    assert (config.max_epochs, config.amp, config.lr, warnings) == (100, False, 1e-6, [])
    with pytest.raises(ConfigError, match="max_epochs"):
        load(tmp_path, {"resume_ckpt": "x", "max_epochs": 1.5})


@pytest.mark.parametrize("name", sorted(FORK))
def test_a_setting_of_the_fork_is_passed_over_where_it_is_off_and_refused_by_name_where_it_is_on(tmp_path, name):
    for off in (None, False, 0, *FORK[name]):
        config, _ = load(tmp_path, {"resume_ckpt": "x", name: off})
        assert config == TrainConfig(resume_ckpt="x")
    with pytest.raises(ConfigError, match=f"{name}: a setting of damian0815's fork that changes the training"):
        load(tmp_path, {"resume_ckpt": "x", name: 0.123})


@pytest.mark.parametrize("name", sorted(set(RETIRED) - {"config"} | FORK_WITHOUT_EFFECT))
def test_a_retired_name_is_answered_in_a_file_and_in_python(tmp_path, name):
    for config, warnings in (
        load(tmp_path, {"resume_ckpt": "x", name: True}),
        load_config(None, {"resume_ckpt": "x", name: True}),
    ):
        assert config.resume_ckpt == "x"
        assert [warning.split(":")[0] for warning in warnings] == [name]


@pytest.mark.parametrize("flag", ["--lowvram", "--useadam8bit", "--disable_xformers", "--ed1_mode", "--notebook"])
def test_a_retired_flag_is_answered_with_what_replaces_it(tmp_path, flag, capsys, caplog):
    with caplog.at_level(logging.WARNING):
        status = main(["train", "--resume_ckpt", str(tmp_path / "none"), flag, "--data_root", str(tmp_path / "no")])
    said = caplog.text + capsys.readouterr().err
    assert status == 1  # there is no such model
    assert f"{flag[2:]}: no longer used; replaced by {RETIRED[flag[2:]]}" in said


def test_a_flag_of_the_fork_becomes_ours_or_is_refused_by_name(tmp_path, capsys):
    main(["train", "--resume_ckpt", str(tmp_path / "none"), "--teacher", "model"])
    assert "teacher: a setting of damian0815's fork" in capsys.readouterr().err
    config, _ = load_config(None, {"resume_ckpt": "x", "lora": True, "resume_ckpt_variant": "fp16"})
    assert (config.training_kind, config.base_variant) == ("lora", "fp16")


def test_chain_reports_the_warnings_of_every_file_with_its_name(tmp_path, caplog, capsys):
    for name in ("chain0", "chain1"):
        values = {
            **CHAIN,
            "resume_ckpt": str(tmp_path / "none"),
            "data_root": str(tmp_path),
            "logdir": str(tmp_path / "l"),
        }
        (tmp_path / f"{name}.json").write_text(json.dumps(values))
    with caplog.at_level(logging.WARNING):
        assert main(["chain", str(tmp_path / "chain0.json"), str(tmp_path / "chain1.json")]) == 1
    for name in ("chain0", "chain1"):
        assert f"{name}.json: lowvram: no longer used" in caplog.text


@pytest.mark.parametrize("name", ["lr_scheduler", "lr_warmup_steps", "lr_decay_steps"])
@pytest.mark.parametrize("as_file", [True, False])
def test_of_the_schedule_the_optimizer_file_wins_for_its_files_and_the_run_for_ours(tmp_path, name, as_file):
    own, other = ("constant", "cosine") if name == "lr_scheduler" else (10, 20)
    optimizer: object = {"base": {name: other}}
    if as_file:
        path = tmp_path / "optimizer.json"
        path.write_text(json.dumps(optimizer))
        optimizer = str(path)
    mine = {"resume_ckpt": "x", name: own, "optimizer_config": optimizer}
    config, warnings = load(tmp_path, {**mine, "lowvram": False})
    assert (getattr(config, name), config.optimizer_config) == (other, None)
    assert f"{name}: {other} of optimizer_config is used, not {own}, as in EveryDream 2." in warnings
    again = load(tmp_path, json.loads(config.to_json()))[0]
    assert getattr(again, name) == other  # a resumed run keeps the order
    config, warnings = load(tmp_path, mine)
    assert (getattr(config, name), name in config.model_fields_set) == (own, True)
    assert warnings == [f"{name}: {own} is used, not {other} of optimizer_config."]
    assert getattr(load(tmp_path, {**mine, "lowvram": False}, **{name: own})[0], name) == own  # a flag wins


def test_its_optimizer_files_load(tmp_path):
    base = {
        "optimizer": "dadapt_adam",
        "lr": 1e-1,
        "lr_scheduler": "constant",
        "lr_decay_steps": 0,
        "lr_warmup_steps": None,
        "betas": [0.9, 0.999],
        "epsilon": 1e-8,
        "weight_decay": 0.8,
        "d0": 1e-6,
        "decouple": True,
        "comment": "mine",
    }
    nothing = dict.fromkeys(base)
    values, notes = import_optimizer_file(
        {
            "doc": {"base": "words", "-----": "-----"},
            "comment": "more words",
            "base": base,
            "text_encoder_overrides": {**nothing, "lr": 5e-7, "lr_scheduler": "cosine"},
            "text_encoder_freezing": {"unfreeze_last_n_layers": None},
            "apply_grad_scaler_step_tweaks": True,
            "log_grad_norm": False,
        }
    )
    assert ("lr_decay_steps" in values, values["optimizer"]) == (False, "dadapt_adam")
    assert notes == ["log_grad_norm: has no effect; the log always shows the gradient norm."]


def test_its_validation_files_load():
    values, _ = import_validation_file(
        {
            "documentation": {"seed": "words"},
            "validate_training": "true",
            "val_split_mode": "manual",
            "val_data_root": "Q:/val",
            "val_split_proportion": 0.15,
            "stabilize_training_loss": "False".lower(),
            "extra_manual_datasets": None,
            "clip_score_enabled": False,
            "clip_score_model": "m",
            "fdd_enabled": False,
            "fdd_n_images": 256,
            "fdd_model": "m",
        }
    )
    assert values == {
        "validation_split_mode": "manual",
        "validation_data_root": "Q:/val",
        "validation_split_proportion": 0.15,
        "stabilize_training_loss": False,
    }
    with pytest.raises(ConfigError, match="fdd_enabled: a measurement of damian0815's fork"):
        import_validation_file({"fdd_enabled": True})


@pytest.mark.parametrize("name", ["coordinate_dowg", "scalar_dowg", "adacoor"])
def test_its_own_optimizers_find_the_minimum_of_a_parabola(name):
    x = torch.nn.Parameter(torch.tensor([3.0, -1.0]))
    optimizer = build_optimizer(name, [x], lr=1.0, **({"eps": 1.0} if name == "adacoor" else {}), weight_decay=0.0)
    for _ in range(400):
        optimizer.zero_grad()
        ((x - torch.tensor([1.0, 2.0])) ** 2).sum().backward()
        optimizer.step()
    assert torch.allclose(x, torch.tensor([1.0, 2.0]), atol=0.05)


def test_adacoor_steps_as_its_formula_says():
    x = torch.nn.Parameter(torch.tensor([1.0]))
    optimizer = build_optimizer("adacoor", [x], lr=1.0, eps=1e-4, weight_decay=0.0)
    v, expected = 0.0, 1.0
    for gradient in (2.0, -1.0, 0.5):
        x.grad = torch.tensor([gradient])
        optimizer.step()
        v += 1e-4 * gradient**2
        expected -= 1e-4 * gradient / (v**0.5 + 1e-4)
    assert x.item() == pytest.approx(expected, rel=1e-5)
