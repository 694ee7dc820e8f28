"""Files out of models: export, merge, extract, with whatever a person may name as a model.

The work is in `export/`; here are the arguments as a person gives them, and what does not go together. Nothing here imports
torch before the work begins.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from everydream_kit.disk_space import require_place
from everydream_kit.errors import ConfigError
from everydream_kit.export.checkpoint_formats import (
    DEFAULT_PRECISION,
    FORMATS,
    LAYOUTS,
    SINGLE_FILE,
    FormatName,
    Precision,
)
from everydream_kit.generation import resolve_checkpoint
from everydream_kit.models.adapters import is_adapter_folder, read_adapter_file
from everydream_kit.runs import RunFolder
from everydream_kit.runs.run_folder import is_run

Source = str | Path | RunFolder


def export(
    checkpoint: Source,
    out: str | Path,
    *,
    format: FormatName = "single_file",
    precision: Precision | None = None,
    strength: float | None = None,
    ema: bool = False,
    token: str | None = None,
    vae: str | Path | None = None,
    base: str | Path | None = None,
) -> Path:
    """Write a checkpoint in one of its forms.

    Args:
        checkpoint: checkpoint, run folder (its last one goes), single file, or Hub id.
        out: what to write.
        format: `single_file`: one file that every image app loads (.safetensors or .ckpt), a LoRA merged into its base;
            `diffusers`: a diffusers folder, a LoRA merged into its base; `lora`: a LoRA file for image apps (kohya's
            layout); `comfy_lora`: a LoRA file by the single file's names, `diffusion_model...`, of families of flow matching;
            `diffusers_lora`: a LoRA file for diffusers' load_lora_weights; `embedding`: a learned token as an
            embedding file.
        precision: of the weights; by default fp16.
        strength: of a LoRA that is merged: 1, the default, is as it was trained.
        ema: the averaged weights.
        token: which learned token, where there are several (with `embedding`).
        vae: VAE to use in place of the model's own, or where a single file holds none: its file, or a diffusers folder.
        base: base model of a LoRA checkpoint, where the one that it names has moved.

    Raises:
        ConfigError: an option that does not apply to the form.
        ExportError, DiskSpaceError, ModelError: as the functions of `export/`.
    """
    _check_out(out, checkpoint, base, vae)
    given = {"precision": precision, "strength": strength, "ema": ema, "token": token, "vae": vae, "base": base}
    for name, value in given.items():
        takers = [one.name for one in FORMATS.values() if name in one.options]
        if value not in (None, False) and format not in takers:
            raise ConfigError(f"{name}: does not apply to the form {format}; it goes with {' or '.join(takers)}.")
    source, weights = resolve_checkpoint(checkpoint), precision or DEFAULT_PRECISION
    if format == "embedding":
        from everydream_kit.export.lora_files import export_token

        return export_token(source, out, token=token)
    if format in LAYOUTS:
        from everydream_kit.export.lora_files import export_lora

        return export_lora(source, out, layout=LAYOUTS[format], precision=weights, ema=ema, adapter_base=base)
    from everydream_kit.export.merge import open_merged
    from everydream_kit.export.model_folder import write_new_folder
    from everydream_kit.export.single_file_export import export_files

    files = open_merged(source, strength=strength, ema=ema, vae=vae, adapter_base=base)
    write = export_files if format == "single_file" else write_new_folder
    return write(files, Path(out), weights)


def merge(
    model: Source,
    other: Source,
    out: str | Path,
    *,
    strength: float | None = None,
    weight: float | None = None,
    precision: Precision = DEFAULT_PRECISION,
    base: str | Path | None = None,
) -> Path:
    """Merge a LoRA into a model, or mix two models.

    Args:
        model: checkpoint, run folder, single file, or Hub id.
        other: a LoRA (file or checkpoint) to merge into it, or a second model to mix it with.
        out: a name in .safetensors or .ckpt for a single file, any other for a diffusers folder.
        strength: of the LoRA: 1, the default, is as it was trained.
        weight: of the second model: 0 is the first, 1 the second, beyond that it extrapolates; by default 0.5.
        precision: of the result.
        base: base model of a LoRA checkpoint, where the one that it names has moved.

    Raises:
        ConfigError: `weight` with a LoRA, `strength` without one, or a result in the place of a source.
        ExportError, DiskSpaceError, ModelError: as the functions of `export/`.
    """
    from everydream_kit.export.merge import merge_checkpoints, merge_lora
    from everydream_kit.models.loading import require_source
    from everydream_kit.models.lora.files import is_lora

    _check_out(out, model, other, base)
    first, second = resolve_checkpoint(model), resolve_checkpoint(other)
    require_source(second)
    if is_lora(Path(second)):
        if weight is not None:
            raise ConfigError(f"weight: mixes two models, and {second} is a LoRA; it is merged with strength.")
        amount = 1.0 if strength is None else strength
        return merge_lora(first, second, out, strength=amount, precision=precision, adapter_base=base)
    if strength is not None:
        raise ConfigError(f"strength: is for a LoRA, and {second} is not one; two models are mixed with weight.")
    amount = 0.5 if weight is None else weight
    return merge_checkpoints(first, second, out, weight=amount, precision=precision, adapter_base=base)


def extract(
    tuned: Source,
    base: Source,
    out: str | Path,
    *,
    rank: int = 32,
    text_encoder: bool = True,
    format: Literal["lora", "comfy_lora", "diffusers_lora"] = "lora",
    precision: Precision = DEFAULT_PRECISION,
    adapter_base: str | Path | None = None,
) -> Path:
    """Write the difference of two models as a LoRA.

    Args:
        tuned: the fine-tuned model: checkpoint, run folder, single file, or Hub id.
        base: the model that it was made from.
        out: file to write: .safetensors.
        rank: of the LoRA: more keeps more and is larger.
        text_encoder: extract the text encoders' difference, too.
        format: `lora` for image apps, `comfy_lora` by the single file's names, `diffusers_lora` for diffusers' load_lora_weights.
        precision: of the weights.
        adapter_base: base model of a LoRA checkpoint, where the one that it names has moved.

    Raises:
        ExportError, DiskSpaceError, ModelError: as `export.lora_files.extract_lora`.
    """
    from everydream_kit.export.lora_files import extract_lora

    _check_out(out, tuned, base, adapter_base)
    return extract_lora(
        resolve_checkpoint(tuned),
        resolve_checkpoint(base),
        out,
        rank=rank,
        text_encoder=text_encoder,
        layout=LAYOUTS[format],
        precision=precision,
        adapter_base=adapter_base,
    )


def _check_out(out: str | Path, *sources: Source | None) -> None:
    """Raises ConfigError where the result would take the place of what it is made from, or cannot be written."""
    target = Path(out)
    for source in filter(None, sources):
        given = Path(str(source)).expanduser()
        for read in (given, *_base_of(given)):
            if target.exists() and read.exists() and target.samefile(read):
                raise ConfigError(f"out: {out} is the model that is read; give the result another name")
            if target.exists() and read.is_dir() and target.resolve().is_relative_to(read.resolve()):
                raise ConfigError(f"out: {out} is a part of {read}, which is read; give the result another name")
    require_place(target.parent, "out")
    if target.suffix in SINGLE_FILE.endings and target.is_dir():
        raise ConfigError(f"out: {out} is a folder; give the file another name")


def _base_of(model: Path) -> list[Path]:
    """The base that a LoRA checkpoint, or the last one of a run, names; nothing for any other model."""
    checkpoints = RunFolder(model).checkpoints(averaged=False)[-1:] if is_run(model) else []
    folder = checkpoints[0].folder if checkpoints else model
    return [Path(read_adapter_file(folder)["base"]["source"]).expanduser()] if is_adapter_folder(folder) else []
