"""Writing diffusers folders that every version of diffusers and transformers reads.

Text encoders are written with the `text_model.` prefix and tokenizers with `vocab.json` and `merges.txt`: transformers
5 reads both forms, transformers 4 only these. The model's own sampler is saved, not the training schedule. Weights
stream through tensor by tensor. The folder is written in place; whoever needs "atomic" writes next to and
renames (checkpoints do).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch

from everydream_kit.errors import ModelError
from everydream_kit.models.adapters import write_adapter_file
from everydream_kit.models.components import BOOKKEEPING, shared_names
from everydream_kit.models.family import Config, Model, ModelFiles
from everydream_kit.models.loading import _tokenizer
from everydream_kit.models.lora.injection import base_name
from everydream_kit.models.model_files import DISTILLED, MODULAR_INDEX, trained_as
from everydream_kit.models.tensors import LazyTensor, OpenFile, Tensors, write_safetensors
from everydream_kit.models.tokenizer import save_tokenizer
from everydream_kit.runs.layout import LORA_FILE, TOKENS_FILE


def save_model(
    model: Model,
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    weights: Mapping[str, Mapping[str, torch.Tensor]] | None = None,
    open_file: OpenFile | None = None,
    title: str = "",
) -> None:
    """Write a model as a diffusers folder; a model with an adapter as a small one that names its base (`adapters.py`).

    Args:
        folder: made if it is not there.
        dtype: of the weights; None keeps each as it is in memory.
        weights: state dicts by component ("unet", ...) that are written in place of the live ones: a snapshot of an
            earlier step, or averaged weights.
        open_file: see `write_safetensors`.
        title: of an adapter, for its file's header, which apps show; by default the folder's name.
    """
    folder = Path(folder)
    if model.lora is not None or model.new_tokens:
        _save_adapter(model, folder, weights, title or folder.name)
        return
    _refuse_quantized(model)
    files = files_of(model, weights)
    _write_components(files, folder, dtype, open_file)
    for slot, tokenizer in zip(model.family.text_encoders, model.tokenizers, strict=True):
        save_tokenizer(tokenizer, folder / slot.tokenizer_folder)


def _refuse_quantized(model: Model) -> None:
    from everydream_kit.models.quantized import is_quantized

    if any(map(is_quantized, model.modules().values())):
        raise ModelError(
            f"{model.source}: its weights are quantized and would be saved inexactly. Load it without quantization."
        )


def _save_adapter(
    model: Model, folder: Path, weights: Mapping[str, Mapping[str, torch.Tensor]] | None, title: str
) -> None:
    from everydream_kit.models.lora.files import write_lora
    from everydream_kit.models.lora.injection import lora_of
    from everydream_kit.models.tokens import save_tokens

    if not model.origin:
        raise ModelError(
            f"{model.source}: an adapter's checkpoint names its base, and this base was never saved. Save it first."
        )
    folder.mkdir(parents=True, exist_ok=True)
    parts: dict[str, Any] = {}
    if model.lora is not None:
        denoiser_config = dict(cast(Any, model.denoiser.config))
        write_lora(
            folder / LORA_FILE,
            lora_of(model, weights),
            model.family,
            denoiser_config,
            layout="diffusers",
            title=title,
        )
        parts["lora"] = model.lora.to_json()
    if model.new_tokens:
        save_tokens(model, folder / TOKENS_FILE, weights)
        parts["new_tokens"] = model.new_tokens
    write_adapter_file(folder, model.origin, model.fingerprint, **parts)


def write_folder(files: ModelFiles, folder: str | Path, *, dtype: torch.dtype | None = None) -> None:
    """Write opened files as a diffusers folder, without building the model."""
    folder = Path(folder)
    _write_components(files, folder, dtype)
    for slot in files.family.text_encoders:
        save_tokenizer(_tokenizer(files, slot), folder / slot.tokenizer_folder)


def files_of(model: Model, weights: Mapping[str, Mapping[str, torch.Tensor]] | None = None) -> ModelFiles:
    """A live model seen as files: its weights are read when they are written.

    Args:
        weights: state dicts that stand for those of the live modules, which are not asked then: a divided module's
            `state_dict` (FSDP) must not be called meanwhile.
    """
    modules = model.modules()
    states = {name: (weights or {}).get(name) or own_state(module) for name, module in modules.items()}
    return ModelFiles(
        family=model.family,
        source=model.source,
        configs={name: _config(module) for name, module in modules.items()},
        tensors={name: live_tensors(name, state) for name, state in states.items()},
        tokenizers={},
        scheduler_config=scheduler_to_save(model),
        prediction_type=model.prediction_type,
        zero_terminal_snr=model.zero_terminal_snr,
    )


def own_state(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Each weight once, as transformers saves a module: not under the name of another module that has it, too."""
    shared = shared_names(module)
    return {name: value for name, value in module.state_dict().items() if name not in shared}


def live_tensors(name: str, state_dict: Mapping[str, torch.Tensor]) -> Tensors:
    """A module's weights by the names that every reader knows."""
    state = {}
    for key, value in state_dict.items():
        kept = base_name(key)
        if kept is not None:
            state[kept] = LazyTensor.of(value)
    is_clip = any("token_embedding" in key for key in state)
    if name.startswith("text_encoder") and is_clip and not any(key.startswith("text_model.") for key in state):
        state = {f"text_model.{key}": value for key, value in state.items()}
    return state


def scheduler_to_save(model: Model) -> dict[str, Any]:
    """The model's own sampler; changed only where the training has made something else of the model."""
    if model.family.objective == "flow":
        return dict(model.scheduler_config)
    return trained_as(model.scheduler_config, model.prediction_type, model.zero_terminal_snr)


def _config(module: Any) -> Config:
    """A module's own config as plain JSON values."""
    config = module.config
    if hasattr(config, "to_diff_dict"):  # transformers
        values = dict(config.to_dict())
        values["architectures"] = [_class_of(module)]
        values.pop("dtype", None)
        if isinstance(values.get("rope_parameters"), dict):  # transformers 4 reads it here
            values["rope_theta"] = values["rope_parameters"].get("rope_theta")
        return values
    kept = {key: value for key, value in dict(config).items() if key not in BOOKKEEPING}
    return {"_class_name": _class_of(module), **json.loads(json.dumps(kept, default=list))}


def _class_of(module: Any) -> str:
    """Its library's name for it: FSDP puts a class of its own in front of a divided module's."""
    return type(module).__name__.removeprefix("FSDP")


def _write_components(
    files: ModelFiles, folder: Path, dtype: torch.dtype | None, open_file: OpenFile | None = None
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, tensors in files.tensors.items():
        part = folder / name
        part.mkdir(exist_ok=True)
        _write_json(part / "config.json", files.configs[name])
        stem = "model" if name.startswith("text_encoder") else "diffusion_pytorch_model"
        cast = tensors if dtype is None else {key: value.cast(dtype) for key, value in tensors.items()}
        exported = dtype is not None
        write_safetensors(part / f"{stem}.safetensors", cast, {"format": "pt"}, open_file=open_file, finite=exported)
    (folder / "scheduler").mkdir(exist_ok=True)
    scheduler = {key: value for key, value in files.scheduler_config.items() if key != DISTILLED}
    _write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    index = _model_index(files)
    _write_json(folder / "model_index.json", index)
    if files.family.pipeline_class.endswith("ModularPipeline"):
        _write_json(folder / MODULAR_INDEX, {name: _modular(name, entry) for name, entry in index.items()})


def _model_index(files: ModelFiles) -> dict[str, Any]:
    from diffusers import __version__

    index: dict[str, Any] = {"_class_name": files.family.pipeline_class, "_diffusers_version": __version__}
    for slot in files.family.text_encoders:
        index[slot.tokenizer_folder] = ["transformers", slot.tokenizer_class]
    index["scheduler"] = ["diffusers", files.scheduler_config.get("_class_name", "DDIMScheduler")]
    index |= {component.folder: [component.library, component.class_name] for component in files.family.components}
    index |= {
        slot.folder: ["transformers", slot.index_class] for slot in files.family.text_encoders if slot.index_class
    }
    distilled = {DISTILLED: True} if files.scheduler_config.get(DISTILLED) else {}
    return {**index, **files.family.index, **distilled}


def _modular(name: str, entry: Any) -> Any:
    """An entry of the index as a modular pipeline has it. It names no path: the folder may be moved, and its loader looks
    for the parts next to the index first."""
    if not isinstance(entry, list):
        return entry
    place = {"pretrained_model_name_or_path": None, "subfolder": name, "variant": None, "revision": None}
    return [*entry, {"type_hint": entry, **place}]


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
