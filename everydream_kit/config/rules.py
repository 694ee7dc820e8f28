"""Rules about several settings at once: combinations that are errors, and settings without effect, which are warnings.

Most of them follow from the facts that stand on the declarations: what a setting needs, which training kinds it has a
meaning for, and which values work on a sharded model. Rules of their own are written out.
"""

from __future__ import annotations

import json

from everydream_kit.config.declaration import FLOW, Facts, facts_of
from everydream_kit.config.groups import AllGroups
from everydream_kit.config.optimizer_settings import OptimizerGroup
from everydream_kit.config.precision_settings import PrecisionGroup
from everydream_kit.config.sample_settings import MEASURED, ValidationGroup

LEAST_FOR_SIGMA_SQRT = 50
"""Of 1000 timesteps: the weight of a noise level stays within 400 there."""


def mixes_precision(config: PrecisionGroup) -> bool:
    """Whether mixed precision is on."""
    return config.amp and not config.disable_amp


def frozen_in_half(config: AllGroups) -> bool:
    """Whether frozen weights were requested in half precision."""
    return config.frozen_dtype in ("float16", "bfloat16")


def measures_losses(config: ValidationGroup) -> bool:
    """Whether a run measures validation losses."""
    return any(getattr(config, name) not in (None, False, "none", {}) for name in MEASURED)


def wants_auto_optimizer(config: OptimizerGroup) -> bool:
    """Whether the optimizer is to be chosen by the memory (`optimizer: auto`)."""
    return config.optimizer is not None and config.optimizer.strip().lower() == "auto"


def combination_problems(config: AllGroups) -> list[str]:
    """Rules about two settings; each names both and the cure."""
    c = config
    problems = []
    if c.timestep_start >= c.timestep_end:
        problems.append(
            f"timestep_start, timestep_end: the start must be below the end (got {c.timestep_start} and {c.timestep_end})"
        )
    if c.disable_unet_training and c.disable_textenc_training:
        problems.append("disable_unet_training, disable_textenc_training: nothing is left to train; switch one off")
    if c.ema_decay_rate is not None and c.ema_strength_target is not None:
        problems.append("ema_decay_rate, ema_strength_target: give one of them, the other follows")
    if c.min_snr_gamma is not None and c.debiased_estimation:
        problems.append("min_snr_gamma, debiased_estimation: two weightings of the same thing; give one of them")
    if c.fused_backward and (c.grad_accum > 1 or c.clip_grad_norm is not None):
        problems.append(
            "fused_backward: steps inside the backward pass, so it works without grad_accum and clip_grad_norm only; "
            "set grad_accum to 1 and clip_grad_norm to none, or fused_backward off"
        )
    problems += graph_problems(c)
    if frozen_in_half(c) and c.weight_dtype == "float32" and not mixes_precision(c):
        problems.append(
            f"frozen_dtype, amp: frozen weights in {c.frozen_dtype} need mixed precision; set frozen_dtype to auto, or amp on"
        )
    if c.training_kind == "textual_inversion" and not c.new_tokens:
        problems.append('new_tokens: textual_inversion needs at least one, for instance {"<my-cat>": "cat"}')
    if c.push_every is not None and c.push_to is None:
        problems.append("push_every, push_to: name the Hub repository in push_to, or leave push_every out")
    if c.validation_split_mode == "manual" and not c.validation_data_root:
        problems.append("validation_split_mode, validation_data_root: manual needs a folder in validation_data_root")
    if c.early_stopping_patience is not None and c.validation_split_mode == "none" and c.validation_config is None:
        problems.append(
            "early_stopping_patience, validation_split_mode: early stopping needs validation; set validation_split_mode to "
            "automatic, or give a validation_config"
        )
    if c.text_encoder_unfreeze_last_n_layers is not None and c.text_encoder_freeze_front_n_layers is not None:
        problems.append(
            "text_encoder_unfreeze_last_n_layers, text_encoder_freeze_front_n_layers: they mean the same; give one of them"
        )
    return problems + _adapter_problems(c) + swapping_problems(c) + sharding_problems(c)


def _adapter_problems(c: AllGroups) -> list[str]:
    problems = []
    if c.quantization != "none" and c.training_kind == "full":
        problems.append(
            f"quantization, training_kind: {c.quantization} weights cannot be trained, only an adapter on them; set "
            "training_kind to lora, or quantization to none"
        )
    if c.text_quantization != "none" and c.training_kind == "full":
        problems.append(
            f"text_quantization, training_kind: checkpoints of full training hold the text encoder too, and "
            f"{c.text_quantization} would reduce its precision; set training_kind to lora, or text_quantization to none"
        )
    if c.lora_form != "lora" and c.training_kind != "lora":
        problems.append(
            f"lora_form, training_kind: {c.lora_form} is a form of training_kind lora, and {c.training_kind} was asked for; "
            "set training_kind to lora, or leave lora_form out"
        )
    if c.lora_form != "lora" and (c.lora_dora or c.lora_dropout):
        own = "lora_dora" if c.lora_dora else "lora_dropout"
        problems.append(f"lora_form, {own}: {own} is for the form lora only; set lora_form to lora, or {own} off")
    return problems


EAGER_ONLY = {
    "fused_backward": "updates weights by hooks during the backward pass, which no replay calls",
    "blocks_to_swap": "brings weights by hooks while a pass runs, which no replay calls",
    "torch_compile": "may compile again during a capture",
}
"""Settings that CUDA graphs do not work with, and why."""


def graph_problems(config: AllGroups) -> list[str]:
    """Settings that do not work where passes are captured."""
    if config.cuda_graphs == "off":
        return []
    return [
        f"cuda_graphs, {name}: {name} {why}; set cuda_graphs or {name} off"
        for name, why in EAGER_ONLY.items()
        if _is_on(config, name)
    ]


def swapping_problems(config: AllGroups) -> list[str]:
    """What does not go together with blocks that wait in host memory."""
    c = config
    if not c.blocks_to_swap:
        return []
    problems = []
    if c.training_kind == "full":
        problems.append(
            "blocks_to_swap, training_kind: full training changes every block at every step, so each would have to go back as "
            "well; set blocks_to_swap to 0, or training_kind to lora. For full training, fused_backward and an 8-bit optimizer "
            "save more"
        )
    if c.torch_compile:
        problems.append(
            "blocks_to_swap, torch_compile: compiled blocks keep the place of their weights; switch one of them off"
        )
    return problems


def sharding_problems(config: AllGroups) -> list[str]:
    """Settings that do not work where the model is sharded."""
    if config.parallel != "fsdp2":
        return []
    fields = type(config).model_fields
    clashes = [
        name
        for name, facts in facts_of(fields).items()
        if facts.fsdp2 is not None and getattr(config, name) not in facts.fsdp2 and not _reason(config, facts)
    ]
    return [
        f"parallel, {name}: fsdp2 does not work with {name} {getattr(config, name)}; set it to "
        f"{json.dumps(fields[name].default)}, or parallel to ddp"
        for name in clashes
    ]


def _reason(config: AllGroups, facts: Facts) -> str:
    """Why a setting has no effect next to the others; empty if it has one."""
    if config.training_kind not in facts.kinds:
        return f"with training_kind {config.training_kind}, only with {' or '.join(facts.kinds)}"
    if facts.needs and not any(_is_on(config, name) for name in facts.needs):
        return f"without {' or '.join(facts.needs)}"
    return next((f"with {name}" for name in facts.unless if _is_on(config, name)), "")


def _is_on(config: AllGroups, name: str) -> bool:
    return getattr(config, name) not in (None, False, "none")


def settings_without_effect(config: AllGroups) -> list[str]:
    """Settings that were given and change nothing in this combination, a sentence each."""
    fields = type(config).model_fields
    given = {name: one for name, one in facts_of(fields).items() if getattr(config, name) != fields[name].default}
    reasons = {name: _reason(config, one) for name, one in given.items()}
    return [f"{name}: has no effect {reason}." for name, reason in reasons.items() if reason]


def settings_without_meaning(config: AllGroups, family: str) -> list[str]:
    """Settings that were given and have no meaning for a model family, a sentence each."""
    fields = type(config).model_fields
    return [
        f"{name}: has no effect with a model of the family {family}, only with {', '.join(facts.families)}."
        for name, facts in facts_of(fields).items()
        if family not in facts.families and getattr(config, name) != fields[name].default
    ]


def family_warnings(config: AllGroups, family: str) -> list[str]:
    """Warnings that depend on the model's family, a sentence each."""
    found = settings_without_meaning(config, family)
    if family in FLOW and config.zero_frequency_noise_ratio:
        found.append(
            "zero_frequency_noise_ratio: flow matching reaches pure noise already, and no app begins a sample with offset noise; "
            "0 is usual."
        )
    return found


def config_warnings(config: AllGroups) -> list[str]:
    """Warnings about settings that are allowed, but have no effect or are probably a mistake."""
    c = config
    warnings = settings_without_effect(c)
    if c.cond_dropout > 0.26:
        warnings.append(f"cond_dropout {c.cond_dropout}: above 0.26 most models bleed and overfit.")
    if c.lr_scheduler == "constant" and c.lr_decay_steps is not None:
        warnings.append("lr_decay_steps: has no effect with lr_scheduler constant.")
    if c.keep_tags and not c.shuffle_tags:
        warnings.append(
            "keep_tags: has an effect only where tags are shuffled (shuffle_tags, or a folder's own setting)."
        )
    if c.caption_variants and not c.shuffle_tags and c.caption_lines != "choose":
        warnings.append(
            "caption_variants: has an effect only where captions are drawn (shuffle_tags, caption_lines choose, or a "
            "folder's own setting)."
        )
    if c.attn_type == "xformers":
        warnings.append("attn_type xformers: torch's own attention (sdp) is used instead; it is as fast.")
    if c.train_sampler != "ddpm":
        warnings.append(
            f"train_sampler {c.train_sampler}: the model's own noise schedule is used; all samplers add noise alike."
        )
    if c.weighting_scheme == "sigma_sqrt" and c.timestep_start < LEAST_FOR_SIGMA_SQRT:
        warnings.append(
            "weighting_scheme sigma_sqrt: weighs a noise level by 1 / sigma², up to a million times, so that single images near "
            f"0 outweigh all others; set timestep_start to {LEAST_FOR_SIGMA_SQRT} or more."
        )
    if c.training_kind == "full" and frozen_in_half(c):
        warnings.append(
            f"frozen_dtype {c.frozen_dtype}: checkpoints hold what is not trained in {c.frozen_dtype} too; auto keeps the "
            "precision of the base."
        )
    return warnings
