"""Every key of every settings file has a test that sees its effect: here is which one. A new key fails until it has one."""

from __future__ import annotations

import typing

import pytest
from named_tests import check_named_test
from pydantic import BaseModel

from everydream_kit.data.folders import ONE_VALUE_FILES
from everydream_kit.data.image_settings import _READERS
from everydream_kit.everydream2.optimizer_file import OptimizerFile
from everydream_kit.everydream2.validation_file import FORK_NAMES, OLD_NAMES, ValidationFile
from everydream_kit.training.live import LiveSettings
from everydream_kit.training.prompt_file import SampleSettings

FILES = "integration/test_settings_files.py"
SECTION = f"{FILES}::test_every_setting_of_a_section_reaches_its_parts_and_no_other"
FREEZING = f"{FILES}::test_every_setting_of_what_is_frozen_changes_what_is_trained"
NO_EFFECT = f"{FILES}::test_keys_without_an_effect_are_warned_about_in_the_run"
SCALE = f"{FILES}::test_the_scale_of_an_optimizer_file_is_of_the_text_encoders_rate"
SPLIT = f"{FILES}::test_the_validation_config_decides_what_is_trained_and_what_is_measured"
MEASURED = f"{FILES}::test_the_seed_and_the_batch_size_of_the_validation_config_are_those_of_the_measurement"
SAMPLED = f"{FILES}::test_the_prompt_file_decides_what_is_sampled"
PIXELS = f"{FILES}::test_scheduler_and_negative_prompt_change_the_pixels"
ASPECT = f"{FILES}::test_aspect_ratio_is_of_the_sample_and_random_caption_of_the_dataset"
WHEN = f"{FILES}::test_the_prompt_file_says_when_to_sample"
LIVE = f"{FILES}::test_live_settings_change_when_a_run_samples_and_saves"
LIVE_RATE = (
    "integration/test_parameters_saving.py::"
    "test_live_settings_are_read_at_each_epochs_start_and_a_broken_file_changes_nothing"
)
SCALER = "integration/test_text_and_rates.py::test_the_grad_scalers_step_tweaks_can_be_switched_off"
EVERYDREAM_2 = "unit/training/test_prompt_file.py::test_everydream_2s_own_file_is_read_whole:EVERYDREAM_2"
FORK = "unit/test_everydream2.py::test_its_validation_files_load"
DATA = "unit/data/test_settings_keys.py::test_each_key_has_its_effect_wherever_it_stands"
CAPTION = "unit/data/test_settings_keys.py::test_a_caption_of_a_settings_file_is_trained"
INDEX = "unit/data/test_settings_keys.py::test_an_index_has_the_images_that_it_names_and_no_other"
ONE_VALUE = "unit/data/test_scanning.py::test_one_value_files_hold_for_their_folder_only:file"

SECTIONS = ("base", "unet_overrides", "text_encoder_overrides")
OF_A_SECTION = (
    *("optimizer", "lr", "lr_scheduler", "lr_warmup_steps", "lr_decay_steps", "betas", "epsilon", "weight_decay"),
    *("d0", "decouple", "momentum", "kwargs"),
)
OF_FREEZING = (
    *("freeze_embeddings", "unfreeze_last_n_layers", "unfreeze_final_n_layers", "freeze_front_n_layers"),
    "freeze_final_layer_norm",
)
OF_A_SPLIT = (
    *("validate_training", "val_split_mode", "auto_split_proportion", "manual_data_root", "extra_manual_datasets"),
    *("stabilize_training_loss", "stabilize_split_proportion", "val_data_root", "val_split_proportion"),
)
OF_DATA = (
    *("rating", "max_caption_length", "multiply", "cond_dropout", "flip_p", "shuffle_tags", "keep_tags", "batch_id"),
    *("loss_scale", "tags"),
)

TEST_OF = {
    **{f"optimizer.{section}.{key}": SECTION for section in SECTIONS for key in OF_A_SECTION},
    **{f"optimizer.text_encoder_freezing.{key}": FREEZING for key in OF_FREEZING},
    **{f"optimizer.unet_freezing.{key}": FREEZING for key in ("train", "freeze")},
    "optimizer.apply_grad_scaler_step_tweaks": SCALER,
    "optimizer.log_grad_norm": NO_EFFECT,
    "optimizer.text_encoder_lr_scale": SCALE,
    **{f"validation.{key}": SPLIT for key in OF_A_SPLIT},
    "validation.every_n_epochs": f"{FILES}::test_every_n_epochs_is_how_often_a_run_measures",
    "validation.seed": MEASURED,
    "validation.batch_size": MEASURED,
    "validation.use_relative_loss": NO_EFFECT,
    **{f"validation.{key}": FORK for key in FORK_NAMES},
    **{f"prompts.{key}": SAMPLED for key in ("cfgs", "num_inference_steps", "seed", "resolution", "batch_size")},
    "prompts.scheduler": PIXELS,
    "prompts.show_progress_bars": EVERYDREAM_2,
    "prompts.generate_samples_every_n_steps": WHEN,
    "prompts.generate_pretrain_samples": WHEN,
    **{f"prompts.samples.{key}": SAMPLED for key in ("prompt", "seed", "size", "cfgs")},
    "prompts.samples.negative_prompt": PIXELS,
    "prompts.samples.aspect_ratio": ASPECT,
    "prompts.samples.random_caption": ASPECT,
    **{
        f"live.{key}": LIVE for key in ("sample_steps", "sample_prompts", "ckpt_every_n_minutes", "save_every_n_epochs")
    },
    **{f"live.{key}": LIVE_RATE for key in ("lr_factor", "save_every_n_steps")},
    **{f"data.{key}": DATA for key in OF_DATA},
    **{f"data.{key}": CAPTION for key in ("main_prompt", "caption")},
    "data.image": INDEX,
    **{f"data file.{file}": ONE_VALUE for file in ONE_VALUE_FILES},
}


def keys_of(schema: type[BaseModel], prefix: str) -> list[str]:
    """All keys of a file, those of its sections behind the section's name."""
    keys = []
    for name, field in schema.model_fields.items():
        kinds = [field.annotation, *typing.get_args(field.annotation)]
        sections = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
        keys += keys_of(sections[0], f"{prefix}.{name}") if sections else [f"{prefix}.{name}"]
    return keys


def test_the_table_names_every_key_of_every_settings_file_and_no_other() -> None:
    keys = keys_of(OptimizerFile, "optimizer") + keys_of(ValidationFile, "validation")
    keys += keys_of(SampleSettings, "prompts") + keys_of(LiveSettings, "live")
    keys += [f"validation.{key}" for key in (*OLD_NAMES, *FORK_NAMES)]
    keys += [f"data.{key}" for key in (*_READERS, "tags", "caption")]
    keys += [f"data file.{file}" for file in ONE_VALUE_FILES]
    assert sorted(TEST_OF) == sorted(keys)


@pytest.mark.parametrize("key", TEST_OF)
def test_the_named_test_is_there_and_speaks_of_its_key(key: str) -> None:
    check_named_test(TEST_OF[key], key.removeprefix("data file.") if "file" in key else key.rpartition(".")[2])
