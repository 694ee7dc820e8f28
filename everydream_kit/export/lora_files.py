"""Small files out of checkpoints: LoRAs in diffusers' or kohya's layout, LoRAs extracted from the difference of two
models, learned tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch

from everydream_kit.disk_space import make_place
from everydream_kit.errors import ExportError
from everydream_kit.export.single_file_export import live_or_averaged, precision_dtype
from everydream_kit.models.adapters import is_adapter_folder, read_adapter_file
from everydream_kit.models.family import Family, ModelFiles
from everydream_kit.models.loading import open_base, open_with_base
from everydream_kit.models.lora.files import read_lora, without_scale, write_lora
from everydream_kit.models.lora.injection import FactorLayer, Layer, Lora, LoraLayer
from everydream_kit.models.tensors import LazyTensor, Tensors, open_safetensors
from everydream_kit.models.tokens import write_embedding
from everydream_kit.runs.layout import LORA_FILE, TOKENS_FILE

LoraLayout = Literal["diffusers", "kohya", "comfy"]


def export_lora(
    checkpoint_folder: str | Path,
    out_path: str | Path,
    *,
    layout: LoraLayout = "kohya",
    precision: str = "fp16",
    ema: bool = False,
    adapter_base: str | Path | None = None,
) -> Path:
    """Write a LoRA checkpoint as one file.

    Args:
        checkpoint_folder: a checkpoint of `training_kind: lora`.
        out_path: `.safetensors`.
        layout: `kohya` for image apps, `diffusers` for `load_lora_weights`, `comfy` for apps that read the single file's
            names.
        precision: fp16, bf16 or fp32.
        ema: take the averaged weights, which lie in the folder `<checkpoint>_ema` next to the checkpoint.
        adapter_base: its base, where the one that it names has moved.

    Raises:
        ExportError: the checkpoint is no LoRA, the name ends otherwise, unknown precision, or no EMA weights.
        ModelError: its base cannot be read.
    """
    folder, out = Path(live_or_averaged(checkpoint_folder, ema=ema)), Path(out_path)
    dtype = precision_dtype(precision)
    if not is_adapter_folder(folder) or not (folder / LORA_FILE).is_file():
        raise ExportError(
            f"{folder}: not a LoRA checkpoint. Full checkpoints are exported with --format single_file or diffusers."
        )
    _check_name(out)
    base = open_base(folder, read_adapter_file(folder), adapter_base)
    make_place(out.parent, "out")
    lora = read_lora(folder / LORA_FILE, base)
    kinds = {layer.kind for part in lora.values() for layer in part.values() if isinstance(layer, FactorLayer)}
    if layout == "diffusers" and kinds:
        raise ExportError(
            f"{folder}: diffusers reads no {kinds.pop()}. Export it for image apps (--format lora), or merged."
        )
    layout = layout_for(base.family, layout)
    if kinds and layout != "kohya":
        layout = "comfy"  # LyCORIS' own names
    if layout == "diffusers":
        lora = without_scale(lora)
    write_lora(
        out, lora, base.family, base.configs[base.family.denoiser.folder], layout=layout, title=out.stem, dtype=dtype
    )
    return out


def extract_lora(
    tuned: str | Path,
    base: str | Path,
    out_path: str | Path,
    *,
    rank: int = 32,
    text_encoder: bool = True,
    layout: LoraLayout = "kohya",
    precision: str = "fp16",
    adapter_base: str | Path | None = None,
) -> Path:
    """Write the difference of two models as a LoRA: the best one of its rank, by singular values (Eckart and Young
    1936).

    Args:
        tuned, base: two models of one family and shape.
        rank: of the result; layers that are smaller get less.
        text_encoder: extract the text encoders' difference, too.
        layout: `kohya` for image apps, `diffusers` for `load_lora_weights`.
        precision: fp16, bf16 or fp32.
        adapter_base: base of the one that is a LoRA checkpoint, where the one that it names has moved.

    Raises:
        ExportError: the models differ in shape, or not at all; a rank below 1; unknown precision.
    """
    out = Path(out_path)
    dtype = precision_dtype(precision)
    if rank < 1:
        raise ExportError(f"rank {rank}: must be at least 1.")
    _check_name(out)
    one, other = open_with_base([tuned, base], adapter_base)
    if one.family is not other.family:
        raise ExportError(
            f"{tuned} is {one.family.title} and {base} is {other.family.title}: a LoRA cannot turn one into the other."
        )
    components = [
        one.family.denoiser.folder,
        *(slot.folder for slot in one.family.text_encoders if text_encoder and "lora" in slot.trains),
    ]
    lora: Lora = {}
    for component in components:
        layers = _differences(one, other, component, rank)
        if layers:
            lora[component] = layers
    if not lora:
        raise ExportError(f"{tuned}: its layers are equal to those of {base}, so there is nothing to extract.")
    make_place(out.parent, "out")
    layout = layout_for(one.family, layout)
    write_lora(
        out, lora, one.family, one.configs[one.family.denoiser.folder], layout=layout, title=out.stem, dtype=dtype
    )
    return out


def layout_for(family: Family, asked: LoraLayout) -> LoraLayout:
    """The layout that is written: apps read some families' LoRAs by diffusers' names alone.

    Raises:
        ExportError: no app reads this family's LoRAs so.
    """
    if asked == "comfy" and not family.layout.has_app_layers:
        raise ExportError(f"comfy_lora: no app reads LoRAs of {family.title} in this form. Take lora.")
    return family.layout.lora_for_apps if asked == "kohya" else asked


def export_token(checkpoint_folder: str | Path, out_path: str | Path, *, token: str | None = None) -> Path:
    """Write a learned token as image apps take it: `emb_params`, or `clip_l` and `clip_g` for two text encoders.

    Args:
        checkpoint_folder: a checkpoint of `training_kind: textual_inversion`.
        out_path: `.safetensors`. Apps call the token by the file's name.
        token: which one; may be skipped where there is only one.

    Raises:
        ExportError: the checkpoint has no learned token, or not this one, or several and none was named.
    """
    folder, out = Path(checkpoint_folder), Path(out_path)
    if out.suffix != ".safetensors":
        raise ExportError(f"{out}: the name of an embedding file must end in .safetensors.")
    if not (folder / TOKENS_FILE).is_file():
        raise ExportError(f"{folder}: no learned tokens here. They come from training_kind textual_inversion.")
    tensors, _ = open_safetensors(folder / TOKENS_FILE)
    tokens = _tokens_of(tensors)
    if token is None and len(tokens) > 1:
        raise ExportError(f"{folder}: has the tokens {', '.join(tokens)}; name one.")
    chosen = tokens[0] if token is None else token
    if chosen not in tokens:
        raise ExportError(f"{folder}: has no learned token {chosen!r}; it has {', '.join(tokens)}.")
    make_place(out.parent, "out")
    write_embedding(out, chosen, [tensors[name] for name in (chosen, f"{chosen}|1") if name in tensors])
    return out


def learned_tokens(checkpoint: Path) -> list[str]:
    """The tokens that a checkpoint of `training_kind: textual_inversion` has learned."""
    return _tokens_of(open_safetensors(checkpoint / TOKENS_FILE)[0])


def _tokens_of(tensors: Tensors) -> list[str]:
    return sorted(name for name in tensors if "|" not in name)  # `name|1` is of the second text encoder


def _check_name(out: Path) -> None:
    if out.suffix != ".safetensors":
        raise ExportError(f"{out}: the name of a LoRA file must end in .safetensors.")


def _differences(one: ModelFiles, other: ModelFiles, component: str, rank: int) -> dict[str, Layer]:
    layers: dict[str, Layer] = {}
    for key, weight in one.tensors[component].items():
        if not key.endswith(".weight") or len(weight.shape) not in (2, 4) or "embedding" in key.rpartition(".")[0]:
            continue
        twin = other.tensors[component].get(key)
        if twin is None or twin.shape != weight.shape:
            raise ExportError(f"{component}.{key} has the shape {weight.shape} in one model, and not in the other.")
        change = weight.read().float() - twin.read().float()
        if change.any():
            layers[key.removesuffix(".weight")] = low_rank(change, rank)
    return layers


def low_rank(change: torch.Tensor, rank: int) -> LoraLayer:
    """The nearest matrix of this rank to a change of weights, halves of each singular value on both sides.

    Args:
        change: (out, in) or (out, in, k, k), float32.
    """
    matrix = change.flatten(1)
    kept = min(rank, *matrix.shape)
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    root = s[:kept].sqrt()
    up, down = u[:, :kept] * root, root[:, None] * v[:kept]
    if change.dim() == 4:
        up, down = up[:, :, None, None], down.reshape(kept, *change.shape[1:])
    return LoraLayer(LazyTensor.of(down.contiguous()), LazyTensor.of(up.contiguous()), float(kept))
