"""Names that people write and that are no parameters: retired ones, and those of other trainers."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

RETIRED: dict[str, str] = {
    "useadam8bit": "optimizer (adamw8bit is the default on a GPU)",
    "lowvram": "gradient_checkpointing and offload_idle_models",
    "ed1_mode": "nothing: captions and buckets are always read the same way",
    "notebook": "nothing: progress adapts to where it runs",
    "xformers": "nothing: torch's own attention is used",
    "disable_xformers": "nothing: torch's own attention is used",
    "cache_dir": "HF_HOME, the Hugging Face Hub's own setting",
    "config": "nothing: a file cannot name another",
    "mixed_precision": "amp and amp_dtype",
    "shuffle_captions": "shuffle_tags",
    "hf_repo_subfolder": "base_subfolder",
    "lr_end": "lr_decay_steps",
    "debug_invert_min_snr_gamma": "nothing: the weighting follows the prediction type",
    "validate_every_n_epochs": "every_n_epochs in validation_config",
}
"""EveryDream 2 names that have gone out of use, with what replaces them. They load with a warning."""


OTHER_TRAINERS: dict[str, str] = {
    "pretrained_model_name_or_path": "resume_ckpt",
    "instance_data_dir": "data_root",
    "train_data_dir": "data_root",
    "output_dir": "logdir",
    "learning_rate": "lr",
    "train_batch_size": "batch_size",
    "gradient_accumulation_steps": "grad_accum",
    "num_train_epochs": "max_epochs",
    "max_train_epochs": "max_epochs",
    "max_train_steps": "max_steps",
    "max_grad_norm": "clip_grad_norm",
    "mixed_precision": "amp_dtype",
    "base_model_precision": "quantization",
    "fp8_base": "quantization",
    "fp8_scaled": "quantization",
    "qtype": "quantization",
    "quantize": "quantization",
    "load_in_4bit": "quantization",
    "use_8bit_adam": "optimizer",
    "optimizer_type": "optimizer",
    "snr_gamma": "min_snr_gamma",
    "noise_offset": "zero_frequency_noise_ratio",
    "multires_noise_discount": "pyramid_noise_discount",
    "caption_dropout_rate": "cond_dropout",
    "shuffle_caption": "shuffle_tags",
    "network_dim": "lora_rank",
    "rank": "lora_rank",
    "network_alpha": "lora_alpha",
    "hub_model_id": "push_to",
    "adam_weight_decay": "weight_decay",
    "adam_beta1": "betas",
    "adam_beta2": "betas",
    "adam_epsilon": "eps",
    "epsilon": "eps",
    "optimizer_kwargs": "optimizer_args",
    "text_encoder_learning_rate": "text_encoder_lr",
    "te_lr": "text_encoder_lr",
    "learning_rate_te": "text_encoder_lr",
    "freeze_embeddings": "text_encoder_freeze_embeddings",
    "unfreeze_last_n_layers": "text_encoder_unfreeze_last_n_layers",
    "unfreeze_final_n_layers": "text_encoder_unfreeze_last_n_layers",
    "freeze_front_n_layers": "text_encoder_freeze_front_n_layers",
    "freeze_final_layer_norm": "text_encoder_freeze_final_layer_norm",
}
"""Names of other trainers, and of keys in EveryDream 2's side files, that look like none of ours, or like another one."""


def closest_setting(name: str, known: Iterable[str]) -> str | None:
    """The parameter that this name means in other trainers, or looks most like; None if it means nothing."""
    if name.lower() in OTHER_TRAINERS:
        return OTHER_TRAINERS[name.lower()]
    matches = difflib.get_close_matches(name.lower(), list(known), n=1, cutoff=0.6)
    return matches[0] if matches else None


def describe_unknown(name: str, known: Iterable[str]) -> str:
    """The answer to a name that is no parameter."""
    if name in RETIRED:
        return f"{name}: no longer used; replaced by {RETIRED[name]}."
    near = closest_setting(name, known)
    return f"{name}: unknown setting" + (
        f"; did you mean {near}?" if near else ". `everydream train --help` lists them all."
    )
