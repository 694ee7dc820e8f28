"""What the settings of EveryDream 2's files and flags mean here: retired names, "off" as 0, clamped values, its order.

Here: its own settings and those of damian0815's fork, one by one. Not here: `optimizer.json` and the validation config,
and null, which means "the default" in its files (`settings`).

A setting that changed nothing there and one that is off pass with a warning. One that would train differently there and
does not exist here is an error: the run would not be the one that the file describes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

from everydream_kit.config import RETIRED, TrainConfig
from everydream_kit.errors import ConfigError
from everydream_kit.everydream2.side_files import is_comment

OFF_AT_ZERO = (
    "ckpt_every_n_minutes",
    "save_every_n_epochs",
    "save_every_n_steps",
    "lr_decay_steps",
    "pyramid_noise_discount",
    "min_snr_gamma",
    "ema_decay_rate",
    "ema_strength_target",
    "sample_steps",
    "max_steps",
)
"""0 and below mean "off" or "by default", as null does."""

CLAMPED = {"clip_skip": (0, 4), "rated_dataset_target_dropout_percent": (0, 100)}
"""Values outside are taken as the nearest bound, with a warning."""

RENAMED = {
    "resume_ckpt_variant": "base_variant",
    "num_dataloader_workers": "num_workers",
    "validate_every_n_epochs": "validation_every_n_epochs",
    "val_split_mode": "validation_split_mode",
    "auto_split_proportion": "validation_split_proportion",
    "manual_data_root": "validation_data_root",
    "extra_manual_datasets": "validation_extra_data_roots",
}
"""Names of EveryDream 2's files and of the fork for settings of ours."""

FORK_WITHOUT_EFFECT = frozenset(
    {
        *("amp_without_grad_scaler", "force_bfloat16", "init_grad_scale", "disable_backward_memsafe"),
        *("disable_backward_memsafe_resolutions", "forward_slice_size", "max_backward_slice_size"),
        *("log_step_optimizer", "log_named_parameters_magnitudes", "log_attention_activations", "log_cuda_memory"),
        *("debug_unet_freeze_regex", "debug_no_load_model", "debug_teacher", "debug_log_on_nan"),
        *("debug_save_memory_snapshots", "no_save_on_error", "no_initial_validation", "test_images", "offload_vae"),
        *("offload_text_encoder", "cache_text_embeddings", "clean_stale_embeddings", "lora_save_every_n_epochs"),
        *("anchor_reg_cpu_offload", "patience", "save_every"),
    }
)
"""The fork's settings about memory, logs and debugging: the training is the same without them."""

FORK: dict[str, tuple[Any, ...]] = {
    "batch_size_curriculum_alpha": (0.5,),
    "interleave_batch_size_1": (),
    "interleave_batch_size_1_alpha": (),
    "optimizer_batch_size": (),
    "initial_batch_size": (),
    "final_batch_size": (),
    "cond_dropout_curriculum_alpha": (),
    "cond_dropout_curriculum_source": ("global_step",),
    "final_cond_dropout": (),
    "loss_scale": (1,),
    "cond_dropout_global": (),
    "data_multiplier_per_path": (),
    "skip_undersized_images": (),
    "use_only_largest_resolution_per_image": (),
    "freeze_unet_balanced": (),
    "latents_perturbation": (),
    "rotation_degrees": (),
    "loss_mean_over_full_effective_batch": (True,),
    "negative_loss_margin": (0.05,),
    "lr_d0": (1e-6,),
    "lr_advance_steps": (),
    "lr_num_restarts": (1,),
    "lr_block_fadein_k": (),
    "lr_block_fadeout_k": (),
    "auto_decay_steps_multiplier": (1.1,),
    "unet_freeze_regex": (),
    "optimizer_param_grouping": (["single"], "single"),
    "optimizer_progressive_unlock": (),
    "optimizer_progressive_unlock_by_qk_proximity": (),
    "resolution_multiplier": (),
    "keep_same_sample_at_different_resolutions_together": (),
    "no_normalize_images": (),
    "timesteps_multirank_stratified": (),
    "timesteps_multirank_stratified_distribution": ("beta",),
    "timesteps_multirank_stratified_stratify": (True,),
    "timesteps_multirank_stratified_alpha": (1.5,),
    "timesteps_multirank_stratified_beta": (2,),
    "timesteps_multirank_stratified_mode_scale": (0.5,),
    "timestep_interval_sampling": (),
    "timestep_interval_n": (10,),
    "timestep_curriculum_alpha": (),
    "timestep_initial_start": (800,),
    "timestep_initial_end": (1000,),
    "flow_matching": (),
    "flow_match_shift": (1,),
    "flow_match_shift_dynamic": (),
    "flow_match_shift_dropout_p": (0.3,),
    "flow_match_t_clamp_min": (),
    "flow_match_t_clamp_max": (),
    "mix_zero_terminal_snr": (),
    "match_zero_terminal_snr": (),
    "loss_mode_scale": (),
    "min_snr_alpha": (1,),
    "batch_share_noise": (),
    "batch_share_timesteps": (),
    "teacher": (),
    "teacher_p": (1,),
    "teacher_lambda": (1,),
    "teacher_lambda_falloff": (),
    "teacher_timestep_max": (),
    "teacher_prediction_type": ("auto",),
    "teacher_flow_match_shift": (1,),
    "local_contrastive_flow_loss_p": (),
    "local_contrastive_flow_timestep_threshold": (200,),
    "local_contrastive_flow_anchor_timestep": (500,),
    "local_contrastive_flow_temperature": (0.07,),
    "local_contrastive_flow_lambda": (0.1,),
    "contrastive_flow_matching_loss_p": (),
    "contrastive_flow_matching_loss_lambda": (0.05,),
    "saturation_penalty_scale": (),
    "saturation_penalty_t_max": (200,),
    "self_flow_p": (),
    "self_flow_gamma": (0.8,),
    "self_flow_mask_ratio": (0.25,),
    "self_flow_mode": ("shallow",),
    "self_flow_lr": (1e-5,),
    "self_flow_lr_warmup_steps": (1000,),
    "self_flow_freeze_steps": (),
    "contrastive_learning_dropout_p": (),
    "contrastive_loss_batch_ids": (),
    "contrastive_loss_scale": (1,),
    "contrastive_loss_type": (),
    "contrastive_loss_softrepa_sigma": (1,),
    "contrastive_loss_temperature": (0.07,),
    "contrastive_loss_hard_negative_weight": (2,),
    "everything_contrastive_learning_p": (),
    "everything_contrastive_learning_curriculum_alpha": (),
    "caption_variants": (),
    "all_caption_variants": (),
    "expand_caption_variants": (),
    "caption_cross_concatenation_p": (),
    "caption_cross_concatenation_empty_half_p": (0.2,),
    "use_compel": (),
    "batch_id_dropout_p": (),
    "cond_dropout_noise_p": (),
    "mask_p": (),
    "invert_masks": (),
    "use_both_mask_sides_contrastive": (),
    "lora_resume": (),
    "clip_vision_model_source": (),
    "clip_vision_model_processor_source": (),
    "clip_vision_contrastive_loss_lambda": (0.1,),
    "anchor_reg_alpha": (),
    "dpo_p": (),
    "dpo_beta": (0.1,),
    "load_dpo_bad": (),
    "model_id": (),
    "resume_from": (),
    "max_sequence_length": (300,),
    "te_quantization": ("none",),
    "is_video": (),
    "video_frames": (81,),
    "video_fps": (16,),
    "default_motion_score": (30,),
}
"""The fork's settings that change the training, with the values that leave it as it is; nothing and zero always do."""


def is_theirs(values: Mapping[str, Any]) -> bool:
    """Whether a settings file is one of EveryDream 2 or the fork: it holds a name that no file of ours does."""
    return any(name in RETIRED or name in FORK or name in FORK_WITHOUT_EFFECT for name in values)


def translate(values: Mapping[str, Any], *, from_file: bool) -> tuple[dict[str, Any], list[str]]:
    """Each setting by itself in today's words.

    Args:
        values: by name.
        from_file: whole numbers written as 1e6 and the words "true" and "false" are taken as meant; comments are passed
            over.

    Returns:
        The settings, and warnings (one sentence each).

    Raises:
        ConfigError: settings of the fork that train differently and that the kit does not have.
    """
    kept: dict[str, Any] = {}
    warnings: list[str] = []
    missing = []
    for name, value in values.items():
        if from_file and is_comment(name):
            continue
        if name in RETIRED:
            warnings.append(f"{name}: no longer used; replaced by {RETIRED[name]}.")
        elif name == "lora":
            kept |= {"training_kind": "lora"} if _is_on(value) else {}
            warnings.append("lora: no longer used; replaced by training_kind lora.")
        elif name in FORK_WITHOUT_EFFECT or (name in FORK and not _is_on(value, FORK[name])):
            warnings.append(f"{name}: a setting of damian0815's fork, not needed here.")
        elif name in FORK:
            missing.append(
                f"{name}: a setting of damian0815's fork that changes the training (got {value!r}); the kit does not "
                "have it. Remove it to train without it."
            )
        else:
            today = RENAMED.get(name, name)
            kept[today] = _value(today, _read(today, value) if from_file else value, warnings)
    if missing:
        raise ConfigError("\n".join(missing))
    return kept, warnings


def resolve(values: Mapping[str, Any], flags: Mapping[str, Any], *, theirs: bool) -> tuple[dict[str, Any], list[str]]:
    """Settings that contradict each other, in EveryDream 2's order where the file is one of its own.

    Args:
        values: of the file, translated.
        flags: given on top; they always win.
        theirs: the file is one of EveryDream 2.
    """
    kept = {**values, **flags}
    warnings = []
    if kept.get("ema_decay_rate") is not None and kept.get("ema_strength_target") is not None:
        del kept["ema_decay_rate"]
        warnings.append("ema_decay_rate: not used, since ema_strength_target is given; the target wins.")
    if theirs and values.get("amp") is False and "amp" not in flags:
        del kept["amp"]
        warnings.append("amp false: has no effect in EveryDream 2's files; give disable_amp to switch it off.")
    return kept, warnings


def _is_on(value: Any, off: tuple[Any, ...] = ()) -> bool:
    """Whether a value asks for something. A flag's value is text."""
    if isinstance(value, str) and value.lower() in ("off", "false", "none", "null", "0", "0.0", ""):
        return False
    return bool(value) and value not in off and value not in [str(one) for one in off]


def _value(name: str, value: Any, warnings: list[str]) -> Any:
    """The value in today's words."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if name in OFF_AT_ZERO and is_number and value <= 0:
        return None
    if name in CLAMPED and is_number and not CLAMPED[name][0] <= value <= CLAMPED[name][1]:
        low, high = CLAMPED[name]
        bound = low if value < low else high
        warnings.append(f"{name} {value}: taken as {bound}, since values go from {low} to {high}.")
        return bound
    return value


def _read(name: str, value: Any) -> Any:
    """A value of a file as its setting's type: 1e6 as a whole number, "true" as a yes."""
    kinds = _kinds(name)
    if isinstance(value, float) and value.is_integer() and int in kinds and float not in kinds:
        return int(value)
    if isinstance(value, str) and bool in kinds:
        return {"true": True, "false": False}.get(value.strip().lower(), value)
    return value


def _kinds(name: str) -> set[Any]:
    """The plain types that a setting takes."""
    field = TrainConfig.model_fields.get(name)
    found: set[Any] = set()
    waiting = [] if field is None else [field.annotation]
    while waiting:
        kind = waiting.pop()
        found |= {kind} & {bool, int, float}
        waiting += get_args(kind) if not isinstance(kind, bool | int | str) else ()
    return found
