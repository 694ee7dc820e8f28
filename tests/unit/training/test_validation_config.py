"""EveryDream 2's validation config, and when to validate."""

import json

import pytest

from everydream_kit.errors import ConfigError
from everydream_kit.training.validation_config import load_validation_config, validation_steps


def test_the_defaults_are_everydream_2s():
    config = load_validation_config(None)
    assert config.validate_training
    assert config.val_split_mode == "automatic"
    assert config.auto_split_proportion == 0.15
    assert config.stabilize_split_proportion == 0.15
    assert not config.stabilize_training_loss
    assert (config.every_n_epochs, config.seed, config.batch_size) == (1, 555, None)
    assert config.splits_training_set


def test_the_shipped_file_with_old_names_loads(tmp_path):
    path = tmp_path / "validation_default.json"
    shipped = {
        "documentation": {"seed": "any text"},
        "validate_training": True,
        "val_split_mode": "manual",
        "val_data_root": "held out",
        "val_split_proportion": 0.2,
        "stabilize_training_loss": False,
        "stabilize_split_proportion": 0.15,
        "every_n_epochs": 1,
        "seed": 555,
        "use_relative_loss": False,
        "extra_manual_datasets": {"santa": "images/santa"},
    }
    path.write_text(json.dumps(shipped), encoding="utf-8")
    config = load_validation_config(path)
    assert (config.manual_data_root, config.auto_split_proportion) == ("held out", 0.2)
    assert config.extra_manual_datasets == {"santa": "images/santa"}
    assert not config.splits_training_set
    assert config.warnings == []


def test_null_means_the_default():
    assert load_validation_config({"val_data_root": None, "every_n_epochs": None}) == load_validation_config(None)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"every_n_epoch": 1}, r"validation_config\.every_n_epoch: unknown setting; did you mean every_n_epochs\?"),
        ({"val_split_mode": "auto"}, r"validation_config\.val_split_mode: must be 'automatic', 'manual' or 'none'"),
        ({"auto_split_proportion": 1}, r"auto_split_proportion: must be less than 1 \(got 1"),
        ({"every_n_epochs": 0}, r"every_n_epochs: must be greater than 0"),
        ({"val_split_mode": "manual"}, "val_split_mode, manual_data_root: manual needs a folder"),
        (
            {"val_split_proportion": 0.1, "auto_split_proportion": 0.1},
            "val_split_proportion, auto_split_proportion: the old and the new name",
        ),
    ],
)
def test_what_is_wrong_is_named(values, message):
    with pytest.raises(ConfigError, match=message):
        load_validation_config(values)


def test_use_relative_loss_is_warned_about():
    assert load_validation_config({"use_relative_loss": True}).warnings == [
        "use_relative_loss: has no effect; compare with the first value of the curve."
    ]


@pytest.mark.parametrize(
    ("every_n_epochs", "epoch", "num_steps", "expected"),
    [
        (1, 0, 10, {9}),
        (1, 7, 10, {9}),
        (2, 0, 10, set()),
        (2, 1, 10, {9}),
        (0.5, 0, 10, {4, 9}),
        (0.25, 0, 10, {2, 4, 7, 9}),  # ceil(2.5), 5, ceil(7.5), 10, less 1
        (1 / 3, 3, 10, {3, 6, 9}),
        (0.1, 0, 3, {0, 1, 2}),  # more often than there are steps
        (1, 0, 1, {0}),
    ],
)
def test_when_to_validate(every_n_epochs, epoch, num_steps, expected):
    assert validation_steps(every_n_epochs, epoch, num_steps) == expected
