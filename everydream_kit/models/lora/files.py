"""LoRA files: diffusers' and kohya's `.safetensors`, written, read for training, and merged into a base lazily. How
files of every tool are read is in `reading.py`.

Diffusers names layers by their modules (`unet.down_blocks...to_q.lora_A.weight`); kohya's files, which UIs know, join
the names with underscores (`lora_unet_down_blocks_..._to_q.lora_down.weight`) and carry an `alpha` for each layer.
For SDXL, kohya's UNet names are those of the single-file layout. ComfyUI's files name the single file's layers with dots
(`diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight`); where such a layer is several of diffusers', their
adapters become one of all their ranks together.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal, TypeVar

import torch

from everydream_kit.errors import ModelError
from everydream_kit.models.family import Config, Family, ModelFiles
from everydream_kit.models.lora.forms import FORMS
from everydream_kit.models.lora.injection import FactorLayer, Layer, Lora, LoraLayer
from everydream_kit.models.lora.layer_names import kohya_name
from everydream_kit.models.lora.reading import DIFFUSERS_METADATA, is_lora, lora_file, read_lora_file
from everydream_kit.models.lora.weight_changes import Change, LoraFile, apply_changes, change_of, delta
from everydream_kit.models.tensors import (
    LazyTensor,
    Tensors,
    concatenated,
    halves_swapped,
    row_shares,
    write_safetensors,
)

Layout = Literal["diffusers", "kohya", "comfy"]
PlainLora = dict[str, dict[str, LoraLayer]]
"""A `Lora` whose layers are two matrices each."""
Number = TypeVar("Number", int, float)

__all__ = ["apply_lora", "delta", "is_lora", "kohya_name", "lora_file", "read_lora", "read_lora_file", "write_lora"]


def write_lora(
    path: Path,
    lora: Lora,
    family: Family,
    denoiser_config: Config,
    *,
    layout: Layout,
    title: str = "",
    dtype: torch.dtype | None = None,
) -> None:
    """Write a LoRA file.

    Args:
        lora: weights by component and layer.
        denoiser_config: for SDXL's names in kohya's layout.
        layout: `diffusers`, or for UIs `kohya` or `comfy`.
        title: for the metadata.
        dtype: of the weights; None keeps each as it is.

    Raises:
        ModelError: a DoRA of some of the layers that are one in the file.
    """
    layers = [layer for part in lora.values() for layer in part.values()]
    rank, alpha = max(layer.rank or 1 for layer in layers), max(layer.alpha for layer in layers)
    kinds = {layer.kind if isinstance(layer, FactorLayer) else "LoRA" for layer in layers}
    network, arguments = next(form.network for form in FORMS.values() if form.title in kinds)
    metadata = {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{family.modelspec_architecture}/lora",
        "modelspec.title": title or path.stem,
        "modelspec.date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "ss_base_model_version": family.kohya_base,
        "ss_network_module": network,
        "ss_network_dim": str(rank),
        "ss_network_alpha": f"{alpha:g}",
        "ss_output_name": title or path.stem,
    }
    plain = _plain(lora)
    if plain is None:
        tensors = _to_lycoris(lora, family, denoiser_config, layout)
        metadata["ss_network_args"] = json.dumps(arguments)
    elif layout == "kohya":
        tensors = _to_kohya(plain, family, denoiser_config)
    elif layout == "comfy":
        together = _for_comfy(_unscaled(plain), family)
        tensors = _to_comfy(together)
        metadata[DIFFUSERS_METADATA] = _comfy_metadata(together, family)
    else:
        tensors = _to_diffusers(plain)
        metadata[DIFFUSERS_METADATA] = _diffusers_metadata(plain)
    cast = tensors if dtype is None else {name: _cast(name, tensor, dtype) for name, tensor in tensors.items()}
    write_safetensors(path, cast, metadata, finite=dtype is not None)  # a given format: an export


def _cast(name: str, tensor: LazyTensor, dtype: torch.dtype) -> LazyTensor:
    """Alphas stay as they are: they are settings, not weights."""
    return tensor if name.endswith(".alpha") else tensor.cast(dtype)


def _plain(lora: Lora) -> PlainLora | None:
    """The same adapter where every layer is two matrices; None where it is of another form."""
    plain: PlainLora = {component: {} for component in lora}
    for component, layers in lora.items():
        for name, layer in layers.items():
            if isinstance(layer, FactorLayer):
                return None
            plain[component][name] = layer
    return plain


def _to_lycoris(lora: Lora, family: Family, denoiser_config: Config, layout: Layout) -> Tensors:
    """LoHa and LoKr by LyCORIS' names of their parts.

    kohya's names of layers are what apps read of Stable Diffusion; of later families, LyCORIS' own (`lycoris_` and diffusers'
    names, as SimpleTuner writes them and ComfyUI reads them: its pull request 11997).
    """
    tensors: Tensors = {}
    for component, layers in lora.items():
        for name, layer in layers.items():
            if layout == "kohya":
                stem = kohya_name(component, name, family, denoiser_config)
            else:
                stem = f"{component}.{name}" if layout == "diffusers" else f"lycoris_{name.replace('.', '_')}"
            assert isinstance(layer, FactorLayer)
            tensors |= {f"{stem}.{part}": value for part, value in layer.parts.items()}
            tensors[f"{stem}.alpha"] = LazyTensor.of(torch.tensor(layer.alpha))
    return tensors


def _diffusers_metadata(lora: PlainLora) -> str:
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
    """The same changes with alpha = rank: readers that do not know alpha, as diffusers before 0.34, read them right.

    Layers of other forms than LoRA stay: their readers know alpha.
    """
    plain = _plain(lora)
    return lora if plain is None else {component: dict(layers) for component, layers in _unscaled(plain).items()}


def _unscaled(lora: PlainLora) -> PlainLora:
    return {
        component: {
            name: dataclasses.replace(layer, up=_scaled(layer.up, layer.alpha / layer.rank), alpha=float(layer.rank))
            for name, layer in layers.items()
        }
        for component, layers in lora.items()
    }


def _scaled(tensor: LazyTensor, factor: float) -> LazyTensor:
    return tensor if factor == 1 else LazyTensor(tensor.shape, tensor.dtype, lambda: tensor.read() * factor)


def _to_diffusers(lora: PlainLora) -> Tensors:
    tensors: Tensors = {}
    for component, layers in lora.items():
        for name, layer in layers.items():
            tensors[f"{component}.{name}.lora_A.weight"] = layer.down
            tensors[f"{component}.{name}.lora_B.weight"] = layer.up
            if layer.magnitude is not None:
                tensors[f"{component}.{name}.lora_magnitude_vector"] = layer.magnitude
    return tensors


def _to_kohya(lora: PlainLora, family: Family, denoiser_config: Config) -> Tensors:
    tensors: Tensors = {}
    for component, layers in lora.items():
        for name, layer in layers.items():
            stem = kohya_name(component, name, family, denoiser_config)
            tensors[f"{stem}.lora_down.weight"] = layer.down
            tensors[f"{stem}.lora_up.weight"] = layer.up
            tensors[f"{stem}.alpha"] = LazyTensor.of(torch.tensor(layer.alpha))
            if layer.magnitude is not None:
                ones = [1] * (len(layer.down.shape) - 1)
                tensors[f"{stem}.dora_scale"] = layer.magnitude.reshaped(layer.magnitude.shape[0], *ones)
    return tensors


def _for_comfy(lora: PlainLora, family: Family) -> dict[str, tuple[list[str], LoraLayer]]:
    """The denoiser's layers by the single file's names, each with diffusers' names of those that it is made of."""
    layers = lora[family.denoiser.folder]
    groups = family.layout.app_layers(list(layers))
    swapped = family.layout.swapped_layers
    return {
        theirs: (
            ours,
            _alone(layers[ours[0]], theirs in swapped)
            if len(ours) == 1
            else _as_one(theirs, ours, layers, family.layout.shares_of(theirs) or (1,) * len(ours)),
        )
        for theirs, ours in groups.items()
    }


def _alone(layer: LoraLayer, is_swapped: bool) -> LoraLayer:
    if not is_swapped:
        return layer
    magnitude = None if layer.magnitude is None else halves_swapped(layer.magnitude)
    return dataclasses.replace(layer, up=halves_swapped(layer.up), magnitude=magnitude)


def _to_comfy(together: Mapping[str, tuple[list[str], LoraLayer]]) -> Tensors:
    """Without alphas: not every reader of this form knows them."""
    tensors: Tensors = {}
    for theirs, (_, layer) in together.items():
        stem = f"diffusion_model.{theirs}"
        tensors[f"{stem}.lora_A.weight"], tensors[f"{stem}.lora_B.weight"] = layer.down, layer.up
        if layer.magnitude is not None:
            tensors[f"{stem}.dora_scale"] = layer.magnitude.reshaped(layer.magnitude.shape[0], 1)
    return tensors


def _comfy_metadata(together: Mapping[str, tuple[list[str], LoraLayer]], family: Family) -> str:
    """Ranks of diffusers' layers: without them, older diffusers takes one alpha for ranks that differ.

    DoRA is not named: diffusers leaves its lengths out of this form.
    """
    plain = {name: dataclasses.replace(layer, magnitude=None) for ours, layer in together.values() for name in ours}
    return _diffusers_metadata({family.denoiser.folder: plain})


def _as_one(theirs: str, ours: list[str], layers: Mapping[str, LoraLayer], shares: Sequence[int]) -> LoraLayer:
    """Adapters of layers that are one in the file: downs stacked, ups on a diagonal; zeros where a layer has none.

    Args:
        shares: of the rows, that each layer has.
    """
    there = [layers[name] for name in ours if name in layers]
    magnitudes = [layer.magnitude for layer in there if layer.magnitude is not None]
    if magnitudes and len(magnitudes) < len(ours):
        raise ModelError(
            f"{theirs}: a DoRA of {len(there)} of its {len(ours)} parts cannot be written as one layer. Adapt all of "
            f"{', '.join(ours)}, or write the file by diffusers' names (diffusers_lora)."
        )
    ranks = [layer.rank for layer in there]
    first = next(place for place, name in enumerate(ours) if name in layers)
    num_rows = there[0].up.shape[0] // shares[first] * sum(shares)

    def read_up() -> torch.Tensor:
        up = torch.zeros(num_rows, sum(ranks), dtype=there[0].up.dtype)
        start = 0
        for name, rows in zip(ours, row_shares(num_rows, shares), strict=True):
            if name in layers:
                stop = start + layers[name].rank
                up[slice(*rows), start:stop] = layers[name].up.read()
                start = stop
        return up

    up = LazyTensor((num_rows, sum(ranks)), there[0].up.dtype, read_up)
    magnitude = concatenated(magnitudes) if magnitudes else None
    return LoraLayer(concatenated([layer.down for layer in there]), up, float(sum(ranks)), magnitude)


def read_lora(path: Path, base: ModelFiles) -> Lora:
    """Read a LoRA that can be trained on: layers of the forms in `forms`. `read_lora_file` reads every kind.

    Args:
        path: the file, or a LoRA checkpoint's folder.
        base: the model that it belongs to; its layers' names say what the file's underscores mean.

    Raises:
        ModelError: damaged, no LoRA, of another kind, or made for a model of another shape.
    """
    file = read_lora_file(path, base)
    others = sorted(
        {_kind(change) for part in file.changes.values() for change in part.values() if not change.can_be_trained}
    )
    slots = {slot.folder: slot for slot in base.family.text_encoders}
    if any(component in slots and "lora" not in slots[component].trains for component in file.changes):
        others.append("layers of text encoders")
    if others or file.embeddings:
        raise ModelError(
            f"{path}: holds {', '.join([*others, *['bundled embeddings'] * bool(file.embeddings)])}, which can be merged "
            "and sampled with, not trained or exported as a LoRA. Merge it with `everydream merge BASE LORA OUT`."
        )
    return {
        component: {name.removesuffix(".weight"): _layer(change) for name, change in changes.items()}
        for component, changes in file.changes.items()
    }


def _kind(change: Change) -> str:
    if change.kind != "LoRA":
        return f"{change.kind}s" if change.kind == "difference" else change.kind
    return "LoCon with a Tucker core" if "mid" in change.parts else "DoRA along the input"


def _layer(change: Change) -> Layer:
    if change.kind != "LoRA":
        layer = FactorLayer(change.kind, change.parts, 0.0)
        return dataclasses.replace(layer, alpha=float(layer.rank or 1) if change.alpha is None else change.alpha)
    down, up, lengths = change.parts["down"], change.parts["up"], change.magnitude
    magnitude = None if lengths is None else lengths.reshaped(math.prod(lengths.shape))
    return LoraLayer(down, up, float(down.shape[0]) if change.alpha is None else change.alpha, magnitude)


def apply_lora(base: ModelFiles, lora: Lora | LoraFile, strength: float = 1.0) -> ModelFiles:
    """A base with a LoRA merged into it, lazily: each weight is changed when it is read."""
    if isinstance(lora, LoraFile):
        return apply_changes(base, lora.changes, strength)
    changes = {
        component: {f"{name}.weight": change_of(layer) for name, layer in layers.items()}
        for component, layers in lora.items()
    }
    return apply_changes(base, changes, strength)
