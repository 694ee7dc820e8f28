"""Single-file checkpoints that image apps load: LDM layout, `.safetensors` by default.

Weights stream from the checkpoint's files through the renaming into the output, one tensor at a time; no model is
built. The file is written next to its final name and renamed when complete.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
from collections.abc import Mapping
from pathlib import Path

import torch
import yaml

from everydream_kit.atomic import open_atomic, sweep, write_atomic
from everydream_kit.disk_space import lack_of_room, make_place
from everydream_kit.errors import DiskSpaceError, ExportError
from everydream_kit.models.convert import CLIP_VOCABULARY
from everydream_kit.models.family import ModelFiles
from everydream_kit.models.loading import open_model
from everydream_kit.models.single_file import CONFIGS_KEY, V_PRED_MARKER, VOCABULARY_KEY, ZTSNR_MARKER
from everydream_kit.models.tensors import HASH_KEY, LazyTensor, Tensors, require_finite, write_safetensors
from everydream_kit.models.tokenizer import read_vocabulary
from everydream_kit.runs import Checkpoint

PRECISIONS: dict[str, torch.dtype] = {
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp32": torch.float32,
}


def export_checkpoint(
    checkpoint_folder: str | Path,
    out_path: str | Path,
    precision: str = "fp16",
    ema: bool = False,
    *,
    title: str | None = None,
    extra_metadata: Mapping[str, str] | None = None,
    vae: str | Path | None = None,
    adapter_base: str | Path | None = None,
) -> Path:
    """Write a checkpoint as one file that image apps load.

    Args:
        checkpoint_folder: a diffusers folder; a single file or a Hub id is converted, too. A LoRA is merged into its
            base.
        out_path: `.safetensors` (written tensor by tensor) or `.ckpt`. Replaced if it is there.
        precision: fp16, bf16 or fp32.
        ema: take the averaged weights, which lie in the folder `<checkpoint>_ema` next to the checkpoint.
        title: for the file's metadata; by default the file's name.
        extra_metadata: more text for the file's header.
        vae: a VAE to use in place of the checkpoint's own: its file, or a diffusers folder.
        adapter_base: for a LoRA checkpoint, its base, where the one that it names has moved.

    Returns:
        The file. SD 2.x gets a `.yaml` of the same name next to it, which older UIs need.

    Raises:
        ExportError: unknown precision or extension, or no EMA weights.
        DiskSpaceError: not enough space; nothing was written.
        ModelError: the checkpoint cannot be read, or a weight is NaN or infinite in this precision.
    """
    files = open_model(live_or_averaged(checkpoint_folder, ema=ema), vae=vae, adapter_base=adapter_base)
    return export_files(files, out_path, precision, title=title, extra_metadata=extra_metadata)


def export_files(
    files: ModelFiles,
    out_path: str | Path,
    precision: str = "fp16",
    *,
    title: str | None = None,
    extra_metadata: Mapping[str, str] | None = None,
) -> Path:
    """`export_checkpoint` for a model that is opened already, merged ones included."""
    dtype = precision_dtype(precision)
    out = Path(out_path)
    if out.suffix not in (".safetensors", ".ckpt"):
        raise ExportError(f"{out}: the name must end in .safetensors or .ckpt.")
    tensors = {name: tensor.cast(dtype) for name, tensor in files.family.layout.to_single_file(files).items()}
    tensors |= _markers(files)
    make_place(out.parent, "out")
    sweep(out.parent)
    check_free_space(out.parent, _num_bytes(tensors))
    metadata = {**single_file_metadata(files, title or out.stem), **(extra_metadata or {})}
    if out.suffix == ".safetensors":
        write_safetensors(out, tensors, metadata, finite=True)
    else:
        _write_ckpt(out, tensors, metadata)
    _write_legacy_config(files, out)
    return out


def precision_dtype(precision: str) -> torch.dtype:
    """The format that a precision's name stands for.

    Raises:
        ExportError: unknown name.
    """
    if precision not in PRECISIONS:
        raise ExportError(f"precision {precision!r} is unknown; known are {', '.join(PRECISIONS)}.")
    return PRECISIONS[precision]


def live_or_averaged(checkpoint: str | Path, *, ema: bool) -> str | Path:
    """What was given, or the folder of the averaged weights next to it.

    Raises:
        ExportError: none were saved with it.
    """
    if not ema:
        return checkpoint
    averaged = Checkpoint.at(checkpoint).averaged
    if not averaged.exists:
        raise ExportError(
            f"{checkpoint}: no EMA weights were saved with it ({averaged.name} is not there). Export without ema."
        )
    return averaged.folder


def single_file_metadata(files: ModelFiles, title: str) -> dict[str, str]:
    """The header of a single file, by stability.ai's modelspec 1.0.1 and with the configs that bring it back."""
    family = files.family
    side = family.resolution(files.prediction_type)
    configs = {**files.configs, "scheduler": files.scheduler_config}
    if not family.layout.holds_all:
        configs = {name: configs[name] for name in (family.denoiser.folder, "scheduler")}
    vocabularies = {}
    for slot in family.text_encoders if family.layout.holds_all else ():  # learned tokens stay out of the file
        size = min(configs[slot.folder].get("vocab_size", CLIP_VOCABULARY), CLIP_VOCABULARY)
        configs[slot.folder] = {**configs[slot.folder], "vocab_size": size}
        tokenizer = files.tokenizers.get(slot.tokenizer_folder)
        own = read_vocabulary(tokenizer) if isinstance(tokenizer, Path) else tokenizer
        if own is not None:  # single-file readers could not know it
            vocabularies[slot.tokenizer_folder] = dataclasses.asdict(own)
    metadata = {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": family.modelspec_architecture,
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.title": title,
        "modelspec.resolution": f"{side}x{side}",
        "modelspec.prediction_type": "v" if files.prediction_type == "v_prediction" else files.prediction_type,
        "modelspec.date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        HASH_KEY: "",
        CONFIGS_KEY: json.dumps(configs, sort_keys=True, separators=(",", ":")),
    }
    if vocabularies:
        metadata[VOCABULARY_KEY] = json.dumps(vocabularies, ensure_ascii=False, separators=(",", ":"))
    return metadata


def _markers(files: ModelFiles) -> Tensors:
    """Empty tensors whose names tell UIs how to sample."""
    empty = LazyTensor.of(torch.zeros(0))
    markers = {}
    if files.prediction_type == "v_prediction":
        markers[V_PRED_MARKER] = empty
    if files.zero_terminal_snr:
        markers[ZTSNR_MARKER] = empty
    return markers


def _num_bytes(tensors: Tensors) -> int:
    return sum(tensor.dtype.itemsize * math.prod(tensor.shape) for tensor in tensors.values())


def check_free_space(folder: Path, num_bytes: int) -> None:
    """Refuse to begin what cannot be finished.

    Raises:
        DiskSpaceError: less is free than the bytes and a little more.
    """
    lack = lack_of_room(folder, num_bytes + 16 * 2**20)
    if lack is not None:
        raise DiskSpaceError(f"{folder}: {lack}. Nothing was written; free some space, or write to another disk.")


def _write_ckpt(path: Path, tensors: Tensors, metadata: Mapping[str, str]) -> None:
    """The older pickle form; it takes the output's size in memory."""
    kept = {key: value for key, value in metadata.items() if key != HASH_KEY}
    weights = {name: value.read() for name, value in tensors.items()}
    for name, value in weights.items():
        require_finite(name, value)
    with open_atomic(path) as file:
        torch.save({"state_dict": weights, "metadata": kept}, file)


def _write_legacy_config(files: ModelFiles, out: Path) -> None:
    config = files.family.legacy_config(files.prediction_type)
    if config is None:
        return
    try:
        write_atomic(out.with_suffix(".yaml"), yaml.safe_dump(config, sort_keys=False))
    except OSError as error:
        raise ExportError(
            f"{out.with_suffix('.yaml')}: cannot be written ({error}); the model file itself is complete."
        ) from error
