"""Diffusers folders out of anything that opens as a model: the way back from single files, merges and LoRAs."""

from __future__ import annotations

import shutil
from pathlib import Path

from everydream_kit.atomic import sweep, temporary_path
from everydream_kit.errors import ExportError
from everydream_kit.export.single_file_export import check_free_space, live_or_averaged, precision_dtype
from everydream_kit.models.family import ModelFiles
from everydream_kit.models.loading import open_model
from everydream_kit.models.model_saving import write_folder


def export_folder(
    checkpoint: str | Path,
    out: str | Path,
    precision: str = "fp16",
    *,
    ema: bool = False,
    vae: str | Path | None = None,
    adapter_base: str | Path | None = None,
) -> Path:
    """Write a model as a diffusers folder.

    Args:
        checkpoint: any model that `load_model` takes; a LoRA is merged into its base.
        out: must not be there yet, or be empty.
        precision: fp16, bf16 or fp32.
        ema: take the averaged weights, which lie in the folder `<checkpoint>_ema` next to the checkpoint.
        vae: a VAE to use in place of the checkpoint's own: its file, or a diffusers folder.
        adapter_base: for a LoRA checkpoint, its base, where the one that it names has moved.

    Raises:
        ExportError: unknown precision, a taken name, or no EMA weights.
        DiskSpaceError: not enough space; nothing was written.
        ModelError: the model cannot be read.
    """
    files = open_model(live_or_averaged(checkpoint, ema=ema), vae=vae, adapter_base=adapter_base)
    return write_new_folder(files, Path(out), precision)


def write_new_folder(files: ModelFiles, out: Path, precision: str) -> Path:
    """`export_folder` for a model that is opened already. The name is taken by the whole folder at the end."""
    dtype = precision_dtype(precision)
    if out.exists() and (out.is_file() or any(out.iterdir())):
        raise ExportError(f"{out}: is there already, and would be mixed with the new model. Choose another name.")
    out.parent.mkdir(parents=True, exist_ok=True)
    check_free_space(out.parent, files.num_elements() * dtype.itemsize)
    sweep(out.parent)
    partial = temporary_path(out.parent)
    try:
        write_folder(files, partial, dtype=dtype)
        partial.replace(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out
