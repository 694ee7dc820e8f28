"""Reading single-file models: `.safetensors` and `.ckpt` in the LDM layout, offline.

What a single file does not hold (configs, vocabulary) comes from the kit's own data, or from metadata that the kit's
exports carry. The family is recognized by names and shapes; the prediction type by markers, metadata, the `.yaml`
next to the file, or a statistic of the weights, in this order.
"""

from __future__ import annotations

import dataclasses
import logging
import re
from pathlib import Path
from typing import Any

from everydream_kit.errors import ModelError
from everydream_kit.models.convert import UNET_PREFIX, num_text_blocks
from everydream_kit.models.families import FAMILIES, family_by_name
from everydream_kit.models.family import Config, Family, ModelFiles, configs_folder
from everydream_kit.models.file_kinds import (
    held_parts,
    refuse_other_kinds,
    say_parts,
    with_vae,
    without_scales,
    without_wrapper,
)
from everydream_kit.models.flow_transformers import bare
from everydream_kit.models.model_files import (
    MODULAR_INDEX,
    has_zero_terminal_snr,
    open_folder,
    other_family,
    prediction_type_of,
    read_json,
    refuse_unsupported,
    trained_as,
)
from everydream_kit.models.part_configs import scheduler_values
from everydream_kit.models.tensors import Tensors
from everydream_kit.models.tokenizer import END, Vocabulary, checked_vocabulary
from everydream_kit.models.vae_files import with_given_vae
from everydream_kit.models.weight_files import WEIGHT_SUFFIXES, open_weights
from everydream_kit.strict_json import parse_json

logger = logging.getLogger(__name__)

CONFIGS_KEY = "everydream_kit.configs"
"""Metadata key under which our exports keep the components' configs: a file of another width than the published one is
readable by it, and the model's own sampler comes back."""
VOCABULARY_KEY = "everydream_kit.vocabulary"
"""Metadata key for the vocabulary of a model that has not CLIP's."""
V_PRED_MARKER, ZTSNR_MARKER = "v_pred", "ztsnr"
"""Names of empty tensors by which UIs know v-prediction and zero-terminal-SNR models."""

_V_STATISTIC = UNET_PREFIX + "output_blocks.11.1.transformer_blocks.0.norm1.bias"
_V_THRESHOLD = 0.09
"""ComfyUI's rule for SD 2.x files that say nothing: this bias spreads wider in v-prediction models."""


def open_single_file(
    path: Path, *, family: str | None = None, prediction_type: str | None = None, vae: str | Path | None = None
) -> ModelFiles:
    """Open a single-file model.

    Args:
        family, prediction_type: overrides of what the file says.
        vae: a VAE to use in place of the file's own (`vae_files.py`).

    Raises:
        ModelError: damaged, carrying code, no Stable Diffusion model, or of a kind that the kit does not train.
    """
    if path.suffix.lower() not in WEIGHT_SUFFIXES:
        raise ModelError(f"{path}: not a model file by its name; the kit reads {', '.join(WEIGHT_SUFFIXES)}.")
    tensors, metadata = open_weights(path)
    tensors = without_wrapper(tensors)
    alone = _family_of_denoiser(tensors, family) or _family_of_denoiser(tensors, None)
    named = None if family is None else family_by_name(family)
    if named is not None and named is not alone and not (alone is None and named.layout.holds_all):
        raise other_family(str(path), alone or _recognize(path, tensors), named)
    if alone is not None and vae is not None:
        raise ModelError(f"{path}: {alone.title} is used with its own VAE. Leave --vae (vae) out.")
    if alone is not None:
        return _open_denoiser(path, alone, without_scales(tensors), metadata)
    refuse_other_kinds(path, tensors)
    found = named or _recognize(path, tensors)
    tensors = without_scales(tensors) if vae is not None else with_vae(path, without_scales(tensors))
    configs = _with_found_blocks(path, tensors, found, _configs(path, found, metadata))
    refuse_unsupported(str(path), configs, {})
    scheduler = dict(scheduler_values(configs.pop("scheduler"), str(path)))
    predicted = prediction_type or _prediction_type(path, tensors, metadata, found, scheduler)
    rescaled = ZTSNR_MARKER in tensors or has_zero_terminal_snr(scheduler)
    files = ModelFiles(
        family=found,
        source=str(path),
        configs=configs,
        tensors=found.layout.from_single_file(tensors, found, configs),
        tokenizers=_tokenizers(path, found, metadata),
        scheduler_config=trained_as({**scheduler, "prediction_type": predicted}, predicted, rescaled),
        prediction_type=predicted,
        zero_terminal_snr=rescaled,
        metadata=metadata,
    )
    return with_given_vae(files, vae)


def _family_of_denoiser(tensors: Tensors, named: str | None) -> Family | None:
    """The family of a file that holds a denoiser alone, as its own layout has it; None for full checkpoints."""
    shapes = {bare(name): tensor.shape for name, tensor in tensors.items()}
    for family in FAMILIES.values():
        if not family.layout.holds_all and named in (None, family.name) and family.matches_keys(shapes):
            return family
    return None


def _open_denoiser(path: Path, family: Family, tensors: Tensors, metadata: dict[str, str]) -> ModelFiles:
    """A denoiser's file with everything else from the diffusers folder that it lies in."""
    folder = path.parent
    if not (folder / "model_index.json").is_file() and not (folder / MODULAR_INDEX).is_file():
        raise ModelError(
            f"{path}: holds the transformer of {family.title} alone, as its files do. Text encoder, tokenizer and VAE are "
            "read from the model's diffusers folder: put the file there, next to model_index.json."
        )
    rest = open_folder(folder, family=family.name)
    name = family.denoiser.folder
    configs = dict(rest.configs)
    own = parse_json(metadata.get(CONFIGS_KEY, "{}"), f"{path}: metadata {CONFIGS_KEY}", error=ModelError)
    if isinstance(own.get(name), dict):
        configs[name] = own[name]
    weights = {**rest.tensors, **family.layout.from_single_file(tensors, family, configs)}
    return dataclasses.replace(rest, source=str(path), configs=configs, tensors=weights, metadata=metadata)


def _recognize(path: Path, tensors: Tensors) -> Family:
    for family in FAMILIES.values():
        texts = family.text_encoders[-1].single_file_prefix  # differs from family to family
        if family.layout.holds_all and any(name.startswith(texts) for name in tensors):
            return family
    if "a text encoder" not in held_parts(tensors):
        raise ModelError(f"{path}: {say_parts(tensors)}.")
    raise ModelError(f"{path}: its text encoder is of none of the families {', '.join(FAMILIES)}.")


def _configs(path: Path, family: Family, metadata: dict[str, str]) -> dict[str, Config]:
    """The components' configs and the scheduler's: from the file's metadata, else as the family is published."""
    folder = configs_folder(family)
    names = [component.folder for component in family.components]
    configs: dict[str, Config] = {name: read_json(folder / name / "config.json") for name in names}
    configs["scheduler"] = read_json(folder / "scheduler" / "scheduler_config.json")
    if CONFIGS_KEY in metadata:
        own = parse_json(metadata[CONFIGS_KEY], f"{path}: metadata {CONFIGS_KEY}", error=ModelError)
        configs |= {name: own[name] for name in configs if isinstance(own.get(name), dict)}
    return configs


def _with_found_blocks(path: Path, tensors: Tensors, family: Family, configs: dict[str, Config]) -> dict[str, Config]:
    """Configs whose text encoders are no deeper than the file's: some tools cut off the blocks that nothing reads."""
    configs = dict(configs)
    for slot in family.text_encoders:
        found, published = num_text_blocks(tensors, slot), configs[slot.folder].get("num_hidden_layers", 0)
        if 0 < found < published:
            logger.warning(
                "%s: its %s has %d blocks where %s has %d; it is used as it is.",
                *(path, slot.folder, found, family.title, published),
            )
            configs[slot.folder] = {**configs[slot.folder], "num_hidden_layers": found}
    return configs


def _tokenizers(path: Path, family: Family, metadata: dict[str, str]) -> dict[str, Path | Vocabulary | None]:
    """The shipped vocabulary, unless the file's metadata holds one of its own."""
    names = [slot.tokenizer_folder for slot in family.text_encoders]
    where = f"{path}: metadata {VOCABULARY_KEY}"
    own = parse_json(metadata.get(VOCABULARY_KEY, "{}"), where, error=ModelError)
    found: dict[str, Path | Vocabulary | None] = dict.fromkeys(names)
    for name in own.keys() & set(names):
        held = own[name] if isinstance(own[name], dict) else {}
        pad_token = held.get("pad_token", END)
        found[name] = checked_vocabulary(held.get("tokens"), held.get("merges"), pad_token, where)
    return found


def _prediction_type(
    path: Path, tensors: Tensors, metadata: dict[str, str], family: Family, scheduler: dict[str, Any]
) -> str:
    if V_PRED_MARKER in tensors:
        return "v_prediction"
    if CONFIGS_KEY in metadata:
        return prediction_type_of(scheduler, str(path))
    named = metadata.get("modelspec.prediction_type") or metadata.get("modelspec.predict_key") or ""
    if named:
        return "v_prediction" if named.lower().startswith("v") else "epsilon"
    alongside = path.with_suffix(".yaml")
    if alongside.is_file():
        text = alongside.read_text(encoding="utf-8", errors="replace")
        return "v_prediction" if re.search(r"parameterization:\s*[\"']?v\b", text) else "epsilon"
    if family.name == "sd2" and _V_STATISTIC in tensors:
        is_v = tensors[_V_STATISTIC].read().float().std(unbiased=False).item() > _V_THRESHOLD
        guess = "v_prediction" if is_v else "epsilon"
        logger.warning(
            "%s does not say what it predicts; its weights look like %s. Set prediction_type if not.", path, guess
        )
        return guess
    return "epsilon"
