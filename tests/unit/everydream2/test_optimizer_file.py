"""EveryDream 2's optimizer.json: what it means, who wins, what is refused."""

import json
from typing import get_args

import pytest

from everydream_kit.config import TrainConfig
from everydream_kit.config.part_settings import TextEncoderGroup, UnetGroup
from everydream_kit.errors import ConfigError
from everydream_kit.everydream2.optimizer_file import OptimizerFile, import_optimizer_file
from everydream_kit.settings import load_config, with_side_files
from everydream_kit.training.parameters import num_trained_layers
from everydream_kit.training.parts import not_inherited, part_settings

SHIPPED = {  # the shape of EveryDream 2's own file
    "doc": {"base": "any text", "-----": "-----"},
    "base": {
        "optimizer": "adamw8bit",
        "lr": 1e-6,
        "lr_scheduler": "constant",
        "lr_decay_steps": None,
        "lr_warmup_steps": None,
        "betas": [0.9, 0.999],
        "epsilon": 1e-8,
        "weight_decay": 0.010,
    },
    "text_encoder_overrides": {
        "optimizer": None,
        "lr": 5e-7,
        "lr_scheduler": "cosine",
        "lr_decay_steps": None,
        "lr_warmup_steps": None,
        "betas": None,
        "epsilon": None,
        "weight_decay": None,
    },
    "text_encoder_freezing": {
        "freeze_embeddings": True,
        "unfreeze_last_n_layers": 2,
        "freeze_final_layer_norm": False,
    },
    "apply_grad_scaler_step_tweaks": True,
}


def settings_of(file, part, **given):
    """How a part is trained with an optimizer file and settings that are given next to it."""
    config, _ = with_side_files(TrainConfig(resume_ckpt="x", optimizer_config=file, **given))
    return part_settings(config, part, "adamw")


def test_the_shipped_file_loads_and_sets_both_parts_apart(tmp_path):
    path = tmp_path / "optimizer.json"
    path.write_text(json.dumps(SHIPPED), encoding="utf-8")
    assert import_optimizer_file(path)[1] == []
    unet, text = settings_of(str(path), "unet"), settings_of(str(path), "text encoder")
    assert (unet.optimizer, unet.lr, unet.lr_scheduler) == ("adamw8bit", 1e-6, "constant")
    assert (text.optimizer, text.lr, text.lr_scheduler) == ("adamw8bit", 5e-7, "cosine")
    assert unet.betas == text.betas == (0.9, 0.999)
    assert unet.eps == text.eps == 1e-8
    assert unet.weight_decay == text.weight_decay == 0.01
    assert text.lr_warmup_steps is None


def test_every_key_becomes_a_setting_of_its_own():
    assert import_optimizer_file(SHIPPED)[0] == {
        "optimizer": "adamw8bit",
        "lr": 1e-6,
        "lr_scheduler": "constant",
        "betas": [0.9, 0.999],
        "eps": 1e-8,
        "weight_decay": 0.01,
        "text_encoder_lr": 5e-7,
        "text_encoder_lr_scheduler": "cosine",
        "text_encoder_freeze_embeddings": True,
        "text_encoder_unfreeze_last_n_layers": 2,
        "text_encoder_freeze_final_layer_norm": False,
        "apply_grad_scaler_step_tweaks": True,
    }


def test_path_object_and_text_mean_the_same(tmp_path):
    path = tmp_path / "optimizer.json"
    path.write_text(json.dumps(SHIPPED), encoding="utf-8")
    assert import_optimizer_file(path) == import_optimizer_file(str(path)) == import_optimizer_file(SHIPPED)


def test_without_a_file_both_parts_have_the_runs_settings():
    config = TrainConfig(resume_ckpt="x", lr=3e-6, lr_scheduler="linear")
    for part in ("unet", "text encoder"):
        settings = part_settings(config, part, "adamw")
        assert (settings.lr, settings.lr_scheduler, settings.weight_decay) == (3e-6, "linear", None)


def test_a_given_lr_beats_the_base_and_not_the_text_encoders_own():
    assert settings_of(SHIPPED, "unet", lr=2e-6).lr == 2e-6
    assert settings_of(SHIPPED, "text encoder", lr=2e-6).lr == 5e-7


def test_a_given_zero_stays_zero():
    file = {
        "base": {"lr": 1e-6, "weight_decay": 0.1, "lr_warmup_steps": 50, "epsilon": 1e-8},
        "text_encoder_overrides": {"lr": 0, "weight_decay": 0, "lr_warmup_steps": 0, "betas": [0, 0], "epsilon": 0},
    }
    text = settings_of(file, "text encoder", lr=1e-5)
    assert (text.lr, text.weight_decay, text.lr_warmup_steps, text.betas, text.eps) == (0, 0, 0, (0, 0), 0)


def test_the_unet_may_have_overrides_too():
    file = {"base": {"lr": 1e-6}, "unet_overrides": {"lr": 4e-6}}
    assert settings_of(file, "unet").lr == 4e-6
    assert settings_of(file, "text encoder").lr == 1e-6


def test_everydream_2s_d_adaptation_file_keeps_its_extra_settings():
    file = {
        "base": {"optimizer": "dadapt_adam", "lr": 0.1, "d0": 1e-6, "decouple": True, "weight_decay": 0.8},
        "text_encoder_freezing": {"unfreeze_last_n_layers": None},
    }
    assert settings_of(file, "unet").kwargs == {"d0": 1e-6, "decouple": True}


def test_keyword_arguments_go_with_their_optimizer():
    file = {
        "base": {"optimizer": "sgd", "kwargs": {"nesterov": True}},
        "text_encoder_overrides": {"optimizer": "adamw"},
    }
    assert settings_of(file, "unet").kwargs == {"nesterov": True}
    assert settings_of(file, "text encoder").kwargs == {}


@pytest.mark.parametrize(
    ("name", "value", "optimizer"),
    [
        ("d0", 1e-5, "prodigy"),
        ("momentum", 0.5, "sgd"),
        ("decouple", True, "prodigy"),
        ("optimizer_args", {"a": 1}, "sgd"),
    ],
)
def test_a_part_with_another_optimizer_does_not_inherit_what_is_the_others_own(name, value, optimizer):
    config = TrainConfig(resume_ckpt="x", optimizer=optimizer, text_encoder_optimizer="lion", **{name: value})
    assert part_settings(config, "text encoder", "adamw").kwargs == {}
    assert part_settings(config, "unet", "adamw").kwargs == (value if name == "optimizer_args" else {name: value})
    assert not_inherited(config, "unet") == []
    [said] = not_inherited(config, "text encoder")
    assert said == (
        f"{name}: the text encoder does not have it, since its optimizer is lion; give text_encoder_{name} for one of its own."
    )
    own = config.replace(**{f"text_encoder_{name}": value})
    assert part_settings(own, "text encoder", "adamw").kwargs == (value if name == "optimizer_args" else {name: value})
    assert not_inherited(own, "text encoder") == []


def test_the_same_optimizer_in_another_spelling_inherits():
    config = TrainConfig(resume_ckpt="x", optimizer="dadapt_sgd", momentum=0.5, text_encoder_optimizer="DAdaptSGD")
    assert part_settings(config, "text encoder", "adamw").kwargs == {"momentum": 0.5}
    assert not_inherited(config, "text encoder") == []


@pytest.mark.parametrize("part", [UnetGroup, TextEncoderGroup])
def test_each_part_may_have_every_setting_of_an_optimizer(part):
    prefix = "unet_" if part is UnetGroup else "text_encoder_"
    shared = ["optimizer", "lr", "lr_scheduler", "lr_warmup_steps", "lr_decay_steps", "betas", "eps", "weight_decay"]
    shared += ["d0", "decouple", "momentum", "optimizer_args"]
    names = [name.removeprefix(prefix) for name in part.model_fields]
    assert [name for name in names if name in TrainConfig.model_fields] == [n for n in names if n in shared]
    assert set(shared) <= set(names)
    for name in shared:
        assert part.model_fields[prefix + name].default is None


# Given twice ----------------------------------------------------------------------------------------------------------


def loaded(tmp_path, values, **flags):
    path = tmp_path / "train.json"
    path.write_text(json.dumps(values), encoding="utf-8")
    return load_config(path, flags)


def test_a_setting_wins_over_the_side_file_that_is_named_next_to_it_and_this_is_said(tmp_path):
    file = {"base": {"lr": 1e-5, "weight_decay": 0.5, "epsilon": 1e-3}}
    given = {"resume_ckpt": "x", "lr": 2e-6, "eps": 1e-3, "optimizer_config": file}
    for config, warnings in (loaded(tmp_path, given), load_config(None, given)):
        assert (config.lr, config.weight_decay, config.eps, config.optimizer_config) == (2e-6, 0.5, 1e-3, None)
        assert warnings == ["lr: 2e-06 is used, not 1e-05 of optimizer_config."]


def test_a_flag_wins_over_the_side_file_of_a_settings_file_and_a_flags_side_file_over_the_settings(tmp_path):
    inside = {"resume_ckpt": "x", "weight_decay": 0.3, "optimizer_config": {"base": {"lr": 1e-5}}}
    assert loaded(tmp_path, inside, lr=3e-6)[0].lr == 3e-6
    other = {"base": {"lr": 7e-6, "weight_decay": 0.1}}
    config, _ = loaded(tmp_path, inside, optimizer_config=other)
    assert (config.lr, config.weight_decay) == (7e-6, 0.1)
    assert loaded(tmp_path, inside, optimizer_config=other, lr=3e-6)[0].lr == 3e-6


def test_another_optimizer_does_not_get_what_the_file_has_for_its_own(tmp_path):
    file = {"base": {"optimizer": "sgd", "momentum": 0.5, "lr": 1e-5}}
    for config, warnings in (
        loaded(tmp_path, {"resume_ckpt": "x", "optimizer_config": file}, optimizer="adamw"),
        load_config(None, {"resume_ckpt": "x", "optimizer_config": file, "optimizer": "adamw"}),
    ):
        assert (config.optimizer, config.momentum, config.lr) == ("adamw", None, 1e-5)
        assert "momentum: that of optimizer_config is not used, since optimizer adamw is given." in warnings
    prodigy = {"resume_ckpt": "x", "optimizer": "prodigy", "optimizer_config": {"base": {"d0": 1e-3}}}
    assert load_config(None, prodigy)[0].d0 == 1e-3


# The default file -----------------------------------------------------------------------------------------------------

THEIRS = {"resume_ckpt": "x", "lowvram": False}


def test_a_train_json_of_everydream_2_reads_optimizer_json_of_the_working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "optimizer.json").write_text('{"base": {"weight_decay": 0.5}}', encoding="utf-8")
    said = "optimizer_config: optimizer.json of the working folder is used, as in EveryDream 2."
    for values in (THEIRS, {**THEIRS, "optimizer_config": None}):
        config, warnings = loaded(tmp_path, values)
        assert config.weight_decay == 0.5
        assert said in warnings
    assert loaded(tmp_path, {**THEIRS, "optimizer_config": "optimizer.json"})[0].weight_decay == 0.5
    assert loaded(tmp_path, THEIRS, optimizer_config=None)[0].weight_decay is None
    assert loaded(tmp_path, {"resume_ckpt": "x"})[0].weight_decay is None  # a file of ours names what it reads


def test_without_that_file_the_defaults_hold_and_another_file_that_is_missing_is_an_error(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config, warnings = loaded(tmp_path, {**THEIRS, "optimizer_config": "optimizer.json"})
    assert config.optimizer_config is None
    assert "optimizer_config: optimizer.json is not there; the defaults are used, as in EveryDream 2." in warnings
    config, _ = loaded(tmp_path, {**THEIRS, "optimizer_config": "mine.json"})
    with pytest.raises(ConfigError, match=r"optimizer_config: mine\.json: there is no such settings file"):
        with_side_files(config)


# Files of version 1 ---------------------------------------------------------------------------------------------------


def test_a_runs_config_of_version_1_keeps_what_its_optimizer_and_validation_objects_said(tmp_path):
    plain = json.loads(TrainConfig(resume_ckpt="x", lr=2e-6, early_stopping_patience=3, validation_config={}).to_json())
    old = {
        **{name: value for name, value in plain.items() if name in OLD_NAMES},
        "version": 1,
        "given": ["resume_ckpt", "lr", "optimizer_config", "validation_config", "early_stopping_patience"],
        "optimizer_config": {"base": {"lr": 1e-5, "weight_decay": 0.2}, "text_encoder_overrides": {"lr": 5e-7}},
        "validation_config": {"auto_split_proportion": 0.3, "every_n_epochs": 2},
    }
    config, _ = loaded(tmp_path, old)
    assert (config.lr, config.weight_decay, config.text_encoder_lr) == (2e-6, 0.2, 5e-7)
    assert (config.validation_split_mode, config.validation_split_proportion) == ("automatic", 0.3)
    assert (config.validation_every_n_epochs, config.early_stopping_patience) == (2, 3)
    again, warnings = loaded(tmp_path, json.loads(config.to_json()))
    assert again == config
    assert again.model_fields_set == config.model_fields_set
    assert warnings == []


OLD_NAMES = ("resume_ckpt", "lr", "early_stopping_patience")


# Freezing -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("freezing", "expected"),
    [
        ({}, 12),
        ({"unfreeze_last_n_layers": 2}, 2),
        ({"unfreeze_final_n_layers": 2}, 2),
        ({"unfreeze_last_n_layers": 0}, 0),
        ({"unfreeze_last_n_layers": 99}, 12),
        ({"freeze_front_n_layers": 5}, 7),
        ({"freeze_front_n_layers": -6}, 6),
        ({"freeze_front_n_layers": 0}, 12),
    ],
)
def test_all_spellings_of_layer_freezing(freezing, expected):
    values, _ = import_optimizer_file({"text_encoder_freezing": freezing})
    assert num_trained_layers(TextEncoderGroup(**values), 12) == expected


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"bass": {}}, r"optimizer_config\.bass: unknown setting; did you mean base\?"),
        ({"base": {"weight_decy": 0}}, r"optimizer_config\.base\.weight_decy: unknown.*did you mean weight_decay\?"),
        (
            {"text_encoder_freezing": {"unfreeze_last_layers": 1}},
            r"text_encoder_freezing\.unfreeze_last_layers: unknown setting; did you mean unfreeze_last_n_layers\?",
        ),
        ({"base": {"lr": -1}}, r"optimizer_config\.base\.lr: must be greater than or equal to 0 \(got -1\)"),
        ({"base": {"lr": "1e-6"}}, r"optimizer_config\.base\.lr: must be a valid number \(got '1e-6'\)"),
        ({"base": {"lr_scheduler": "cosin"}}, r"base\.lr_scheduler: must be 'constant', 'linear'.*got 'cosin'"),
        (
            {"text_encoder_freezing": {"unfreeze_last_n_layers": 1, "freeze_front_n_layers": 3}},
            "unfreeze_last_n_layers, freeze_front_n_layers: they mean the same",
        ),
    ],
)
def test_what_is_wrong_is_named_with_its_place(values, message):
    with pytest.raises(ConfigError, match=message):
        import_optimizer_file(values)


def test_all_problems_come_together():
    with pytest.raises(ConfigError) as caught:
        import_optimizer_file({"base": {"lr": -1, "betas": []}, "other": 1})
    assert len(str(caught.value).splitlines()) == 3


def test_a_missing_or_broken_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"optimizer_config: .*nowhere\.json: there is no such settings file"):
        import_optimizer_file(tmp_path / "nowhere.json")
    broken = tmp_path / "broken.json"
    broken.write_text('{"base": {\n"lr": 1e-6,}}', encoding="utf-8")
    with pytest.raises(ConfigError, match=r"broken\.json, line 2, column \d+: not valid JSON"):
        import_optimizer_file(broken)
    broken.write_text("[1]", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"holds a list"):
        import_optimizer_file(broken)
    broken.write_bytes(b'{"a": "\xff"}')
    with pytest.raises(ConfigError, match="not UTF-8 text"):
        import_optimizer_file(broken)


def test_a_value_that_json_cannot_hold_is_refused():
    with pytest.raises(ConfigError, match="holds something that JSON cannot hold"):
        import_optimizer_file({"base": {"kwargs": {"callback": print}}})


def test_what_cannot_be_translated_is_named():
    file = {"text_encoder_lr_scale": 0.5, "text_encoder_overrides": {"lr": 1e-6}, "log_grad_norm": False}
    values, notes = import_optimizer_file(file)
    assert values == {"text_encoder_lr": 1e-6}
    assert notes == [
        "text_encoder_lr_scale: not used, since optimizer_config gives text_encoder_overrides.lr.",
        "log_grad_norm: has no effect; the log always shows the gradient norm.",
    ]


def test_every_key_of_the_file_is_translated_or_named():
    section = {"optimizer": "prodigy", "lr": 1.0, "lr_scheduler": "cosine", "lr_warmup_steps": 1, "lr_decay_steps": 2}
    section |= {"betas": [0.5, 0.6], "epsilon": 0.1, "weight_decay": 0.3, "d0": 0.2, "decouple": False, "momentum": 0.4}
    section |= {"kwargs": {"a": 1}}
    assert section.keys() == get_args(OptimizerFile.model_fields["base"].annotation)[0].model_fields.keys()
    file = dict.fromkeys(("base", "unet_overrides", "text_encoder_overrides"), section)
    values, _ = import_optimizer_file(file)
    assert len(values) == 3 * len(section)
    assert values.keys() <= TrainConfig.model_fields.keys()
