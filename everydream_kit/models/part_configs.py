"""What a model folder's configs may say: the keys that shape a module, within bounds; nothing else is passed on.

A config from a forum can name a kernel on the Hub (`_attn_implementation`), or ask for a million layers. So each part
has an allow-list of keys, and the numbers in it are bounded before a library sees them.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from everydream_kit.errors import ModelError
from everydream_kit.models.family import Config

TEXT_ENCODER_KEYS = frozenset(
    {
        *("vocab_size", "hidden_size", "intermediate_size", "projection_dim", "num_hidden_layers"),
        *("num_attention_heads", "max_position_embeddings", "hidden_act", "layer_norm_eps", "attention_dropout"),
        *("initializer_range", "initializer_factor", "pad_token_id", "bos_token_id", "eos_token_id"),
    }
)
LANGUAGE_MODEL_KEYS = TEXT_ENCODER_KEYS | {
    *("num_key_value_heads", "head_dim", "rms_norm_eps", "rope_theta", "attention_bias", "tie_word_embeddings"),
    *("use_sliding_window", "sliding_window", "max_window_layers"),
    *("d_model", "d_kv", "d_ff", "num_layers", "num_heads", "feed_forward_proj", "layer_norm_epsilon"),  # T5's
    *("relative_attention_num_buckets", "relative_attention_max_distance", "dropout_rate"),
}
VISION_KEYS = frozenset(
    {
        *("depth", "hidden_size", "hidden_act", "intermediate_size", "num_heads", "in_channels", "patch_size"),
        *("spatial_merge_size", "temporal_patch_size", "out_hidden_size", "num_position_embeddings"),
        *("deepstack_visual_indexes", "initializer_range"),
        *("fullatt_block_indexes", "tokens_per_second", "window_size"),  # of Qwen2.5-VL
    }
)
"""Of the half of a language model that sees images."""
MROPE_KEYS = ("mrope_section", "mrope_interleaved")
"""How such a model's positions are divided among time, height and width."""
MAX_NUMBER = 10_000_000
"""The largest numbers in configs are Qwen3-VL's base of rotary positions, 5,000,000, and its vocabulary's 151,936."""
MAX_LAYERS = 100
MAX_ENTRIES = 32
"""In a list; the longest have one entry for each of four blocks."""
MAX_BLOCKS = 2000
"""Blocks and attention layers of a UNet together; SDXL has some hundred."""
MAX_TIMESTEPS = 100_000
MAX_SHIFT = 100
"""Of flow matching; models have 1 to 12."""
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
SCHEDULER_NUMBERS = ("beta_start", "beta_end")


def text_encoder_values(config: Config) -> dict[str, Any]:
    """The part of a text encoder's config that shapes it. Raises: ModelError."""
    kept = {key: value for key, value in config.items() if key in TEXT_ENCODER_KEYS}
    _check(kept, "text encoder")
    return kept


def language_model_values(config: Config) -> dict[str, Any]:
    """The part of a language model's config that shapes it, as transformers 5 takes it. Raises: ModelError."""
    if "vision_config" in config:
        return _vision_language_values(config)
    values = _language_values(config)
    theta = values.pop("rope_theta", None)
    return values if theta is None else {**values, "rope_parameters": _rope(theta)}


def _language_values(config: Config) -> dict[str, Any]:
    kept = {key: value for key, value in config.items() if key in LANGUAGE_MODEL_KEYS}
    rope = config.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in rope:  # as transformers 5 writes it
        kept["rope_theta"] = rope["rope_theta"]
    _check(kept, "text encoder")
    return kept


def _rope(theta: Any) -> dict[str, Any]:
    try:
        return {"rope_type": "default", "rope_theta": float(theta)}
    except (TypeError, ValueError):
        raise _refusal("text encoder", "rope_theta", theta, "a number") from None


def _vision_language_values(config: Config) -> dict[str, Any]:
    text, vision = config.get("text_config"), config.get("vision_config")
    text = config if text is None else text  # Qwen2.5-VL's was published flat
    if not isinstance(text, dict) or not isinstance(vision, dict):
        raise ModelError("text encoder: its config.json has no text_config and vision_config. Take it from its source.")
    values = _language_values(text)
    rope = _rope(values.pop("rope_theta", 5_000_000))
    given = text.get("rope_parameters") or text.get("rope_scaling")  # as transformers 5 writes it, or 4
    rope |= {key: given[key] for key in MROPE_KEYS if isinstance(given, dict) and key in given}
    seen = {key: value for key, value in vision.items() if key in VISION_KEYS}
    for part in (rope, seen):
        _check(part, "text encoder")
    if not 0 <= seen.get("depth", 0) <= MAX_LAYERS:
        raise _refusal("text encoder", "depth", seen["depth"], f"a number up to {MAX_LAYERS}")
    return {"text_config": {**values, "rope_parameters": rope}, "vision_config": seen}


def diffusers_values(cls: Any, config: Config) -> dict[str, Any]:
    """The part of a UNet's or VAE's config that its class takes. Raises: ModelError."""
    known = inspect.signature(cls.__init__).parameters.keys() - {"self", "args", "kwargs"}
    kept = {key: value for key, value in config.items() if key in known}
    _check(kept, cls.__name__)
    return kept


def scheduler_values(config: Config, where: str) -> Config:
    """A scheduler's config, whose noise schedule can be computed.

    Raises:
        ModelError: a value of the noise schedule is none.
    """
    steps = config.get("num_train_timesteps", 1000)
    if type(steps) is not int or not 1 <= steps <= MAX_TIMESTEPS:
        raise _refusal(f"{where}: scheduler", "num_train_timesteps", steps, f"a number from 1 to {MAX_TIMESTEPS:,}")
    for name in SCHEDULER_NUMBERS:
        value = config.get(name, 0.01)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1:
            raise _refusal(f"{where}: scheduler", name, value, "a number between 0 and 1")
    shift = config.get("shift", 1.0)
    if isinstance(shift, bool) or not isinstance(shift, (int, float)) or not 0 < shift <= MAX_SHIFT:
        raise _refusal(f"{where}: scheduler", "shift", shift, f"a number above 0, up to {MAX_SHIFT}")
    schedule = config.get("beta_schedule", "scaled_linear")
    if schedule not in BETA_SCHEDULES:
        raise _refusal(f"{where}: scheduler", "beta_schedule", schedule, f"one of {', '.join(BETA_SCHEDULES)}")
    betas = config.get("trained_betas")
    if betas is not None and not (isinstance(betas, list) and len(betas) == steps and all(map(_is_beta, betas))):
        raise _refusal(f"{where}: scheduler", "trained_betas", betas, f"a list of {steps} numbers from 0 to 1")
    return config


def _is_beta(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= 1


def _check(config: Config, part: str) -> None:
    for key, value in config.items():
        for entry in _entries(value):
            is_number = isinstance(entry, (int, float)) and not isinstance(entry, bool)
            if is_number and not -MAX_NUMBER <= entry <= MAX_NUMBER:
                raise _refusal(part, key, value, f"within ±{MAX_NUMBER:,}")
            if is_number and "layers" in key and not 0 <= entry <= MAX_LAYERS:
                raise _refusal(part, key, value, f"a number up to {MAX_LAYERS}")
            if isinstance(entry, list) and len(entry) > MAX_ENTRIES:
                raise _refusal(part, key, value, f"a list of at most {MAX_ENTRIES} entries")
    blocks = len(config.get("down_block_types") or ()) if isinstance(config.get("down_block_types"), list) else 4
    layers = _largest(config.get("layers_per_block", 2))
    attentions = _largest(config.get("transformer_layers_per_block", 1))
    if blocks * layers * attentions > MAX_BLOCKS:
        what = f"{blocks} x {layers} x {attentions} layers"
        raise _refusal(part, "layers_per_block, transformer_layers_per_block", what, f"at most {MAX_BLOCKS} in all")


def _entries(value: Any, depth: int = 0) -> Iterator[Any]:
    """A value, and what is in it if it is a list."""
    yield value
    if isinstance(value, list) and depth < 4:
        for entry in value[: MAX_ENTRIES + 1]:
            yield from _entries(entry, depth + 1)


def _largest(value: Any) -> int:
    return max((entry for entry in _entries(value) if type(entry) is int), default=1)


def _refusal(part: str, key: str, value: Any, wanted: str) -> ModelError:
    text = repr(value) if not isinstance(value, (list, dict)) or len(value) <= 4 else f"{len(value):,} entries"
    return ModelError(f"{part}: the config's {key} must be {wanted} (got {text[:80]}). Take the file from its source.")
