"""Diffusers folders out of anything that opens as a model: the way back from single files, merges and LoRAs."""

from __future__ import annotations

import shutil
from pathlib import Path

from everydream_kit.atomic import sweep, temporary_path
from everydream_kit.disk_space import make_place
from everydream_kit.errors import ExportError
from everydream_kit.export.single_file_export import check_free_space, precision_dtype
from everydream_kit.models.family import ModelFiles
from everydream_kit.models.model_saving import write_folder


def write_new_folder(files: ModelFiles, out: Path, precision: str) -> Path:
    """Write a model as a diffusers folder, whose name is taken by the whole folder at the end.

    Args:
        out: must not be there yet, or be empty.
        precision: fp16, bf16 or fp32.

    Raises:
        ExportError: unknown precision, or a taken name.
        DiskSpaceError: not enough space; nothing was written.
    """
    dtype = precision_dtype(precision)
    if out.exists() and (out.is_file() or any(out.iterdir())):
        raise ExportError(f"{out}: already exists, and would be mixed with the new model. Choose another name.")
    make_place(out.parent, "out")
    check_free_space(out.parent, files.num_elements() * dtype.itemsize)
    sweep(out.parent)
    partial = temporary_path(out.parent)
    try:
        write_folder(files, partial, dtype=dtype)
        partial.replace(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out
