"""LoRA files: diffusers' and kohya's `.safetensors`, both read and written, and merged into a base lazily.

Diffusers names layers by their modules (`unet.down_blocks...to_q.lora_A.weight`); kohya's files, which UIs know, join
the names with underscores (`lora_unet_down_blocks_..._to_q.lora_down.weight`) and carry an `alpha` for each layer.
For SDXL, kohya's UNet names are those of the single-file layout.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch

from everydream_kit.errors import ModelError
from everydream_kit.models.adapters import LORA_FILE
from everydream_kit.models.convert import rename, unet_renames
from everydream_kit.models.family import Config, Family
from everydream_kit.models.files import ModelFiles
from everydream_kit.models.lora import Lora, LoraLayer
from everydream_kit.models.tensors import LazyTensor, Tensors, open_safetensors, write_safetensors
from everydream_kit.strict_json import parse_json

Layout = Literal["diffusers", "kohya"]
Number = TypeVar("Number", int, float)

DIFFUSERS_METADATA = "lora_adapter_metadata"
"""Where diffusers keeps rank and alpha (JSON in the header)."""


def write_lora(
    path: Path,
    lora: Lora,
    family: Family,
    unet_config: Config,
    *,
    layout: Layout,
    title: str = "",
    dtype: torch.dtype | None = None,
) -> None:
    """Write a LoRA file.

    Args:
        lora: weights by component and layer.
        unet_config: for SDXL's names in kohya's layout.
        layout: `diffusers`, or `kohya` for UIs.
        title: for the metadata.
        dtype: of the weights; None keeps each as it is.
    """
    layers = [layer for part in lora.values() for layer in part.values()]
    rank, alpha = max(layer.rank for layer in layers), max(layer.alpha for layer in layers)
    metadata = {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{family.modelspec_architecture}/lora",
        "modelspec.title": title or path.stem,
        "modelspec.date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "ss_base_model_version": family.kohya_base,
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(rank),
        "ss_network_alpha": f"{alpha:g}",
        "ss_output_name": title or path.stem,
    }
    if layout == "kohya":
        tensors = _to_kohya(lora, family, unet_config)
    else:
        tensors = _to_diffusers(lora)
        metadata[DIFFUSERS_METADATA] = _diffusers_metadata(lora)
    cast = tensors if dtype is None else {name: _cast(name, tensor, dtype) for name, tensor in tensors.items()}
    write_safetensors(path, cast, metadata)


def _cast(name: str, tensor: LazyTensor, dtype: torch.dtype) -> LazyTensor:
    """Alphas stay as they are: they are settings, not weights."""
    return tensor if name.endswith(".alpha") else tensor.cast(dtype)


def _diffusers_metadata(lora: Lora) -> str:
    """peft's settings for each component. All keys that diffusers 0.34 to 0.36 ask for are there, empty ones included."""
    values: dict[str, object] = {}
    for component, layers in lora.items():
        # transformers 5 has no such prefix; peft matches the ends of names, so that 4 finds them, too
        short = {name.removeprefix("text_model."): layer for name, layer in sorted(layers.items())}
        rank = _most_common(layer.rank for layer in short.values())
        alpha = _most_common(layer.alpha for layer in short.values())
        values |= {
            f"{component}.r": rank,
            f"{component}.lora_alpha": alpha,
            f"{component}.rank_pattern": {name: layer.rank for name, layer in short.items() if layer.rank != rank},
            f"{component}.alpha_pattern": {name: layer.alpha for name, layer in short.items() if layer.alpha != alpha},
            f"{component}.target_modules": list(short),
            f"{component}.use_dora": any(layer.magnitude is not None for layer in short.values()),
        }
    return json.dumps(values, sort_keys=True)


def _most_common(numbers: Iterable[Number]) -> Number:
    return Counter(numbers).most_common(1)[0][0]


def without_scale(lora: Lora) -> Lora:
    """The same changes with alpha = rank: readers that do not know alpha, as diffusers before 0.34, read them right."""
    return {
        component: {
            name: dataclasses.replace(layer, up=_scaled(layer.up, layer.alpha / layer.rank), alpha=float(layer.rank))
            for name, layer in layers.items()
        }
        for component, layers in lora.items()
    }


def _scaled(tensor: LazyTensor, factor: float) -> LazyTensor:
    return tensor if factor == 1 else LazyTensor(tensor.shape, tensor.dtype, lambda: tensor.read() * factor)


def _to_diffusers(lora: Lora) -> Tensors:
    tensors: Tensors = {}
    for component, layers in lora.items():
        for name, layer in layers.items():
            tensors[f"{component}.{name}.lora_A.weight"] = layer.down
            tensors[f"{component}.{name}.lora_B.weight"] = layer.up
            if layer.magnitude is not None:
                tensors[f"{component}.{name}.lora_magnitude_vector"] = layer.magnitude
    return tensors


def _to_kohya(lora: Lora, family: Family, unet_config: Config) -> Tensors:
    tensors: Tensors = {}
    for component, layers in lora.items():
        for name, layer in layers.items():
            stem = kohya_name(component, name, family, unet_config)
            tensors[f"{stem}.lora_down.weight"] = layer.down
            tensors[f"{stem}.lora_up.weight"] = layer.up
            tensors[f"{stem}.alpha"] = LazyTensor.of(torch.tensor(layer.alpha))
            if layer.magnitude is not None:
                ones = [1] * (len(layer.down.shape) - 1)
                tensors[f"{stem}.dora_scale"] = layer.magnitude.reshaped(layer.magnitude.shape[0], *ones)
    return tensors


def kohya_name(component: str, name: str, family: Family, unet_config: Config) -> str:
    """A layer's name in kohya's layout."""
    if component == "unet":
        if len(family.text_encoders) > 1:
            name = rename(name + ".weight", dict(unet_renames(unet_config))).removesuffix(".weight")
        return "lora_unet_" + name.replace(".", "_")
    prefix = next(slot.kohya_prefix for slot in family.text_encoders if slot.folder == component)
    return f"{prefix}_{name.replace('.', '_')}"


LAYER_ENDS = (".lora_down.weight", ".lora_A.weight")
"""What the first half of a layer is called, in kohya's and in diffusers' layout."""


def lora_file(path: Path) -> Path:
    """The file of a LoRA checkpoint's folder, or the file that was given."""
    return path / LORA_FILE if path.is_dir() else path


def is_lora(path: Path) -> bool:
    """Whether a file or folder holds a LoRA. A damaged file does not."""
    file = lora_file(path)
    if not file.is_file() or file.suffix != ".safetensors":
        return False
    try:
        return any(name.endswith(LAYER_ENDS) for name in open_safetensors(file)[0])
    except ModelError:
        return False


def read_lora(path: Path, base: ModelFiles) -> Lora:
    """Read a LoRA file of either layout.

    Args:
        path: the file, or a LoRA checkpoint's folder.
        base: the model that it belongs to; its layers' names say what the file's underscores mean.

    Raises:
        ModelError: damaged, no LoRA, or made for a model of another shape.
    """
    path = lora_file(path)
    tensors, metadata = open_safetensors(path)
    if any(name.endswith(".lora_down.weight") for name in tensors):
        lora = _from_kohya(tensors, base)
    else:
        lora = _from_diffusers(tensors, metadata)
    num_read = sum(len(layers) for layers in lora.values())
    num_there = sum(name.endswith(LAYER_ENDS) for name in tensors)
    if not num_there:
        raise ModelError(f"{path}: no LoRA; its first tensor is named {next(iter(tensors), None)!r}.")
    if num_read < num_there:
        raise ModelError(
            f"{path}: {num_there - num_read} of its {num_there} layers are not in {base.source} "
            f"({base.family.title}). It was made for another model family."
        )
    check_fits(path, lora, base)
    return lora


def check_fits(path: Path, lora: Lora, base: ModelFiles) -> None:
    """Compare a LoRA's layers with the base's.

    Raises:
        ModelError: a layer is missing or of another shape.
    """
    for component, layers in lora.items():
        for name, layer in layers.items():
            weight = base.tensors.get(component, {}).get(f"{name}.weight")
            if weight is None or weight.shape[0] != layer.up.shape[0] or weight.shape[1] != layer.down.shape[1]:
                shape = "is not there" if weight is None else f"has the shape {weight.shape}"
                raise ModelError(
                    f"{path}: does not fit {base.source}: its layer {component}.{name} wants a weight of "
                    f"{layer.up.shape[0]} x {layer.down.shape[1]}, and that {shape}."
                )


def _from_kohya(tensors: Tensors, base: ModelFiles) -> Lora:
    lora: Lora = {}
    for component, weights in base.tensors.items():
        if component == "vae":
            continue
        for weight_name, weight in weights.items():
            name = weight_name.removesuffix(".weight")
            if name == weight_name or len(weight.shape) < 2:
                continue
            stems = {kohya_name(component, name, base.family, base.configs["unet"])}
            if component == "unet":
                stems.add("lora_unet_" + name.replace(".", "_"))
            for stem in stems:
                if f"{stem}.lora_down.weight" in tensors:
                    lora.setdefault(component, {})[name] = _kohya_layer(tensors, stem)
    return lora


def _kohya_layer(tensors: Tensors, stem: str) -> LoraLayer:
    down, up = tensors[f"{stem}.lora_down.weight"], tensors.get(f"{stem}.lora_up.weight")
    if up is None:
        raise ModelError(f"{stem}: a LoRA layer without lora_up.")
    alpha = tensors[f"{stem}.alpha"].read().item() if f"{stem}.alpha" in tensors else float(down.shape[0])
    scale = tensors.get(f"{stem}.dora_scale")
    return LoraLayer(down, up, alpha, None if scale is None else scale.reshaped(scale.shape[0]))


def _from_diffusers(tensors: Tensors, metadata: Mapping[str, str]) -> Lora:
    values = parse_json(
        metadata.get(DIFFUSERS_METADATA, "{}"), f"LoRA: metadata {DIFFUSERS_METADATA}", error=ModelError
    )
    lora: Lora = {}
    for key, down in tensors.items():
        if not key.endswith(".lora_A.weight"):
            continue
        stem = key.removesuffix(".lora_A.weight")
        component, _, name = stem.partition(".")
        up = tensors.get(f"{stem}.lora_B.weight")
        if up is None:
            raise ModelError(f"{stem}: a LoRA layer without lora_B.")
        own = _by_pattern(values, component, name) or values.get(f"{component}.lora_alpha", down.shape[0])
        if isinstance(own, bool) or not isinstance(own, (int, float)):
            raise ModelError(f"LoRA: the alpha of {component}.{name} must be a number (got {own!r:.60}).")
        alpha = float(own)
        magnitude = tensors.get(f"{stem}.lora_magnitude_vector")
        lora.setdefault(component, {})[name] = LoraLayer(down, up, alpha, magnitude)
    return lora


def _by_pattern(values: Mapping[str, Any], component: str, name: str) -> float | None:
    """A layer's own alpha, where the file names it: peft's patterns match the ends of names."""
    patterns = values.get(f"{component}.alpha_pattern")
    if not isinstance(patterns, dict):
        return None
    return next((patterns[end] for end in patterns if f".{name}".endswith("." + end.removeprefix("^"))), None)


def apply_lora(base: ModelFiles, lora: Lora, strength: float = 1.0) -> ModelFiles:
    """A base with a LoRA merged into it, lazily: each weight is changed when it is read."""
    tensors = {component: dict(weights) for component, weights in base.tensors.items()}
    for component, layers in lora.items():
        for name, layer in layers.items():
            key = f"{name}.weight"
            if key not in tensors.get(component, {}):
                raise ModelError(f"{base.source}: has no layer {component}.{name} for the LoRA.")
            tensors[component][key] = _merged(tensors[component][key], layer, strength)
    return dataclasses.replace(base, tensors=tensors)


def _merged(weight: LazyTensor, layer: LoraLayer, strength: float) -> LazyTensor:
    def read() -> torch.Tensor:
        original = weight.read().float()
        change = delta(layer).reshape(original.shape)
        if layer.magnitude is None:
            return (original + strength * change).to(weight.dtype)
        # DoRA (arXiv 2402.09353, equation 5): the direction of W + change, the learnt length of each row.
        axes = tuple(range(1, original.dim()))
        direction = original + change
        length = direction.norm(dim=axes, keepdim=True)
        merged = direction * (layer.magnitude.read().float().reshape(length.shape) / length)
        return (original + strength * (merged - original)).to(weight.dtype)

    return LazyTensor(weight.shape, weight.dtype, read)


def delta(layer: LoraLayer) -> torch.Tensor:
    """alpha / rank * up @ down, float32, (out, in * k * k)."""
    down, up = layer.down.read().float().flatten(1), layer.up.read().float().flatten(1)
    return (layer.alpha / layer.rank) * (up @ down)
