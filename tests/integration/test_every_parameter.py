"""Every parameter has a test that sees its effect from the outside: here is which one, and a check that it is there.

A new parameter fails here until its test is named. The table is kept honest by reading the tests' syntax trees: each named
function must exist, be a test, and say the parameter's name (as a setting, a flag or a keyword); where a test reaches the
parameter under another name (a function's own argument), that name stands behind a colon.
"""

from __future__ import annotations

import pytest
from named_tests import check_named_test

from everydream_kit.config import TrainConfig

DATA = "integration/test_parameters_data.py"
TRAINING = "integration/test_parameters_training.py"
SAVING = "integration/test_parameters_saving.py"
LAWS = "integration/test_training_laws.py"
COMMAND = "integration/test_train_command.py"

LORA = f"{TRAINING}::test_lora_trains_matrices_of_its_rank_in_the_layers_that_are_meant"
ALPHA = f"{TRAINING}::test_alpha_is_the_adapters_strength_and_dropout_makes_its_steps_differ"
TOKENS = f"{TRAINING}::test_new_tokens_are_all_that_textual_inversion_trains"
RATES = f"{TRAINING}::test_the_rate_of_each_step"
LOSS = f"{TRAINING}::test_what_the_loss_asks_for_changes_the_loss"
FLOW = "integration/test_flow_runs.py::test_settings_of_flow_matching_are_refused_for_diffusion_and_change_a_flow_run"
TIMESTEPS = f"{TRAINING}::test_only_timesteps_from_start_to_before_end_are_drawn"
AMP = f"{TRAINING}::test_mixed_precision_can_be_forced_and_switched_off"
MEMORY = f"{TRAINING}::test_measures_that_save_memory_leave_the_losses_as_they_are"
HUB_MODEL = f"{DATA}::test_a_hub_model_is_asked_for_with_its_revision_folder_and_variant"
FOLDER_MODEL = f"{DATA}::test_subfolder_and_variant_choose_the_files_of_a_folder"
SAID_MODEL = f"{DATA}::test_family_and_prediction_type_win_over_what_the_files_say"
CACHE = f"{DATA}::test_the_cache_keeps_so_many_crops_where_it_is_reported_to"
RATED = f"{DATA}::test_ratings_leave_out_the_asked_share_by_the_last_epoch"
TAGS = f"{DATA}::test_tags_are_shuffled_behind_those_that_are_kept"
AVERAGED = f"{SAVING}::test_averaged_weights_are_saved_drawn_with_and_taken_up_again"
AVERAGE = f"{SAVING}::test_the_average_follows_its_decay_its_target_and_its_interval"
SAMPLES = f"{SAVING}::test_samples_come_before_training_every_so_many_steps_and_from_the_prompt_file"
STANDSTILL = f"{SAVING}::test_a_run_whose_validation_loss_stands_still_stops_early"
EPOCHS = f"{SAVING}::test_epochs_are_saved_from_the_first_that_counts_as_single_files_too"
OF_PARTS = "integration/test_parameters_parts.py"
OPTIMIZER = f"{OF_PARTS}::test_each_setting_of_an_optimizer_reaches_both_parts_or_its_own"
FROZEN = f"{OF_PARTS}::test_each_setting_of_what_is_frozen_changes_what_is_trained"
SPLIT = f"{OF_PARTS}::test_each_setting_of_a_split_decides_what_is_trained_and_measured"
SAMPLING = f"{OF_PARTS}::test_each_sampling_setting_holds_where_the_prompt_file_says_nothing"
MEASURE = f"{OF_PARTS}::test_validation_seed_batch_size_and_interval_are_those_of_the_measurements"
STEPS = f"{SAVING}::test_steps_are_saved_and_as_many_stay_as_were_asked_for"
PUSH = f"{SAVING}::test_checkpoints_are_pushed_while_training_as_often_as_asked"
WANDB = f"{SAVING}::test_wandb_gets_the_points_under_the_runs_name"

OF_AN_OPTIMIZER = ("betas", "eps", "weight_decay", "d0", "decouple", "momentum", "optimizer_args")
OF_A_SCHEDULE = ("optimizer", "lr", "lr_scheduler", "lr_warmup_steps", "lr_decay_steps")
PREFIXES = ("unet_", "text_encoder_")

TEST_OF = {
    "resume_ckpt": f"{DATA}::test_findlast_is_the_latest_checkpoint_of_the_project",
    "base_revision": HUB_MODEL,
    "base_subfolder": FOLDER_MODEL,
    "base_variant": FOLDER_MODEL,
    "family": SAID_MODEL,
    "prediction_type": SAID_MODEL,
    "vae": "integration/test_given_vae.py::test_a_run_trains_with_it_and_resumes_without_being_reported",
    "clip_skip": LOSS,
    "data_root": f"{DATA}::test_the_dataset_may_be_several_folders",
    "resolution": f"{DATA}::test_every_resolution_has_its_batches",
    "batch_size": f"{DATA}::test_batch_size_is_the_images_that_go_together_and_auto_is_refused_in_words",
    "flip_p": f"{DATA}::test_images_are_mirrored_with_their_probability",
    "crop_jitter": f"{DATA}::test_crop_jitter_trims_more_than_the_bucket_asks_for",
    "background": f"{DATA}::test_transparent_images_stand_on_the_background",
    "loss_mask": f"{DATA}::test_the_loss_is_weighed_by_the_mask_that_is_named",
    "num_workers": f"{LAWS}::test_the_number_of_loader_processes_changes_nothing",
    "cache_latents": f"{LAWS}::test_cached_latents_give_the_losses_of_encoding_each_time",
    "cache_variants": CACHE,
    "latent_cache_dir": CACHE,
    "rated_dataset": RATED,
    "rated_dataset_target_dropout_percent": RATED,
    "write_schedule": f"{COMMAND}::test_the_schedule_names_the_images_that_were_trained:schedule",
    "cond_dropout": f"{DATA}::test_dropped_captions_are_empty",
    "shuffle_tags": TAGS,
    "keep_tags": TAGS,
    "caption_variants": f"{DATA}::test_caption_variants_are_the_orders_that_each_caption_has",
    "caption_lines": f"{DATA}::test_lines_of_a_caption_file_are_one_caption_or_one_each",
    "max_epochs": f"{TRAINING}::test_a_run_ends_with_its_epochs_or_its_steps_whichever_come_first",
    "max_steps": f"{TRAINING}::test_a_run_ends_with_its_epochs_or_its_steps_whichever_come_first",
    "grad_accum": f"{TRAINING}::test_images_of_one_step_are_batch_size_times_grad_accum",
    "lr": RATES,
    "lr_scheduler": RATES,
    "lr_warmup_steps": RATES,
    "lr_decay_steps": RATES,
    "scale_lr": RATES,
    "seed": f"{TRAINING}::test_the_seed_decides_all_draws_and_minus_one_is_a_new_one_that_is_reported",
    "optimizer": f"{TRAINING}::test_the_optimizer_is_the_one_that_is_named",
    "optimizer_config": f"{TRAINING}::test_the_optimizer_config_sets_the_text_encoders_rate_and_freezes_layers",
    **{f"{prefix}{name}": f"{OPTIMIZER}:name" for prefix in ("", *PREFIXES) for name in OF_AN_OPTIMIZER},
    **{f"{prefix}{name}": f"{OPTIMIZER}:name" for prefix in PREFIXES for name in OF_A_SCHEDULE},
    "text_encoder_lr_scale": f"{OF_PARTS}::test_text_encoder_lr_scale_is_a_factor_on_lr_unless_a_rate_is_given",
    "unet_train_layers": FROZEN,
    "unet_freeze_layers": FROZEN,
    "text_encoder_freeze_embeddings": FROZEN,
    "text_encoder_unfreeze_last_n_layers": FROZEN,
    "text_encoder_freeze_front_n_layers": FROZEN,
    "text_encoder_freeze_final_layer_norm": FROZEN,
    "clip_grad_norm": f"{TRAINING}::test_clipping_bounds_the_gradient_that_is_applied",
    "disable_unet_training": f"{LAWS}::test_frozen_parts_keep_their_bytes",
    "disable_textenc_training": f"{LAWS}::test_frozen_parts_keep_their_bytes",
    "training_kind": LORA,
    "lora_rank": LORA,
    "lora_alpha": ALPHA,
    "lora_dropout": ALPHA,
    "lora_targets": LORA,
    "lora_text_encoder": LORA,
    "lora_dora": LORA,
    "lora_form": "integration/test_lora_forms.py::test_a_resumed_run_of_another_form_equals_one_that_never_stopped",
    "new_tokens": TOKENS,
    "loss_type": LOSS,
    "min_snr_gamma": LOSS,
    "debiased_estimation": LOSS,
    "enable_zero_terminal_snr": (
        f"{TRAINING}::test_zero_terminal_snr_leaves_no_signal_in_the_last_timestep_and_needs_v_prediction"
    ),
    "zero_frequency_noise_ratio": LOSS,
    "pyramid_noise_discount": LOSS,
    "input_perturbation": LOSS,
    "embedding_perturbation": LOSS,
    "timestep_start": TIMESTEPS,
    "timestep_end": TIMESTEPS,
    "timestep_sampling": LOSS,
    "timestep_shift": FLOW,
    "weighting_scheme": FLOW,
    "train_sampler": f"{TRAINING}::test_another_train_sampler_changes_nothing_and_says_so",
    "amp": AMP,
    "disable_amp": AMP,
    "amp_dtype": f"{TRAINING}::test_bfloat16_arithmetic_gives_nearly_the_same_losses",
    "apply_grad_scaler_step_tweaks": "integration/test_text_and_rates.py::test_the_grad_scalers_step_tweaks_can_be_switched_off",
    "weight_dtype": f"{TRAINING}::test_weights_are_kept_in_the_named_format",
    "frozen_dtype": (
        "integration/test_frozen_formats.py::test_a_base_in_half_precision_gives_the_same_losses_as_in_float32"
    ),
    "quantization": "integration/test_quantized_bases.py::test_linear_layers_of_the_blocks_are_quantized_one_by_one",
    "text_quantization": "integration/test_quantized_bases.py::test_a_language_model_is_quantized_for_its_captions",
    "gradient_checkpointing": MEMORY,
    "checkpointing_share": f"{TRAINING}::test_a_share_of_the_blocks_is_recomputed_and_the_losses_stay",
    "flat_weights": f"{TRAINING}::test_flat_weights_are_stepped_together_and_give_the_same_losses",
    "cuda_graphs": "integration/test_replayed_passes.py::test_replayed_passes_train_as_eager_ones",
    "fused_backward": f"{TRAINING}::test_a_fused_backward_keeps_no_gradient_and_gives_the_same_losses",
    "blocks_to_swap": "integration/test_block_swap_runs.py::test_losses_and_weights_are_those_without",
    "offload_idle_models": f"{SAVING}::test_idle_models_are_at_work_for_new_images_and_captions_and_for_sampling_only",
    "speed": "integration/test_speed_auto.py::test_a_run_is_the_one_with_its_choice_set_by_hand",
    "channels_last": MEMORY,
    "torch_compile": f"{TRAINING}::test_the_unets_transformer_blocks_are_compiled",
    "attn_type": MEMORY,
    "gpuid": f"{TRAINING}::test_the_gpu_with_the_number_is_used",
    "parallel": (
        "integration/test_ranks.py::test_slices_of_the_model_are_trained_saved_and_resumed_by_two_processes_and_by_one:fsdp2"
    ),
    "ema_decay_rate": AVERAGED,
    "ema_strength_target": AVERAGE,
    "ema_update_interval": AVERAGE,
    "ema_device": AVERAGE,
    "ema_sample_ema_model": AVERAGED,
    "ema_sample_nonema_model": AVERAGED,
    "ema_resume_model": AVERAGED,
    "sample_steps": SAMPLES,
    "sample_prompts": SAMPLES,
    "sample_before_training": SAMPLES,
    "sample_cfgs": SAMPLING,
    "sample_scheduler": SAMPLING,
    "sample_num_inference_steps": SAMPLING,
    "sample_seed": SAMPLING,
    "sample_resolution": SAMPLING,
    "sample_batch_size": SAMPLING,
    "validation_config": STANDSTILL,
    "validation_split_mode": SPLIT,
    "validation_split_proportion": SPLIT,
    "validation_data_root": SPLIT,
    "validation_extra_data_roots": SPLIT,
    "validation_every_n_epochs": MEASURE,
    "validation_seed": MEASURE,
    "validation_batch_size": MEASURE,
    "stabilize_training_loss": SPLIT,
    "stabilize_split_proportion": SPLIT,
    "early_stopping_patience": STANDSTILL,
    "project_name": f"{COMMAND}::test_the_last_checkpoint_and_the_single_file_hold_trained_weights:last-t-ep03",
    "run_name": WANDB,
    "logdir": EPOCHS,
    "save_ckpt_dir": EPOCHS,
    "ckpt_every_n_minutes": f"{SAVING}::test_checkpoints_come_by_the_clock",
    "save_every_n_epochs": EPOCHS,
    "save_every_n_steps": STEPS,
    "save_ckpts_from_n_epochs": EPOCHS,
    "keep_last_n": STEPS,
    "save_full_precision": EPOCHS,
    "save_optimizer": STEPS,
    "no_save_ckpt": STEPS,
    "no_prepend_last": EPOCHS,
    "push_to": PUSH,
    "push_every": PUSH,
    "log_step": f"{SAVING}::test_points_come_every_log_step_and_at_each_epochs_end",
    "wandb": WANDB,
    "plugins": f"{SAVING}::test_plugins_are_called_at_every_turn_and_change_captions",
    "load_settings_every_epoch": (
        f"{SAVING}::test_live_settings_are_read_at_each_epochs_start_and_a_broken_file_changes_nothing"
    ),
}


def test_the_table_names_every_parameter_and_no_other() -> None:
    assert sorted(TEST_OF) == sorted(TrainConfig.model_fields)


@pytest.mark.parametrize("name", TEST_OF)
def test_the_named_test_is_there_and_speaks_of_its_parameter(name: str) -> None:
    check_named_test(TEST_OF[name], name)
