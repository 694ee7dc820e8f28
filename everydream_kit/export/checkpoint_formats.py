"""What a checkpoint can be written as, how large that will be, and the library call that writes it. No widgets here.

A whole model becomes one file. A LoRA becomes a LoRA file in one of the two layouts that programs read, or is merged
into its base. Learned words are one small file as they are.
"""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from everydream_kit.errors import ExportError
from everydream_kit.runs import Checkpoint
from everydream_kit.strict_json import parse_json

LARGEST_HEADER_BYTES = 100_000_000
BYTES = {"fp16": 2, "bf16": 2, "fp32": 4}
FormatName = Literal["single", "kohya", "diffusers", "merged", "words"]


@dataclass(frozen=True)
class Format:
    """A form of export.

    Attributes:
        name: for the error message.
        title: as the list shows it.
        end: what the file's name ends with before its extension, so that two forms do not overwrite each other.
        has_precision, has_strength: whether these are requested.
    """

    name: FormatName
    title: str
    end: str = ""
    has_precision: bool = False
    has_strength: bool = False


WHOLE = (Format("single", "full model, for image apps", has_precision=True),)
LORA = (
    Format("kohya", "LoRA, for image apps (kohya's layout)", end="-lora"),
    Format("diffusers", "LoRA, for diffusers", end="-lora-diffusers"),
    Format("merged", "merged into its base: a complete model", end="-merged", has_precision=True, has_strength=True),
)
WORDS = (Format("words", "learned words (an embedding)", end="-words"),)


def formats_of(checkpoint: Path) -> tuple[Format, ...]:
    """The forms that suit a checkpoint, the usual one first."""
    from everydream_kit.models.adapters import LORA_FILE, is_adapter_folder

    if not is_adapter_folder(checkpoint):
        return WHOLE
    return LORA if (checkpoint / LORA_FILE).is_file() else WORDS


def estimate_bytes(checkpoint: Path, form: Format, precision: str) -> float | None:
    """How large the file will be; None where the base is not on this disk.

    Raises:
        ExportError: the checkpoint is damaged.
    """
    from everydream_kit.models.adapters import LORA_FILE, TOKENS_FILE, read_adapter_file

    if form.name in ("kohya", "diffusers"):
        return float((checkpoint / LORA_FILE).stat().st_size)
    if form.name == "words":
        return float((checkpoint / TOKENS_FILE).stat().st_size)
    source = checkpoint if form.name == "single" else Path(read_adapter_file(checkpoint)["base"]["source"])
    if source.is_file():
        return float(source.stat().st_size)
    weights = [file for file in Checkpoint.at(source).model_files() if file.suffix == ".safetensors"]
    return float(sum(map(count_weights, weights)) * BYTES[precision]) if weights else None


def write_as(checkpoint: Path, out: Path, *, form: str, precision: str, strength: float) -> Path:
    """Write a checkpoint in one of its forms.

    Args:
        out: the file.
        form: a form's name.
        precision: of a whole model.
        strength: of a LoRA that is merged; 1 is as it was trained.

    Raises:
        ExportError, DiskSpaceError, ModelError: as the library's functions.
    """
    from everydream_kit.export.lora_files import export_lora
    from everydream_kit.export.merge import merge_lora
    from everydream_kit.export.single_file_export import export_checkpoint
    from everydream_kit.models.adapters import LORA_FILE, TOKENS_FILE, read_adapter_file

    if form in ("kohya", "diffusers"):
        return export_lora(checkpoint, out, layout="kohya" if form == "kohya" else "diffusers")
    if form == "words":
        out.parent.mkdir(parents=True, exist_ok=True)
        return Path(shutil.copyfile(checkpoint / TOKENS_FILE, out))
    if form == "merged" and strength != 1.0:
        base = read_adapter_file(checkpoint)["base"]["source"]
        return merge_lora(base, checkpoint / LORA_FILE, out, strength=strength, precision=precision)
    return export_checkpoint(checkpoint, out, precision=precision)


def count_weights(path: Path) -> int:
    """Numbers in a safetensors file, from its header alone.

    Raises:
        ExportError: the file is not a safetensors file.
    """
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            content = file.read(length) if length < LARGEST_HEADER_BYTES else b""
        header = parse_json(content, path.name, error=ExportError, max_bytes=LARGEST_HEADER_BYTES)
        return sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")
    except (ExportError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ExportError(f"{path.parent.name}/{path.name} is damaged; choose another checkpoint") from error
