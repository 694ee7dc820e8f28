"""EveryDream 2's optimizer.json: what loads, who wins, what is refused."""

import json

import pytest

from everydream_kit.errors import ConfigError
from everydream_kit.training.optimizer_config import load_optimizer_config, part_settings

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


def test_the_shipped_file_loads_and_sets_both_parts_apart(tmp_path):
    path = tmp_path / "optimizer.json"
    path.write_text(json.dumps(SHIPPED), encoding="utf-8")
    config = load_optimizer_config(path)
    unet, text = part_settings(config, "unet"), part_settings(config, "text encoder")
    assert (unet.optimizer, unet.lr, unet.lr_scheduler) == ("adamw8bit", 1e-6, "constant")
    assert (text.optimizer, text.lr, text.lr_scheduler) == ("adamw8bit", 5e-7, "cosine")
    assert unet.betas == text.betas == (0.9, 0.999)
    assert unet.weight_decay == text.weight_decay == 0.01
    assert text.lr_warmup_steps is None
    assert config.warnings == []


def test_path_object_and_text_mean_the_same(tmp_path):
    path = tmp_path / "optimizer.json"
    path.write_text(json.dumps(SHIPPED), encoding="utf-8")
    assert load_optimizer_config(path) == load_optimizer_config(str(path)) == load_optimizer_config(SHIPPED)


def test_without_a_file_both_parts_have_the_runs_settings():
    config = load_optimizer_config(None)
    given = {"lr": 3e-6, "lr_scheduler": "linear"}
    for part in ("unet", "text encoder"):
        settings = part_settings(config, part, given=given)
        assert (settings.lr, settings.lr_scheduler, settings.weight_decay) == (3e-6, "linear", None)


def test_a_given_lr_beats_the_base_and_not_the_text_encoders_own():
    config = load_optimizer_config(SHIPPED)
    assert part_settings(config, "unet", given={"lr": 2e-6}).lr == 2e-6
    assert part_settings(config, "text encoder", given={"lr": 2e-6}).lr == 5e-7


def test_a_given_zero_stays_zero():
    config = load_optimizer_config(
        {
            "base": {"lr": 1e-6, "weight_decay": 0.1, "lr_warmup_steps": 50, "epsilon": 1e-8},
            "text_encoder_overrides": {"lr": 0, "weight_decay": 0, "lr_warmup_steps": 0, "betas": [0, 0], "epsilon": 0},
        }
    )
    text = part_settings(config, "text encoder", given={"lr": 1e-5})
    assert (text.lr, text.weight_decay, text.lr_warmup_steps, text.betas, text.eps) == (0, 0, 0, (0, 0), 0)


def test_the_unet_may_have_overrides_too():
    config = load_optimizer_config({"base": {"lr": 1e-6}, "unet_overrides": {"lr": 4e-6}})
    assert part_settings(config, "unet").lr == 4e-6
    assert part_settings(config, "text encoder").lr == 1e-6


def test_everydream_2s_d_adaptation_file_keeps_its_extra_settings():
    config = load_optimizer_config(
        {
            "base": {"optimizer": "dadapt_adam", "lr": 0.1, "d0": 1e-6, "decouple": True, "weight_decay": 0.8},
            "text_encoder_freezing": {"unfreeze_last_n_layers": None},
        }
    )
    settings = part_settings(config, "unet")
    assert settings.kwargs == {"d0": 1e-6, "decouple": True}


def test_keyword_arguments_go_with_their_optimizer():
    config = load_optimizer_config(
        {
            "base": {"optimizer": "sgd", "kwargs": {"nesterov": True}},
            "text_encoder_overrides": {"optimizer": "adamw"},
        }
    )
    assert part_settings(config, "unet").kwargs == {"nesterov": True}
    assert part_settings(config, "text encoder").kwargs == {}


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
    config = load_optimizer_config({"text_encoder_freezing": freezing})
    assert config.text_encoder_freezing.num_trained_layers(12) == expected


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
            "unfreeze_last_n_layers, freeze_front_n_layers: they say the same thing",
        ),
    ],
)
def test_what_is_wrong_is_named_with_its_place(values, message):
    with pytest.raises(ConfigError, match=message):
        load_optimizer_config(values)


def test_all_problems_come_together():
    with pytest.raises(ConfigError) as caught:
        load_optimizer_config({"base": {"lr": -1, "betas": []}, "other": 1})
    assert len(str(caught.value).splitlines()) == 3


def test_a_missing_or_broken_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"optimizer_config: .*nowhere\.json: there is no such settings file"):
        load_optimizer_config(tmp_path / "nowhere.json")
    broken = tmp_path / "broken.json"
    broken.write_text('{"base": {\n"lr": 1e-6,}}', encoding="utf-8")
    with pytest.raises(ConfigError, match=r"broken\.json, line 2, column \d+: not valid JSON"):
        load_optimizer_config(broken)
    broken.write_text("[1]", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"holds a list"):
        load_optimizer_config(broken)
    broken.write_bytes(b'{"a": "\xff"}')
    with pytest.raises(ConfigError, match="not UTF-8 text"):
        load_optimizer_config(broken)


def test_a_value_that_json_cannot_hold_is_refused():
    with pytest.raises(ConfigError, match="holds something that JSON cannot hold"):
        load_optimizer_config({"base": {"kwargs": {"callback": print}}})


def test_a_setting_without_effect_is_warned_about():
    config = load_optimizer_config({"text_encoder_lr_scale": 0.5})
    assert config.warnings == [
        "text_encoder_lr_scale: has no effect; give text_encoder_overrides.lr in optimizer_config."
    ]
