"""A model on disk, opened and understood, but not read: `ModelFiles`.

This is where every way in meets (diffusers folder here, single file in `single_file.py`, a live model in `model_saving.py`),
and where every way out starts (`loading.py` builds modules, `model_saving.py` writes folders, `export/` writes single files).
Weights are lazy, so conversions need no model in memory.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from everydream_kit import strict_json
from everydream_kit.errors import ModelError
from everydream_kit.models.families import FAMILIES, family_by_name
from everydream_kit.models.family import UNET, Config, Family, ModelFiles
from everydream_kit.models.part_configs import scheduler_values
from everydream_kit.models.tensors import Tensors
from everydream_kit.models.weight_files import open_weights

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
DISTILLED = "is_distilled"
"""Key of a model's index; in memory it is with the settings of the sampler."""
MODULAR_INDEX = "modular_model_index.json"
"""Index of a model whose pipeline in diffusers is modular: its loader reads no `model_index.json`."""


def open_folder(
    folder: Path,
    *,
    family: str | None = None,
    prediction_type: str | None = None,
    variant: str | None = None,
    needs_weights: bool = True,
) -> ModelFiles:
    """Open a diffusers folder.

    Args:
        family, prediction_type: overrides of what the files say.
        variant: of the weight files, such as `fp16`; a component without it is taken plain.
        needs_weights: False: configs will do. No weights are opened, and a scheduler may be missing.

    Raises:
        ModelError: a part is missing, damaged, or of a kind that the kit does not train.
    """
    _check_is_model(folder)
    configs = read_configs(folder)
    index = read_json(folder / "model_index.json") if (folder / "model_index.json").is_file() else {}
    refuse_unsupported(str(folder), configs, index)
    found = find_family(str(folder), configs, family)
    wanted = [component.folder for component in found.components]
    for name in wanted:
        if name not in configs:
            raise ModelError(f"{folder}: {name}/config.json is missing, and {found.title} needs it.")
    scheduler = read_scheduler(folder, is_needed=needs_weights)
    refuse_other_schedule(found, scheduler, str(folder))
    if index.get(DISTILLED) is True:  # diffusers' pipelines shift such a model's noise levels in another way
        scheduler[DISTILLED] = True
    tensors = {name: open_component(folder / name, variant) for name in wanted} if needs_weights else {}
    for slot in found.text_encoders if needs_weights else ():  # what a whole CLIP model's file holds besides
        own = tensors[slot.folder]
        tensors[slot.folder] = {name: value for name, value in own.items() if not name.startswith(slot.unused)}
    return ModelFiles(
        family=found,
        source=str(folder),
        configs={name: configs[name] for name in wanted},
        tensors=tensors,
        tokenizers={slot.tokenizer_folder: folder / slot.tokenizer_folder for slot in found.text_encoders},
        scheduler_config=scheduler,
        prediction_type=predicted_by(found, scheduler, str(folder), prediction_type),
        zero_terminal_snr=has_zero_terminal_snr(scheduler),
    )


def denoiser_folders() -> set[str]:
    """What the folder of the denoiser is called, in one family or another."""
    return {family.denoiser.folder for family in FAMILIES.values()}


def read_configs(folder: Path) -> dict[str, Config]:
    """The configs of all components in a diffusers folder, by their folders' names."""
    known = {component.folder for family in FAMILIES.values() for component in family.components}
    paths = {path.parent.name: path for path in sorted(folder.glob("*/config.json"))}
    return {name: read_json(path) for name, path in paths.items() if name in known or name.startswith("text_encoder")}


def _check_is_model(folder: Path) -> None:
    if any((folder / name / "config.json").is_file() for name in denoiser_folders()):
        return
    if folder.is_dir() and not any(folder.iterdir()):
        raise ModelError(f"{folder}: the folder is empty, so there is no model to load. Was the download cut short?")
    raise ModelError(
        f"{folder}: not a diffusers model (unet/config.json is missing). Give the folder that holds "
        "model_index.json, or a .safetensors file."
    )


def refuse_unsupported(where: str, configs: Mapping[str, Config], index: Config) -> None:
    """Name models that look like ours and are not.

    Raises:
        ModelError: inpainting, depth, upscaler, instruct and refiner models.
    """
    pipeline = str(index.get("_class_name", ""))
    channels = configs.get("unet", {}).get("in_channels", 4)  # of the families with a UNet
    kinds = {9: "an inpainting model", 5: "a depth-to-image model", 7: "an upscaler", 8: "an InstructPix2Pix model"}
    if channels != 4 or "Inpaint" in pipeline:
        kind = "an inpainting model" if "Inpaint" in pipeline else kinds.get(channels, "of an unknown kind")
        raise ModelError(
            f"{where}: this is {kind} (its UNet takes {channels} channels, not 4), which this version cannot train. "
            "Take the ordinary model of the same family."
        )
    if "Edit" in pipeline or "Kontext" in pipeline:
        raise ModelError(
            f"{where}: this is a model for editing images ({pipeline}), which this version cannot train. Take the ordinary "
            "model of the same family."
        )
    if "text_encoder_2" in configs and "text_encoder" not in configs:
        raise ModelError(
            f"{where}: this is an SDXL refiner, which this version cannot train. Take the SDXL base model."
        )


def find_family(where: str, configs: Mapping[str, Config], named: str | None) -> Family:
    """The family that a person names, else the one whose table these configs fit.

    Raises:
        ModelError: they fit none, or those of the named family have other classes and those of another fit.
    """
    if named is None:
        return recognize_configs(where, configs)
    family = family_by_name(named)
    own = configs.get(family.denoiser.folder)
    if own is None or own.get("_class_name", family.denoiser.class_name) != family.denoiser.class_name:
        raise other_family(where, recognize_configs(where, configs), family)
    return family


def other_family(where: str, found: Family, named: Family) -> ModelError:
    """Of a family that a person names and the model is not of."""
    return ModelError(f"{where}: family: this is {found.title}, and no {named.title}. Leave family out.")


def refuse_other_schedule(family: Family, scheduler_config: Config, where: str) -> None:
    """Raises: ModelError: the scheduler is one of flow matching and the family learns diffusion, or the other way round."""
    named = str(scheduler_config.get("_class_name", ""))
    is_flow = named.startswith("FlowMatch") or bool(scheduler_config.get("use_flow_sigmas"))
    if named and is_flow != (family.objective == "flow"):
        learns = "flow matching" if family.objective == "flow" else "diffusion"
        raise ModelError(
            f"{where}: scheduler/scheduler_config.json names the class {named!r}, and {family.title} learns {learns}: its "
            "noise levels would not be those that it was trained with. Take the file from the model's source."
        )


def recognize_configs(where: str, configs: Mapping[str, Config]) -> Family:
    """The family whose table these configs fit."""
    for family in FAMILIES.values():
        own = configs.get(family.denoiser.folder)
        is_of_class = family.denoiser is UNET or (own or {}).get("_class_name") == family.denoiser.class_name
        if own is not None and is_of_class and family.matches_configs(configs):
            return family
    own = configs.get("transformer")
    for family in FAMILIES.values():
        missing = [part.folder for part in family.components if part.folder not in configs]
        if own and own.get("_class_name") == family.denoiser.class_name and missing:
            raise ModelError(f"{where}: {missing[0]}/config.json is missing, and {family.title} needs it.")
    if own is not None and "_class_name" not in own:
        raise ModelError(
            f"{where}: transformer/config.json names no class (_class_name). Take it from the model's source."
        )
    if own is not None:
        raise ModelError(
            f"{where}: this model is a diffusion transformer ({own.get('_class_name')} with {own.get('in_channels')} channels "
            f"of input), which the kit does not train. It trains {', '.join(family.title for family in FAMILIES.values())}."
        )
    raise ModelError(
        f"{where}: the model fits none of the families {', '.join(FAMILIES)} (it has {', '.join(sorted(configs))}). "
        "If it is one of them all the same, say which with `family`."
    )


def open_component(folder: Path, variant: str | None = None) -> Tensors:
    """Weights of one component's folder: safetensors before pickles, whole before sharded.

    Raises:
        ModelError: no weights, or damaged ones.
    """
    # transformers calls its files otherwise than diffusers
    texts = folder.name.startswith("text_encoder")
    stem, pickle_stem = ("model", "pytorch_model") if texts else ("diffusion_pytorch_model",) * 2
    suffixes = [f".{variant}", ""] if variant else [""]
    for suffix in suffixes:
        for name in (f"{stem}{suffix}.safetensors", f"{pickle_stem}{suffix}.bin"):
            if (folder / name).is_file():
                return open_weights(folder / name)[0]
            shards = sorted(folder.glob(f"{stem}.safetensors.index{suffix}.json")) + sorted(
                folder.glob(f"{name}.index.json")
            )
            if shards:
                return _open_shards(shards[0])
    raise ModelError(
        f"{folder}: no weights here ({stem}.safetensors or {pickle_stem}.bin). The model folder is incomplete"
        + (f", or has no variant {variant!r}." if variant else ".")
    )


def _open_shards(index_file: Path) -> Tensors:
    weight_map = read_json(index_file).get("weight_map", {})
    tensors: Tensors = {}
    for name in sorted(set(map(str, weight_map.values()))):
        shard = index_file.parent / Path(name).name
        if not shard.is_file():
            raise ModelError(f"{index_file}: names the file {name}, which is not there. The download is incomplete.")
        tensors.update(open_weights(shard)[0])
    return tensors


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises: ModelError if there is none."""
    try:
        return dict(strict_json.read_json(path, error=ModelError))
    except FileNotFoundError:
        raise ModelError(f"{path}: is missing.") from None


def read_scheduler(folder: Path, *, is_needed: bool = True) -> dict[str, Any]:
    """The scheduler's config. Raises: ModelError: it is missing and needed, or damaged."""
    path = folder / "scheduler" / "scheduler_config.json"
    if not path.is_file():
        if not is_needed:
            return {}
        raise ModelError(f"{folder}: scheduler/scheduler_config.json is missing, so the noise schedule is not known.")
    return dict(scheduler_values(read_json(path), str(folder)))


def predicted_by(family: Family, scheduler_config: Config, where: str, given: str | None) -> str:
    """What a model predicts: what a person says, else what its scheduler's config says."""
    if family.objective == "flow":
        return "flow_prediction"
    return given or prediction_type_of(scheduler_config, where)


def prediction_type_of(scheduler_config: Config, where: str) -> str:
    """What the UNet predicts, as the scheduler's config says."""
    name = str(scheduler_config.get("prediction_type", "epsilon"))
    if name not in PREDICTION_TYPES:
        raise ModelError(f"{where}: the prediction type {name!r} is unknown; known are {', '.join(PREDICTION_TYPES)}.")
    return name


def has_zero_terminal_snr(scheduler_config: Config) -> bool:
    """Whether the schedule ends in pure noise: by its flag, or by betas that were rescaled already (EveryDream 2 saves
    those)."""
    if scheduler_config.get("rescale_betas_zero_snr"):
        return True
    betas = [float(beta) for beta in scheduler_config.get("trained_betas") or ()]
    return bool(betas) and math.prod([1.0 - beta for beta in betas]) < 1e-6


def trained_as(scheduler_config: Config, prediction_type: str, zero_terminal_snr: bool) -> dict[str, Any]:
    """A sampler's config for a model that was trained so; unchanged where it says so already."""
    config = dict(scheduler_config)
    if config.get("prediction_type", "epsilon") != prediction_type:
        config["prediction_type"] = prediction_type
    if zero_terminal_snr and not (config.get("rescale_betas_zero_snr") or config.get("trained_betas")):
        # PNDM cannot start from pure noise (its first step divides by the signal); DDIM can.
        if config.get("_class_name") not in ("DDIMScheduler", "EulerDiscreteScheduler", "DDPMScheduler"):
            config["_class_name"] = "DDIMScheduler"
        config |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return config
