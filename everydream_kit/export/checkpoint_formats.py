"""What a checkpoint can be written as: one record for each form, from which the command line and the share panel are made,
and how large the result will be. `actions/converting.py` writes it. No widgets here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from everydream_kit.errors import ExportError
from everydream_kit.runs import Checkpoint

Precision = Literal["fp16", "bf16", "fp32"]
BYTES: dict[str, int] = {"fp16": 2, "bf16": 2, "fp32": 4}
"""Of a number, by the name of the precision."""
DEFAULT_PRECISION: Precision = "fp16"
"""What image apps expect."""
FormatName = Literal["single_file", "diffusers", "lora", "comfy_lora", "diffusers_lora", "embedding"]
Option = Literal["precision", "strength", "ema", "token", "vae", "base"]
LAYOUTS: dict[str, Literal["kohya", "comfy", "diffusers"]] = {
    "lora": "kohya",
    "comfy_lora": "comfy",
    "diffusers_lora": "diffusers",
}
"""Of LoRA files, by the name of their form."""


@dataclass(frozen=True)
class Format:
    """A form of export.

    Attributes:
        name: as it is given to `--format`.
        title: as the panel lists it.
        end: what a suggested file name ends with, extension included, so that two forms do not overwrite each other.
        endings: extensions that a name may have; none: it is a folder.
        options: what may be given with it.
    """

    name: FormatName
    title: str
    end: str
    endings: tuple[str, ...]
    options: frozenset[Option]


_MODEL: frozenset[Option] = frozenset({"precision", "strength", "ema", "vae", "base"})
SINGLE_FILE = Format(
    "single_file",
    "one file, for image apps",
    ".safetensors",
    (".safetensors", ".ckpt"),
    _MODEL,
)
FOLDER = Format("diffusers", "diffusers folder", "-diffusers", (), _MODEL)
LORA = Format(
    "lora",
    "LoRA, for image apps (kohya's layout)",
    "-lora.safetensors",
    (".safetensors",),
    frozenset({"precision", "ema", "base"}),
)
COMFY_LORA = Format(
    "comfy_lora",
    "LoRA, by the single file's names (diffusion_model.)",
    "-lora-comfy.safetensors",
    (".safetensors",),
    LORA.options,
)
"""For families whose apps read it next to another form; not in the panel's list."""
DIFFUSERS_LORA = Format(
    "diffusers_lora",
    "LoRA, for diffusers",
    "-lora-diffusers.safetensors",
    (".safetensors",),
    LORA.options,
)
EMBEDDING = Format(
    "embedding",
    "learned words (an embedding)",
    "-words.safetensors",
    (".safetensors",),
    frozenset({"token"}),
)
FORMATS: dict[str, Format] = {
    one.name: one for one in (SINGLE_FILE, FOLDER, LORA, COMFY_LORA, DIFFUSERS_LORA, EMBEDDING)
}
MERGED = replace(SINGLE_FILE, title="merged into its base: a complete model", end="-merged.safetensors")


def formats_of(checkpoint: Path) -> tuple[Format, ...]:
    """The forms that suit a checkpoint, the usual one first, each with the options that have a meaning for it."""
    from everydream_kit.models.adapters import is_adapter_folder
    from everydream_kit.runs.layout import LORA_FILE

    if not is_adapter_folder(checkpoint):
        return tuple(replace(one, options=one.options - {"strength", "base"}) for one in (SINGLE_FILE, FOLDER))
    return (LORA, DIFFUSERS_LORA, MERGED, FOLDER) if (checkpoint / LORA_FILE).is_file() else (EMBEDDING,)


def estimate_bytes(checkpoint: Path, form: Format, precision: str) -> float | None:
    """How large the result will be; None where the base is not on this disk.

    Raises:
        ExportError: the checkpoint is damaged.
    """
    from everydream_kit.models.adapters import is_adapter_folder, read_adapter_file
    from everydream_kit.runs.layout import LORA_FILE, TOKENS_FILE

    if form.name in LAYOUTS:
        return float(count_weights(checkpoint / LORA_FILE) * BYTES[precision])
    if form.name == "embedding":
        return float((checkpoint / TOKENS_FILE).stat().st_size)
    is_adapter = is_adapter_folder(checkpoint)
    source = Path(read_adapter_file(checkpoint)["base"]["source"]) if is_adapter else checkpoint
    if source.is_file():
        return float(source.stat().st_size)
    weights = [file for file in Checkpoint.at(source).model_files() if file.suffix == ".safetensors"]
    return float(sum(map(count_weights, weights)) * BYTES[precision]) if weights else None


def count_weights(path: Path) -> int:
    """Numbers in a safetensors file, from its header alone.

    Raises:
        ExportError: the file is not a safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118 - no mapping
    except (OSError, SafetensorError) as error:
        raise ExportError(f"{path.parent.name}/{path.name} is damaged; choose another checkpoint") from error
