"""Models out of models: a LoRA merged into its base, and two checkpoints mixed by weight. Weights stream, tensor by
tensor."""

from __future__ import annotations

import dataclasses
import logging
import re
from pathlib import Path

import torch

from everydream_kit.errors import ConfigError, ExportError
from everydream_kit.export.model_folder import write_new_folder
from everydream_kit.export.single_file_export import export_files, live_or_averaged
from everydream_kit.models.adapters import is_adapter_folder, read_adapter_file
from everydream_kit.models.family import ModelFiles
from everydream_kit.models.loading import open_base, open_model, open_with_base
from everydream_kit.models.lora.files import apply_lora, read_lora, read_lora_file
from everydream_kit.models.tensors import LazyTensor
from everydream_kit.models.tokens import write_embedding
from everydream_kit.runs.layout import LORA_FILE

logger = logging.getLogger(__name__)

_MISSPELT = re.compile(r"\.(safe\w*|ckpt\w*|pt|pth|bin|sft)$", re.IGNORECASE)
"""Names by which somebody means a file, and would get a folder."""


def open_merged(
    checkpoint: str | Path,
    *,
    strength: float | None = None,
    ema: bool = False,
    vae: str | Path | None = None,
    adapter_base: str | Path | None = None,
) -> ModelFiles:
    """A model, its weights not read yet; a LoRA checkpoint is merged into its base.

    Args:
        strength: of a LoRA; None: as it was trained.
        ema, vae, adapter_base: as for `export_checkpoint`.

    Raises:
        ConfigError: the strength is NaN, infinite, or too large for float32.
        ExportError: a strength for what is no LoRA, or no EMA weights.
    """
    _check_amount("strength", strength)
    source = live_or_averaged(checkpoint, ema=ema)
    if strength is None:
        return open_model(source, vae=vae, adapter_base=adapter_base)
    folder = Path(source)
    if not is_adapter_folder(folder) or not (folder / LORA_FILE).is_file():
        raise ExportError(
            f"{source}: not a LoRA checkpoint, so there is nothing to merge at a strength. Omit strength."
        )
    base = open_base(folder, read_adapter_file(folder), adapter_base, vae=vae)
    return apply_lora(base, read_lora(folder / LORA_FILE, base), strength)


def merge_lora(
    base: str | Path,
    lora: str | Path,
    out_path: str | Path,
    *,
    strength: float = 1.0,
    precision: str = "fp16",
    adapter_base: str | Path | None = None,
) -> Path:
    """Write a base with a LoRA merged into it.

    Args:
        base: any model that `load_model` takes.
        lora: a LoRA file of any kind that docs/models.md lists, or a LoRA checkpoint. Words bundled in it become
            embedding files next to the result.
        out_path: `.safetensors` or `.ckpt` for a single file, anything else for a new diffusers folder.
        strength: 1 is the LoRA as it was trained.
        precision: of the result: fp16, bf16 or fp32.
        adapter_base: where `base` is a LoRA checkpoint itself: its base, where the one that it names has moved.

    Raises:
        ConfigError: as `open_merged`.
    """
    _check_amount("strength", strength)
    files = open_model(base, adapter_base=adapter_base)
    read = read_lora_file(Path(lora), files)
    out = _write(apply_lora(files, read, strength), Path(out_path), precision)
    outside = sorted(read.changes.keys() - {files.family.denoiser.folder})
    if out.is_file() and outside and not files.family.layout.holds_all:
        logger.warning(
            "%s: a single file of %s holds the %s alone, so what the LoRA changes in %s is not in it. Give the name of a folder "
            "to keep it.",
            out,
            files.family.title,
            files.family.denoiser.folder,
            " and ".join(outside),
        )
    for token, parts in read.embeddings.items():
        near = out.parent / (re.sub(r"[^\w.-]", "_", token) + ".safetensors")
        if near.exists():
            raise ExportError(f"{near}: already exists, so the LoRA's word {token!r} is not written; move it.")
        write_embedding(near, token, parts)
        logger.warning("%s brings the word %s: it is in %s, for the embeddings folder of your app.", lora, token, near)
    return out


def merge_checkpoints(
    first: str | Path,
    second: str | Path,
    out_path: str | Path,
    *,
    weight: float = 0.5,
    precision: str = "fp16",
    adapter_base: str | Path | None = None,
) -> Path:
    """Write a mix of two models: (1 - weight) × first + weight × second. Configs and vocabulary are the first one's.

    Args:
        weight: 0 is the first model, 1 the second; beyond that it extrapolates.
        adapter_base: base of those that are LoRA checkpoints, where the one that they name has moved.

    Raises:
        ConfigError: the weight is NaN, infinite, or too large for float32.
        ExportError: the models differ in family or shape.
    """
    _check_amount("weight", weight)
    one, other = open_with_base([first, second], adapter_base)
    if one.family is not other.family:
        raise ExportError(f"{first} is {one.family.title} and {second} is {other.family.title}: they cannot be mixed.")
    tensors = {
        component: {
            name: _mixed(f"{component}.{name}", value, other.tensors[component].get(name), weight)
            for name, value in weights.items()
        }
        for component, weights in one.tensors.items()
    }
    return _write(dataclasses.replace(one, tensors=tensors), Path(out_path), precision)


def _check_amount(name: str, value: float | None) -> None:
    if value is not None and not abs(value) <= torch.finfo(torch.float32).max:  # NaN compares as False
        raise ConfigError(f"{name}: must be a finite number (got {value})")


def _mixed(name: str, one: LazyTensor, other: LazyTensor | None, weight: float) -> LazyTensor:
    if other is None or other.shape != one.shape:
        raise ExportError(f"{name} has the shape {one.shape} in one model, and not in the other: they cannot be mixed.")
    if not one.dtype.is_floating_point:
        return one
    return LazyTensor(
        one.shape, torch.float32, lambda: torch.lerp(one.read().float(), other.read().float(), float(weight))
    )


def _write(files: ModelFiles, out: Path, precision: str) -> Path:
    if out.suffix in (".safetensors", ".ckpt"):
        return export_files(files, out, precision)
    if _MISSPELT.search(out.name):
        raise ExportError(f"{out}: a model file's name ends in .safetensors or .ckpt, a folder's in neither.")
    return write_new_folder(files, out, precision)
