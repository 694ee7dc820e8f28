"""EveryDream 2's validation config, and when to validate."""

import json

import pytest

from everydream_kit.config import TrainConfig
from everydream_kit.config.sample_settings import ValidationGroup
from everydream_kit.errors import ConfigError
from everydream_kit.everydream2.validation_file import SETTING_OF_KEY, ValidationFile, import_validation_file
from everydream_kit.settings import with_side_files
from everydream_kit.training.validation import validation_steps


def test_an_empty_file_means_an_automatic_split_with_everydream_2s_defaults():
    assert import_validation_file({}) == ({"validation_split_mode": "automatic"}, [])
    settings = ValidationGroup()
    assert (settings.validation_split_proportion, settings.stabilize_split_proportion) == (0.15, 0.15)
    assert not settings.stabilize_training_loss
    assert (settings.validation_every_n_epochs, settings.validation_seed) == (1, 555)
    assert settings.validation_batch_size is None


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
    values, notes = import_validation_file(path)
    assert values == {
        "validation_split_mode": "manual",
        "validation_data_root": "held out",
        "validation_split_proportion": 0.2,
        "stabilize_training_loss": False,
        "stabilize_split_proportion": 0.15,
        "validation_every_n_epochs": 1,
        "validation_seed": 555,
        "validation_extra_data_roots": {"santa": "images/santa"},
    }
    assert notes == []
    config, _ = with_side_files(TrainConfig(resume_ckpt="x", validation_config=str(path), validation_seed=7))
    assert (config.validation_seed, config.validation_data_root) == (7, "held out")


def test_every_key_of_the_file_is_translated_or_named():
    assert set(ValidationFile.model_fields) == {*SETTING_OF_KEY, "validate_training", "use_relative_loss"}
    assert set(SETTING_OF_KEY.values()) <= set(ValidationGroup.model_fields)


@pytest.mark.parametrize("mode", ["automatic", "manual", "none"])
def test_validate_training_false_takes_no_image_out_of_training(mode):
    assert import_validation_file({"validate_training": False, "val_split_mode": mode})[0] == {
        "validation_split_mode": "none"
    }


def test_null_means_the_default():
    assert import_validation_file({"val_data_root": None, "every_n_epochs": None}) == import_validation_file({})


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
        import_validation_file(values)


def test_use_relative_loss_is_warned_about():
    assert import_validation_file({"use_relative_loss": True})[1] == [
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
