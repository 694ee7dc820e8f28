"""Settings: one declaration, one way in, all problems at once, each with its cure."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from everydream_kit.config import RETIRED, TrainConfig, config_warnings
from everydream_kit.errors import ConfigError
from everydream_kit.params import parameters
from everydream_kit.settings import load_config

DESIGN_DEFAULTS = {
    "data_root": "input",
    "project_name": "myproj",
    "logdir": "logs",
    "resolution": 512,
    "batch_size": 2,
    "grad_accum": 1,
    "max_epochs": 300,
    "lr": 1e-6,
    "lr_scheduler": "constant",
    "scale_lr": False,
    "clip_skip": 0,
    "cond_dropout": 0.04,
    "flip_p": 0.0,
    "shuffle_tags": False,
    "keep_tags": 0,
    "seed": 555,
    "gradient_checkpointing": False,
    "amp": True,
    "clip_grad_norm": None,
    "log_step": 25,
    "sample_steps": 250,
    "sample_prompts": "sample_prompts.txt",
    "save_ckpts_from_n_epochs": 0,
    "cache_latents": "auto",
    "cache_variants": 4,
    "loss_type": "mse",
    "zero_frequency_noise_ratio": 0.0,
    "timestep_start": 0,
    "timestep_end": 1000,
    "train_sampler": "ddpm",
    "ema_update_interval": 500,
    "rated_dataset_target_dropout_percent": 50,
}


@pytest.mark.parametrize(("name", "default"), DESIGN_DEFAULTS.items())
def test_the_defaults_are_those_that_the_design_names(name: str, default: object) -> None:
    assert getattr(TrainConfig(resume_ckpt="x"), name) == default


def test_all_problems_are_reported_together_with_name_rule_and_value() -> None:
    with pytest.raises(ConfigError) as caught:
        TrainConfig(lr=-1.0, batch_size=0, resolution=100, bach_size=3)
    message = str(caught.value)
    assert "lr: must be greater than 0 (got -1.0)" in message
    assert "batch_size: must be greater than or equal to 1, or 'auto' (got 0)" in message
    assert "resolution: must be a multiple of 8 (got 100)" in message
    assert "resume_ckpt: required, and not given" in message
    assert "bach_size: unknown setting; did you mean batch_size?" in message


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"timestep_start": 10, "timestep_end": 5}, "timestep_start, timestep_end"),
        ({"disable_unet_training": True, "disable_textenc_training": True}, "nothing is left to train"),
        ({"ema_decay_rate": 0.9, "ema_strength_target": 0.1}, "give one of them"),
        ({"min_snr_gamma": 5.0, "debiased_estimation": True}, "give one of them"),
        ({"fused_backward": True, "grad_accum": 2}, "grad_accum"),
        ({"training_kind": "textual_inversion"}, "new_tokens"),
        ({"push_every": 2}, "push_to"),
        ({"frozen_dtype": "float16", "disable_amp": True}, "frozen_dtype, amp: .* set frozen_dtype to auto, or amp on"),
        ({"frozen_dtype": "bfloat16", "parallel": "fsdp2"}, "parallel, frozen_dtype"),
        ({"early_stopping_patience": 3}, "validation_config"),
        (
            {"quantization": "fp8"},
            "quantization, training_kind: fp8 weights cannot be trained.* set training_kind to lora",
        ),
        ({"text_quantization": "int8"}, "text_quantization, training_kind: .*hold the text encoder too"),
        ({"quantization": "nf4", "training_kind": "lora", "parallel": "fsdp2"}, "parallel, quantization"),
    ],
)
def test_a_rule_about_two_settings_names_both_and_the_cure(settings: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        TrainConfig(resume_ckpt="x", **settings)


def test_non_finite_numbers_and_wrong_types_are_refused() -> None:
    for settings in ({"lr": float("nan")}, {"seed": 1.5}, {"shuffle_tags": "yes"}, {"lr": "1e-6"}):
        with pytest.raises(ConfigError):
            TrainConfig(resume_ckpt="x", **settings)


def test_a_file_gives_back_the_same_settings(tmp_path: Path) -> None:
    config = TrainConfig(resume_ckpt="x", resolution=[768, 512, 512], lr=2e-6, optimizer_args={"amsgrad": True})
    path = tmp_path / "config.json"
    path.write_text(config.to_json(), "utf-8")
    again, warnings = load_config(path)
    assert again == config
    assert again.model_fields_set == config.model_fields_set
    assert warnings == []
    assert config.resolutions == (512, 768)


def test_a_broken_file_is_named_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "train.json"
    path.write_text('{\n  "lr": 1e-6,\n  "batch_size" 2\n}', "utf-8")
    with pytest.raises(ConfigError, match=r"train\.json, line 3.*not valid JSON"):
        load_config(path)
    with pytest.raises(ConfigError, match="there is no such settings file"):
        load_config(tmp_path / "nowhere.json")
    path.write_text("[1]", "utf-8")
    with pytest.raises(ConfigError, match=r"train\.json: holds a list \[\.\.\.\] where an object"):
        load_config(path)


def test_an_everydream2_file_loads_and_names_what_has_gone_out_of_use(tmp_path: Path) -> None:
    path = tmp_path / "train.json"
    old = {
        "resume_ckpt": "sd_v1-5",
        "batch_size": 10,
        "ckpt_every_n_minutes": None,
        "cond_dropout": None,  # null means the default
        "clip_grad_norm": None,
        "lowvram": False,
        "useadam8bit": True,
        "save_every_n_epochs": 20,
    }
    path.write_text(json.dumps(old), "utf-8")
    config, warnings = load_config(path)
    assert (config.batch_size, config.cond_dropout, config.save_every_n_epochs) == (10, 0.04, 20)
    assert len(warnings) == 2
    assert all(any(warning.startswith(name) for name in RETIRED) for warning in warnings)


def test_a_file_of_a_newer_kit_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"version": 99, "resume_ckpt": "x"}', "utf-8")
    with pytest.raises(ConfigError, match="newer EveryDream Kit"):
        load_config(path)


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"resume_ckpt": "x", "lr": 1e-5}', "utf-8")
    assert load_config(path, {"lr": 3e-6})[0].lr == 3e-6


def test_a_config_cannot_be_changed_and_a_changed_copy_is_validated() -> None:
    config = TrainConfig(resume_ckpt="x")
    with pytest.raises(Exception, match="frozen"):
        config.lr = 1.0  # type: ignore[misc]
    assert config.replace(lr=2e-6).lr == 2e-6
    with pytest.raises(ConfigError, match="lr: must be greater than 0"):
        config.replace(lr=0.0)


def test_settings_that_are_probably_not_meant_are_warned_about() -> None:
    config = TrainConfig(resume_ckpt="x", cond_dropout=0.3, keep_tags=2, attn_type="xformers")
    text = "\n".join(config_warnings(config))
    assert "0.26" in text
    assert "keep_tags" in text
    assert "xformers" in text
    assert config_warnings(TrainConfig(resume_ckpt="x")) == []
    assert "auto keeps the precision" in config_warnings(TrainConfig(resume_ckpt="x", frozen_dtype="float16"))[0]
    assert config_warnings(TrainConfig(resume_ckpt="x", frozen_dtype="float16", training_kind="lora")) == []


def test_none_that_was_said_comes_back_from_a_runs_own_file(tmp_path):
    """It is not EveryDream 2's null for the default: a run without samples has none when it continues, either."""
    path = tmp_path / "config.json"
    path.write_text(TrainConfig(resume_ckpt="base", sample_steps=None).to_json(), "utf-8")
    assert load_config(path)[0].sample_steps is None
    path.write_text('{"resume_ckpt": "base", "sample_steps": null, "lr": null}', "utf-8")
    config = load_config(path)[0]
    assert (config.sample_steps, config.lr) == (None, 1e-6)  # no lr at all is none that anybody could mean
    path.write_text('{"resume_ckpt": "base", "sample_steps": null, "lowvram": false}', "utf-8")
    assert load_config(path)[0].sample_steps == 250


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("resolution", [512, 500], "resolution: must be a multiple of 8 (got 500)"),
        ("resolution", 500, "resolution: must be a multiple of 8 (got 500)"),
        ("resolution", "wide", "resolution: must be a valid integer or a valid list (got 'wide')"),
        ("resolution", [], "resolution: List should have at least 1 item after validation, not 0 (got [])"),
        ("batch_size", "big", "batch_size: must be a valid integer or 'auto' (got 'big')"),
        ("batch_size", 0, "batch_size: must be greater than or equal to 1, or 'auto' (got 0)"),
        (
            "resolution",
            [512, 500, 48],
            "resolution: must be a multiple of 8 (got 500)\nresolution: must be greater than or equal to 64 (got 48)",
        ),
        ("background", "white", "background: must be #rrggbb (got 'white')"),
        (
            "project_name",
            "a/b",
            "project_name: must be up to 100 characters, none of / \\ : * ? \" < > | (got 'a/b')",
        ),
        ("lr_scheduler", "cosin", "lr_scheduler: must be 'constant', 'linear', 'cosine' or 'polynomial' (got 'cosin')"),
        ("betas", [], "betas: List should have at least 1 item after validation, not 0 (got [])"),
        ("data_root", 5, "data_root: must be a valid string or a valid list or a valid dictionary (got 5)"),
        ("data_root", ["a", 1], "data_root: must be a valid string (got 1)"),
        ("optimizer_config", 5, "optimizer_config: must be a valid string or a valid dictionary (got 5)"),
    ],
)
def test_of_a_setting_with_several_forms_the_form_that_was_meant_answers(
    name: str, value: object, message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        TrainConfig(**{"resume_ckpt": "x", name: value})
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("adam_weight_decay", "weight_decay"),
        ("adam_beta1", "betas"),
        ("epsilon", "eps"),
        ("te_lr", "text_encoder_lr"),
        ("freeze_embeddings", "text_encoder_freeze_embeddings"),
        ("weight_decy", "weight_decay"),
        ("text_encoder_lr_schedule", "text_encoder_lr_scheduler"),
    ],
)
def test_a_name_of_an_optimizer_is_answered_with_its_setting(name: str, place: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{name}: unknown setting; did you mean {place}\?$"):
        TrainConfig(**{"resume_ckpt": "x", name: 1})


def test_help_says_what_holds_for_each_family_and_optimizer() -> None:
    help_of = {record.name: record.help for record in parameters()}
    assert "SDXL takes its penultimate layers without the norm" in help_of["clip_skip"]
    assert "adafactor's lr is relative" in help_of["optimizer"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"training_kind": "full"}, "blocks_to_swap, training_kind: full training changes every block"),
        ({"training_kind": "lora", "torch_compile": True}, "blocks_to_swap, torch_compile: compiled blocks keep"),
    ],
)
def test_blocks_wait_in_host_memory_only_where_they_can(settings, message):
    with pytest.raises(ConfigError, match=message):
        TrainConfig(resume_ckpt="base", blocks_to_swap=4, **settings)
    TrainConfig(resume_ckpt="base", blocks_to_swap=0, **settings)
